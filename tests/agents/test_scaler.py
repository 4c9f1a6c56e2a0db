from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from msgspec.structs import replace

from swarmx.agents.demand import HORIZONS_S
from swarmx.agents.router import RouterAgent
from swarmx.agents.router_settings import RouterSettings
from swarmx.agents.scaler import ScalerAgent, ScalerSettings
from swarmx.agents.scaling import SCALING_POLICIES
from swarmx.core.actions import Deploy, Drain, StartTimer
from swarmx.core.messages import (
    AlertRaised,
    BoundsChanged,
    CallReady,
    DrainNoticed,
    ReplicaChanged,
    ScalePlanned,
    ScaleRequested,
    ScalingPolicyChanged,
    TimerFired,
    WorkflowEnded,
    WorkflowSubmitted,
)
from swarmx.core.scaling import ScaleView, Target
from swarmx.runtime.journal import MemoryJournal
from swarmx.runtime.switchboard import Switchboard
from swarmx.runtime.virtual import VirtualShell
from tests.agents.scaling_worlds import (
    PLAN,
    SLOW,
    Bench,
    SlowStarts,
    a_bench,
    a_group,
    demand,
    deployed,
    drained,
    of_group,
)
from tests.agents.worlds import FORECAST, a_call, a_profile, a_replica, changed


def a_bench_with(count: int, *groups: Any, **about: Any) -> Bench:
    """So many replicas of the first group are ready, and wanted."""
    bench = a_bench(*groups, **about)
    bench.become("ready", *deployed(bench.tick(8 * count)))
    return bench


def test_the_least_number_is_started_with_the_first_plan() -> None:
    bench = a_bench(a_group(min_replicas=2), up_cooldown_s=60.0)
    assert bench.agent.handle(PLAN, 5.0)[0] == StartTimer(key="plan", at_s=7.0)
    assert [output.replica_id for output in bench.agent.handle(PLAN, 5.0) if isinstance(output, Deploy)] == []
    assert bench.agent.last_plan("m") is not None
    assert bench.agent._models["m"].supply.count() == 2


def test_replicas_are_started_for_the_calls_that_are_there() -> None:
    bench = a_bench()
    assert bench.tick(17) == [Deploy(replica_id=f"g-{n}", group_id="g") for n in range(3)]
    (plan,) = bench.plans
    assert (plan.reason, plan.have, plan.wanted, plan.target) == ("grow", 0.0, 17 / 8, 3)
    assert plan.deploys == ("g-0", "g-1", "g-2")
    assert plan.terms == {"arrivals_per_s": 0.0, "calls": 17.0, "calls_a_replica": 8.0}


def test_what_is_starting_counts() -> None:
    bench = a_bench()
    bench.tick(16)
    assert bench.tick(16) == []
    assert deployed(bench.tick(24)) == ["g-2"]


def test_a_plan_is_told_when_it_changes_something_or_its_reason_changes() -> None:
    bench = a_bench()
    for calls in (8, 8, 8, 80, 80, 80):
        bench.tick(calls)
    assert [plan.reason for plan in bench.plans] == ["grow", "steady", "grow", "limit"]
    assert bench.reason == "limit"


def test_more_than_the_bounds_allow_is_not_started_and_told_after_two_plans_and_again_later() -> None:
    bench = a_bench(a_group(max_replicas=2), alert_every_s=30.0)
    alerts = []
    for _ in range(20):
        alerts += [(bench.now_s, o) for o in bench.tick(80) if isinstance(o, AlertRaised)]
    at_max = AlertRaised(kind="at_max", subject="m", value=10.0)
    assert alerts == [(4.0, at_max), (34.0, at_max)]
    assert bench.agent._models["m"].supply.count() == 2


def test_a_wish_that_is_over_the_bounds_only_now_and_then_is_not_told() -> None:
    bench = a_bench(a_group(max_replicas=2))
    assert not any(isinstance(o, AlertRaised) for calls in (80, 8) * 5 for o in bench.tick(calls))


def test_a_group_is_not_filled_beyond_its_limit_even_while_one_drains() -> None:
    bench = a_bench_with(3, a_group(limit=3, max_replicas=3))
    assert len(drained(bench.tick(8))) == 2
    assert deployed(bench.tick(80)) == []
    assert bench.reason == "limit"
    bench.become("gone", "g-2")
    assert deployed(bench.tick(80)) == ["g-3"]


