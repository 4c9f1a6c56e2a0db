"""The scaler: how many replicas each model gets, from which group, within bounds, budget and cooldowns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import msgspec
import pytest

from swarmx.agents.scaler import ScalerAgent, ScalerSettings
from swarmx.core.actions import Deploy, Drain, StartTimer
from swarmx.core.messages import (
    AlertRaised,
    BoundsChanged,
    ReplicaChanged,
    ScaleRequested,
    ScalingPolicyChanged,
    WorkflowSubmitted,
)
from swarmx.core.scaling import ScaleView, Target
from tests.agents.scaling_worlds import PLAN, SLOW, a_bench, a_bench_with, a_group, demand, deployed, drained, of_group
from tests.agents.worlds import a_profile, a_replica, changed


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


def test_the_settings_of_a_journal_rebuild_the_agent() -> None:
    agent_settings = ScalerSettings(groups=(a_group(),), budget=3.0, startups={"g": [4.0]})
    config = msgspec.json.decode(msgspec.json.encode(msgspec.to_builtins(agent_settings)))
    assert ScalerAgent.from_config(config).settings == agent_settings


def test_a_message_that_it_does_not_listen_to_is_ignored() -> None:
    assert a_bench().agent.handle(WorkflowSubmitted(workflow_id="w", kind="k"), 0.0) == ()
    assert ReplicaChanged in ScalerAgent.listens