def test_the_budget_bounds_all_models_together() -> None:
    bench = a_bench(a_group("a", model="m"), a_group("b", model="n"), budget=3.0)
    bench.say(demand(16, model="n"))
    assert deployed(bench.tick(16)) == ["a-0", "a-1", "b-0"]
    plan = bench.agent.last_plan("n")
    assert plan is not None
    assert plan.reason == "grow"
    bench.tick(16)
    plan = bench.agent.last_plan("n")
    assert plan is not None
    assert plan.reason == "limit"


def test_the_best_price_for_a_call_comes_first_and_the_next_group_when_it_is_full() -> None:
    dear, cheap = a_group("dear", profile=a_profile(cost_weight=3.0)), a_group("cheap", limit=2)
    bench = a_bench(dear, cheap)
    assert deployed(bench.tick(32)) == ["cheap-0", "cheap-1", "dear-0", "dear-1"]


def test_a_slow_device_counts_for_less() -> None:
    fast, slow = a_group("fast", limit=1, max_replicas=4), a_group("slow", profile=SLOW)
    bench = a_bench(fast, slow)
    bench.tick(8)
    assert deployed(bench.tick(16)) == ["slow-0", "slow-1"]
    bench.tick(16)
    assert bench.agent.last_plan("m").have == pytest.approx(2.0)  # type: ignore[union-attr]


def test_what_starts_goes_first_then_the_worst_price_then_the_youngest() -> None:
    bench = a_bench(a_group("cheap", limit=2), a_group("dear", profile=a_profile(cost_weight=3.0)))
    bench.become("ready", *deployed(bench.tick(24)))
    bench.say(ScaleRequested(model="m", replicas=4, hold_s=100.0))
    bench.tick()
    assert bench.agent._models["m"].supply.count() == 4
    actions = bench.say(ScaleRequested(model="m", replicas=1, hold_s=100.0))
    assert actions == [
        Drain(replica_id="dear-1", deadline_at_s=bench.now_s),
        Drain(replica_id="dear-0", deadline_at_s=bench.now_s + 60.0),
        Drain(replica_id="cheap-1", deadline_at_s=bench.now_s + 60.0),
    ]


def test_a_replica_of_somebody_else_is_capacity_and_never_drained() -> None:
    bench = a_bench()
    bench.say(changed("theirs-0"), changed("theirs-1"))
    assert bench.tick(16) == []
    assert deployed(bench.tick(24)) == ["g-0"]
    bench.become("ready", "g-0")
    assert drained(bench.tick(0)) == ["g-0"]
    bench.become("gone", "g-0")
    assert bench.tick(0) == []


def test_ids_go_on_above_those_that_are_known() -> None:
    bench = a_bench()
    bench.say(of_group("g-6", "ready", a_group(model="other")), changed("g-x"), changed("g-"))
    assert deployed(bench.tick(24)) == ["g-7"]


def test_growth_waits_for_its_cooldown_but_the_least_number_and_a_loss_do_not() -> None:
    bench = a_bench(a_group(min_replicas=1), up_cooldown_s=10.0)
    bench.become("ready", *deployed(bench.tick(8)))
    assert bench.tick(16) == []
    assert bench.reason == "cooldown"
    assert deployed(bench.tick(16, after_s=10.0)) == ["g-1"]
    bench.become("ready", "g-1")
    assert deployed(bench.become("gone", "g-1")) == ["g-2"]
    bench.become("ready", "g-2")
    bench.become("draining", "g-0", "g-2")
    assert deployed(bench.tick(16)) == ["g-3"]


def test_a_small_change_is_not_worth_a_start() -> None:
    bench = a_bench_with(5, threshold=0.1)
    assert bench.tick(43) == []
    assert bench.reason == "threshold"
    assert deployed(bench.tick(45)) == ["g-5"]


def test_a_whole_replica_is_worth_a_start_however_many_there_are() -> None:
    bench = a_bench_with(20, a_group(limit=50, max_replicas=50), threshold=0.1)
    assert deployed(bench.tick(167)) == []
    assert deployed(bench.tick(168)) == ["g-20"]


def test_somebody_elses_replica_that_never_answers_is_no_capacity() -> None:
    bench = a_bench(a_group(min_replicas=1))
    bench.say(ReplicaChanged(replica=a_replica("fixed"), state="starting"))
    assert deployed(bench.tick(0)) == []  # it may still come
    started = [replica_id for _ in range(30) for replica_id in deployed(bench.tick(0))]
    assert started == ["g-0"]
    bench.say(ReplicaChanged(replica=a_replica("fixed"), state="ready"))
    assert bench.agent._models["m"].supply.count() == 2


def test_a_drain_that_nobody_heeds_is_asked_for_again() -> None:
    bench = a_bench_with(2)
    assert drained(bench.tick(8)) == ["g-1"]
    again = [(bench.now_s, drained(bench.tick(8))) for _ in range(10)]
    assert [ids for _, ids in again if ids] == [["g-1"]]
    bench.become("draining", "g-1")
    assert all(not drained(bench.tick(8)) for _ in range(20))


def test_a_replica_goes_only_when_nobody_missed_it_for_the_whole_cooldown() -> None:
    bench = a_bench_with(3, down_cooldown_s=60.0)
    ended = [(bench.now_s, drained(bench.tick(24 if bench.now_s < 40.0 else 8))) for _ in range(52)]
    first = next(at_s for at_s, ids in ended if ids)
    assert [ids for _, ids in ended if ids] == [["g-2", "g-1"]]
    assert 98.0 <= first <= 104.0


def test_a_lull_that_is_shorter_than_the_cooldown_ends_nobody() -> None:
    bench = a_bench_with(3, down_cooldown_s=20.0)
    assert not any(drained(bench.tick(24 if tick % 8 == 0 else 0)) for tick in range(80))


def test_nobody_goes_while_somebody_starts() -> None:
    bench = a_bench()
    bench.tick(24)
    bench.become("ready", "g-0", "g-1")
    assert drained(bench.tick(0)) == []
    assert bench.reason == "cooldown"
    bench.become("ready", "g-2")
    assert len(drained(bench.tick(0))) == 3


def test_an_order_overrules_the_policy_at_once_and_ends_after_its_time() -> None:
    bench = a_bench_with(1, up_cooldown_s=100.0, threshold=0.9)
    assert len(deployed(bench.say(ScaleRequested(model="m", replicas=3, hold_s=20.0)))) == 2
    assert bench.reason == "requested"
    bench.become("ready", "g-1", "g-2")
    assert [bench.tick(8) for _ in range(9)] == [[]] * 9
    assert bench.reason == "requested"
    assert sorted(drained(bench.tick(8))) == ["g-1", "g-2"]
    assert bench.reason == "shrink"


def test_an_order_stays_within_the_bounds() -> None:
    bench = a_bench_with(2, a_group(min_replicas=1, max_replicas=4))
    assert len(deployed(bench.say(ScaleRequested(model="m", replicas=100, hold_s=100.0)))) == 2
    assert bench.agent.last_plan("m").target == 4  # type: ignore[union-attr]
    assert len(drained(bench.say(ScaleRequested(model="m", replicas=0, hold_s=100.0)))) == 3


def test_new_bounds_hold_at_once() -> None:
    bench = a_bench_with(2, down_cooldown_s=600.0)
    assert len(deployed(bench.say(BoundsChanged(model="m", min_replicas=4, max_replicas=5)))) == 2
    assert len(drained(bench.say(BoundsChanged(model="m", min_replicas=0, max_replicas=1)))) == 3


@pytest.mark.parametrize(
    ("asked", "got"), [((2, 100), (2, 8, 8)), ((9, 4), (4, 4, 8)), ((-1, -5), (0, 0, 8)), ((1, 3), (1, 3, 8))]
)
def test_bounds_stay_between_zero_and_the_limit(asked: tuple[int, int], got: tuple[int, int, int]) -> None:
    bench = a_bench()
    bench.say(BoundsChanged(model="m", min_replicas=asked[0], max_replicas=asked[1]))
    assert bench.agent.bounds("m") == got


def test_a_model_that_cannot_be_scaled_is_none_of_its_business() -> None:
    bench = a_bench()
    messages = (
        BoundsChanged(model="n", min_replicas=1, max_replicas=2),
        ScaleRequested(model="n", replicas=3, hold_s=9.0),
        demand(99, model="n"),
        changed("r", model="n"),
    )
    assert bench.say(*messages) == []
    assert bench.agent.models == ("m",)
    assert bench.agent.bounds("n") is bench.agent.startup_s("n") is bench.agent.last_plan("n") is None


def test_a_replica_that_never_becomes_ready_is_given_up_and_its_group_waits() -> None:
    bench = a_bench(a_group(limit=1, start_s=10.0), start_patience=4.0, start_floor_s=5.0)
    assert deployed(bench.tick(8)) == ["g-0"]
    bench.become("starting", "g-0")
    said = [(bench.now_s, bench.tick(8)) for _ in range(21)]
    assert said[-1] == (
        42.0,
        [
            Drain(replica_id="g-0", deadline_at_s=44.0),
            AlertRaised(kind="replica_failed", subject="g-0", value=42.0),
        ],
    )
    assert not any(outputs for _, outputs in said[:-1])
    bench.become("gone", "g-0")
    assert bench.reason == "backoff"
    assert deployed(bench.tick(8)) == ["g-1"]


def test_a_replica_that_was_given_up_is_not_drained_again_at_once_when_it_comes_after_all() -> None:
    bench = a_bench(a_group(limit=1, start_s=10.0), start_patience=4.0, start_floor_s=5.0)
    bench.tick(8)
    bench.become("starting", "g-0")
    while not drained(bench.tick(8)):
        pass
    bench.become("ready", "g-0")
    assert not drained(bench.tick(8))


def test_the_wait_doubles_with_each_failure_in_a_row_up_to_its_most() -> None:
    bench = a_bench(a_group(limit=1), backoff_most_s=30.0)
    tries = []
    for _ in range(200):
        if started := deployed(bench.tick(8)):
            tries.append(bench.now_s)
            bench.become("starting", *started)
            bench.become("gone", *started)
    gaps = [later - earlier for earlier, later in pairwise(tries)]
    assert gaps[:6] == [2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_a_success_ends_the_wait() -> None:
    bench = a_bench(a_group(limit=1))
    for _ in range(3):
        bench.become("gone", *deployed(bench.tick(8, after_s=100.0)))
    bench.become("ready", *deployed(bench.tick(8, after_s=100.0)))
    bench.become("gone", "g-3")
    assert bench.agent._models["m"].supply.held["g-4"].state == "starting"
    bench.become("gone", "g-4")
    assert deployed(bench.tick(8)) == ["g-5"]


def test_another_group_stands_in_for_one_that_fails() -> None:
    bench = a_bench(a_group("a"), a_group("b", profile=a_profile(cost_weight=2.0)))
    assert deployed(bench.tick(8)) == ["a-0"]
    bench.become("gone", "a-0")
    assert deployed(bench.tick(8, after_s=1.0)) == ["b-0"]


def test_an_end_that_was_wished_is_no_failure() -> None:
    bench = a_bench()
    bench.tick(16)
    bench.say(ScaleRequested(model="m", replicas=1, hold_s=1.0))
    bench.become("draining", "g-1")
    bench.become("gone", "g-1")
    assert deployed(bench.tick(16)) == ["g-2"]


def test_a_start_that_nobody_began_does_not_take_up_room_for_ever() -> None:
    bench = a_bench(a_group(limit=1), start_floor_s=1.0, start_patience=0.1)
    assert deployed(bench.tick(8)) == ["g-0"]
    assert drained(bench.tick(8)) == ["g-0"]
    assert deployed(bench.tick(8)) == ["g-1"]


def test_a_sudden_loss_is_made_up_for_at_once() -> None:
    bench = a_bench_with(2, up_cooldown_s=100.0)
    assert deployed(bench.become("gone", "g-0")) == ["g-2"]


def noticed(replica_id: str, at_s: float | None) -> DrainNoticed:
    return DrainNoticed(replica_id=replica_id, deadline_at_s=at_s)


def test_a_notice_starts_a_stand_in_at_once_and_the_replica_goes_when_that_is_up() -> None:
    bench = a_bench(a_group(limit=2), drain_s=10.0, up_cooldown_s=1000.0)
    bench.tick(16)
    bench.become("ready", "g-0", "g-1")
    assert deployed(bench.say(noticed("g-0", 300.0))) == ["g-2"]  # beyond the limit: one of three is to go
    assert bench.tick(16) == []
    bench.become("ready", "g-2")
    [drain] = bench.tick(16)
    assert (drain.replica_id, drain.deadline_at_s) == ("g-0", bench.now_s + 10.0)
    assert bench.become("gone", "g-0") == []
    assert bench.tick(16) == []


def test_a_replica_whose_time_is_short_goes_at_once_and_is_gone_by_its_deadline() -> None:
    bench = a_bench(drain_s=10.0)
    bench.tick(16)
    bench.become("ready", "g-0", "g-1")
    said = bench.say(noticed("g-0", bench.now_s + 7.0))
    assert deployed(said) == ["g-2"]
    assert [(d.replica_id, d.deadline_at_s) for d in said if isinstance(d, Drain)] == [("g-0", bench.now_s + 7.0)]


def test_a_replica_serves_until_its_time_is_short_when_nothing_stands_in_for_it() -> None:
    bench = a_bench(drain_s=10.0)
    bench.tick(16)
    bench.become("ready", "g-0", "g-1")
    bench.say(noticed("g-0", bench.now_s + 30.0))
    bench.become("gone", "g-2")  # the start failed
    assert drained(bench.tick(16, after_s=15.0)) == []
    assert drained(bench.tick(16, after_s=6.0)) == ["g-0"]


def test_a_start_on_a_machine_that_is_to_go_is_called_off() -> None:
    bench = a_bench()
    bench.tick(8)
    bench.become("starting", "g-0")
    said = bench.say(noticed("g-0", None))
    assert (deployed(said), drained(said)) == (["g-1"], ["g-0"])


def test_a_notice_of_nobody_or_of_somebody_elses_replica_drains_nothing() -> None:
    bench = a_bench()
    assert bench.say(noticed("unknown", 5.0)) == []
    bench.tick(8)
    bench.become("ready", "g-0")
    other = of_group("theirs", "ready", a_group())
    bench.say(other, noticed("theirs", 5.0))
    assert drained(bench.tick(8, after_s=10.0)) == []


def test_one_that_an_earlier_life_started_is_ours_from_the_first_plan_on() -> None:
    bench = a_bench(a_group(min_replicas=1))
    adopted = replace(of_group("g-4", "starting", a_group()), group_id="g")
    assert bench.say(adopted) == []
    assert bench.tick() == []
    bench.become("ready", "g-4")
    assert bench.agent.startup_s("m") == 10.0  # that it answers at once is no start
    assert deployed(bench.tick(16)) == ["g-5"]
    bench.become("ready", "g-5")
    bench.say(BoundsChanged(model="m", min_replicas=0, max_replicas=0))
    assert set(drained(bench.outputs)) == {"g-4", "g-5"}


def test_one_that_was_adopted_and_never_answers_is_given_up() -> None:
    bench = a_bench(start_floor_s=30.0, start_patience=2.0)
    bench.say(replace(of_group("g-0", "starting", a_group()), group_id="g"))
    assert drained(bench.tick(0, after_s=1.0)) == []
    assert drained(bench.tick(8, after_s=40.0)) == ["g-0"]


def test_one_of_ours_that_comes_back_is_still_ours() -> None:
    bench = a_bench_with(1)
    bench.become("gone", "g-0")
    bench.become("ready", "g-0", "g-1")
    assert drained(bench.tick(0)) == ["g-0", "g-1"]


def test_a_replica_that_is_told_to_go_does_not_count_again_when_it_says_that_it_is_ready() -> None:
    bench = a_bench()
    bench.tick(16)
    bench.say(ScaleRequested(model="m", replicas=1, hold_s=100.0))
    bench.become("ready", "g-0", "g-1")
    assert bench.agent._models["m"].supply.count() == 1


def test_the_horizon_is_the_start_up_time_that_was_seen_and_one_interval() -> None:
    bench = a_bench(a_group(start_s=10.0))
    bench.tick(8)
    assert bench.agent.startup_s("m") == 10.0
    assert bench.agent.last_plan("m").horizon_s == 12.0  # type: ignore[union-attr]
    bench.become("starting", "g-0")
    bench.now_s += 30.0
    bench.become("ready", "g-0")
    assert bench.agent.startup_s("m") == 30.0
    bench.tick(8)
    assert bench.agent.last_plan("m").horizon_s == 32.0  # type: ignore[union-attr]


def test_what_an_earlier_life_learned_about_starts_is_believed() -> None:
    seen = [float(n) for n in range(1, 11)]
    assert a_bench(startups={"g": seen}).agent.startup_s("m") == 9.0
    assert a_bench(startups={"g": [99.0] * 20 + [5.0] * 20}).agent.startup_s("m") == 5.0


def test_reports_of_several_routers_add_up_and_old_ones_go() -> None:
    bench = a_bench()
    bench.say(demand(8))
    bench.now_s = 1.0
    bench.say(demand(8))
    assert len(deployed(bench.say(PLAN))) == 2
    bench.now_s = 2.0
    bench.say(demand(16))
    bench.now_s = 3.0
    bench.say(demand(16), PLAN)
    assert bench.agent._models["m"].reports.in_flight == 32


def test_the_last_report_holds_until_the_next() -> None:
    bench = a_bench_with(2)
    assert [bench.tick() for _ in range(50)] == [[]] * 50


def test_the_policy_can_be_changed_and_an_unknown_one_cannot() -> None:
    bench = a_bench_with(3)
    assert bench.say(ScalingPolicyChanged(policy="psychic", parameters={})) == [
        AlertRaised(kind="policy_failed", subject="psychic")
    ]
    wrong = ScalingPolicyChanged(policy="target_tracking", parameters={"target_in_flight": 0.0})
    assert bench.say(wrong) == [AlertRaised(kind="policy_failed", subject="target_tracking")]
    assert bench.agent.parameters == {"target_in_flight": 8.0}
    bench.say(ScalingPolicyChanged(policy="static", parameters={}))
    assert bench.tick(0) == []
    assert (bench.agent.policy.name, bench.agent.parameters) == ("static", {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """A policy that answers this many replicas, or raises."""

    answer: float | None
    name: ClassVar[str] = "broken"

    def target(self, view: ScaleView) -> Target:
        if self.answer is None:
            raise RuntimeError("out of ideas")
        return Target(replicas=self.answer)


@pytest.mark.parametrize("answer", [None, float("nan"), float("inf"), -1.0])
def test_a_policy_that_fails_is_overruled_by_name_and_changes_nothing(answer: float | None) -> None:
    bench = a_bench_with(2)
    bench.agent.policy = Broken(answer=answer)
    said = [bench.tick(80) for _ in range(20)]
    assert [len(outputs) for outputs in said] == [1, *[0] * 14, 1, *[0] * 4]
    assert said[0] == [AlertRaised(kind="policy_failed", subject="broken")]


@given(calls=st.integers(0, 200), start_s=st.floats(0.0, 30.0), policy=st.sampled_from(list(SCALING_POLICIES)))
@settings(max_examples=60, deadline=None)
def test_constant_demand_settles(calls: int, start_s: float, policy: str) -> None:
    groups = (a_group(start_s=start_s, min_replicas=1), a_group("dear", profile=SLOW))
    agent = ScalerAgent(ScalerSettings(groups=groups, policy=policy, down_cooldown_s=10.0))
    journal, world = MemoryJournal(), SlowStarts(groups, [start_s])
    shell = VirtualShell(Switchboard([agent], epoch=1, journal=journal), world)
    shell.post(PLAN)
    for tick in range(120):
        shell.post(demand(calls), at_s=2.0 * tick)
    shell.run(until_s=240.0)
    actions = [(e.at_s, o) for e in journal.entries for o in e.answered if isinstance(o, Deploy | Drain)]
    assert len(actions) <= 16
    assert not [at_s for at_s, _ in actions if at_s > 120.0]


def test_the_settings_of_a_journal_rebuild_the_agent() -> None:
    agent_settings = ScalerSettings(groups=(a_group(),), budget=3.0, startups={"g": [4.0]})
    config = msgspec.json.decode(msgspec.json.encode(msgspec.to_builtins(agent_settings)))
    assert ScalerAgent.from_config(config).settings == agent_settings


GROUPS = (
    a_group("a", min_replicas=1, max_replicas=3, limit=4),
    a_group("b", profile=SLOW, max_replicas=2, limit=2),
    a_group("c", model="n", profile=a_profile(cost_weight=2.0), max_replicas=3, limit=3),
)
BY_ID = {group.group_id: group for group in GROUPS}


class AnyOrder(RuleBasedStateMachine):
    """Any order of messages; a bookkeeper beside the scaler checks each step."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.agent = ScalerAgent(
            ScalerSettings(groups=GROUPS, budget=6.0, start_floor_s=5.0, start_patience=1.0, down_cooldown_s=4.0)
        )
        self.ours: dict[str, str] = {}  # all that exist, with their state
        self.used: set[str] = set()
        self.leaving: set[str] = set()
        self.drained: dict[str, float] = {}
        self.fixed: dict[str, str] = {}
        self.failing: dict[str, tuple[int, float]] = {}  # group -> failures in a row, since when

    def say(self, *messages: Any) -> None:
        for message in messages:
            self.check(self.agent.handle(message, self.now_s))

    def count(self, model: str) -> int:
        own = [i for i, s in self.ours.items() if s in ("unheard", "starting", "ready") and i not in self.leaving]
        fixed = [i for i, s in self.fixed.items() if s in ("starting", "ready")]
        return sum(BY_ID[i[0]].model == model for i in own) + (len(fixed) if model == "m" else 0)

    def held(self) -> set[str]:
        return {i for m in ("m", "n") for i, h in self.agent._models[m].supply.held.items() if h.group is not None}

    def check(self, outputs: Any) -> None:
        self.leaving |= {output.replica_id for output in outputs if isinstance(output, Drain)}
        for replica_id in self.ours.keys() - self.held():
            assert self.ours.pop(replica_id) == "unheard", "forgets what is there"
            assert replica_id in self.leaving, "forgets what it wants"
        for output in outputs:
            if isinstance(output, AlertRaised) and output.kind == "replica_failed":
                self.fail(output.subject)
            if isinstance(output, Drain):
                assert output.replica_id in self.used, "drains what is not ours"
                assert self.now_s > self.drained.get(output.replica_id, -11.0) + 10.0, "drains twice within a moment"
                self.drained[output.replica_id] = self.now_s
            if isinstance(output, Deploy):
                group = BY_ID[output.group_id]
                failures, since_s = self.failing.get(output.group_id, (0, 0.0))
                assert not failures or self.now_s >= since_s + min(300.0, 2.0**failures), "does not wait"
                assert output.replica_id not in self.used | self.fixed.keys(), "uses an id twice"
                self.used.add(output.replica_id)
                self.ours[output.replica_id] = "unheard"
                assert sum(i[0] == output.group_id for i in self.ours) <= group.limit
                assert sum(BY_ID[i[0]].profile.cost_weight for i in self.ours) <= 6.0
                bounds = self.agent.bounds(group.model)
                assert bounds is not None
                assert self.count(group.model) <= bounds.max_replicas
            if isinstance(output, ScalePlanned):
                plan = output.plan
                assert plan.min_replicas <= plan.target <= plan.max_replicas
                assert not (plan.deploys and plan.drains)

    def fail(self, replica_id: str) -> None:
        failures, _ = self.failing.get(replica_id[0], (0, 0.0))
        self.failing[replica_id[0]] = (failures + 1, self.now_s)

    @rule(by_s=st.floats(0.0, 10.0))
    def a_plan_is_due(self, by_s: float) -> None:
        self.now_s += by_s
        self.say(PLAN)

    @rule(calls=st.integers(0, 100), model=st.sampled_from(["m", "n", "unknown"]), more=st.floats(0.0, 100.0))
    def a_router_reports(self, calls: int, model: str, more: float) -> None:
        self.say(demand(calls, model=model, fresh_mean=tuple(more * h for h in HORIZONS_S)))

    @rule(data=st.data(), state=st.sampled_from(["starting", "ready", "ready", "cordoned", "draining", "gone"]))
    def a_replica_changes(self, data: st.DataObject, state: Any) -> None:
        if not self.ours:
            return
        replica_id = data.draw(st.sampled_from(sorted(self.ours)))
        before = self.ours[replica_id]
        if state == "starting" and before != "unheard":
            return
        if state == "gone":
            del self.ours[replica_id]
            if before in ("unheard", "starting") and replica_id not in self.leaving:
                self.fail(replica_id)
            self.leaving.discard(replica_id)
        else:
            self.ours[replica_id] = state
            if state == "ready" and before in ("unheard", "starting") and replica_id not in self.leaving:
                self.failing.pop(replica_id[0], None)
        self.say(of_group(replica_id, state, BY_ID[replica_id[0]]))

    @rule(name=st.sampled_from(["a-3", "x-1"]), state=st.sampled_from(["ready", "cordoned", "gone"]))
    def somebody_elses_replica_changes(self, name: str, state: Any) -> None:
        if name in self.used:
            return
        self.fixed[name] = state
        self.say(changed(name, state))

    @rule(model=st.sampled_from(["m", "n"]), replicas=st.integers(-1, 20), hold_s=st.floats(0.0, 20.0))
    def somebody_orders(self, model: str, replicas: int, hold_s: float) -> None:
        self.say(ScaleRequested(model=model, replicas=replicas, hold_s=hold_s))

    @rule(model=st.sampled_from(["m", "n"]), least=st.integers(-1, 9), most=st.integers(-1, 9))
    def bounds_change(self, model: str, least: int, most: int) -> None:
        self.say(BoundsChanged(model=model, min_replicas=least, max_replicas=most))

    @rule(policy=st.sampled_from([*SCALING_POLICIES, "psychic"]))
    def the_policy_changes(self, policy: str) -> None:
        self.say(ScalingPolicyChanged(policy=policy, parameters={}))

    @rule(key=st.sampled_from(["demand", "", "answer:c"]))
    def another_timer_fires(self, key: str) -> None:
        assert self.agent.handle(TimerFired(key=key), self.now_s) == ()

    @invariant()
    def the_books_agree(self) -> None:
        assert self.held() == self.ours.keys()


TestAnyOrderOfMessages = AnyOrder.TestCase
TestAnyOrderOfMessages.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def flash_crowd(policy: str) -> list[tuple[float, str]]:
    """Twenty workflows teach their shape: a call of another model, then four calls of "m". Then sixty come at once."""
    group = a_group(start_s=10.0, max_replicas=8)
    scaler = ScalerAgent(
        ScalerSettings(
            groups=(group,), policy=policy, parameters={} if policy == "static" else {"target_in_flight": 8.0}
        )
    )
    world = SlowStarts([group], [10.0])
    switchboard = Switchboard([RouterAgent(RouterSettings(models=["m"])), scaler], epoch=1, journal=MemoryJournal())
    shell = VirtualShell(switchboard, world)
    shell.post(changed("front", model="front"))
    shell.post(changed("fixed"))
    shell.post(PLAN)
    starts_s = [*(10.0 * n for n in range(20)), *[400.0 + 0.01 * n for n in range(60)]]
    for number, at_s in enumerate(starts_s):
        workflow_id = f"w{number}"
        shell.post(WorkflowSubmitted(workflow_id=workflow_id, kind="report"), at_s=at_s)
        for step, (offset_s, model) in enumerate([(0.0, "front"), *((15.0, "m") for _ in range(4))]):
            call = msgspec.structs.replace(a_call(f"c{number}-{step}", model=model), workflow_id=workflow_id)
            shell.post(CallReady(call=call, forecast=FORECAST), at_s=at_s + offset_s)
        shell.post(WorkflowEnded(workflow_id=workflow_id, state="finished"), at_s=at_s + 20.0)
    shell.run(until_s=450.0)
    assert switchboard.faults == 0
    return [deploy for deploy in world.deploys if deploy[0] >= 400.0]


def test_the_forecast_starts_replicas_before_the_calls_of_a_flash_crowd_are_there() -> None:
    forecast, tracking = flash_crowd("demand_forecast"), flash_crowd("target_tracking")
    assert flash_crowd("static") == []
    assert forecast[0][0] <= 405.0
    assert tracking[0][0] >= 415.0


def test_a_message_that_it_does_not_listen_to_is_ignored() -> None:
    assert a_bench().agent.handle(WorkflowSubmitted(workflow_id="w", kind="k"), 0.0) == ()
    assert ReplicaChanged in ScalerAgent.listens
