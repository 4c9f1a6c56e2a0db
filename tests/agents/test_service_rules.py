"""The router's rules of service: tenants, budgets, priorities, deadlines, overload; and policies that hold for ever."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmx.agents.policies import POLICIES
from swarmx.agents.router import RouterAgent
from swarmx.agents.router_settings import RouterSettings, TenantSettings
from swarmx.core.actions import Dispatch, Refuse, StartTimer, StopTimer
from swarmx.core.fleet import CallView, Choice, FleetView, Order
from swarmx.core.forecast import point
from swarmx.core.messages import CallCancelled, CallFinished, FirstToken, SignalReported, TimerFired, TokensProgressed
from swarmx.runtime.journal import MemoryJournal
from swarmx.runtime.switchboard import Switchboard
from swarmx.runtime.virtual import VirtualShell
from tests.agents.worlds import IMPATIENT, ChaosWorld, Referee, a_profile, changed, dispatches, failed, finished, ready

HUNDRED = point(100.0, unit="tokens")


def a_router(*, slots: int = 1, policy: str = "round_robin", **more: Any) -> RouterAgent:
    """One replica with so many slots."""
    agent = RouterAgent(RouterSettings(**{"policy": policy, "demand_every_s": 0.0, **more}))
    agent.handle(changed("r0", profile=a_profile(max_batch=slots)), 0.0)
    return agent


def served(agent: RouterAgent, rounds: int, *, work_done: float = 100.0, at_s: float = 1.0) -> list[str]:
    """Who gets the one slot, round after round, when the calls that have it end; its first holder is `c0`."""
    order, running = list[str](), "c0"
    for number in range(rounds):
        outputs = agent.handle(finished(running, work_done=work_done), at_s + number)
        agent.validate()
        running = next(o.call_id for o in outputs if isinstance(o, Dispatch))
        order.append(running)
    return order


def sent(outputs: Any) -> list[str]:
    return [output.call_id for output in outputs if isinstance(output, Dispatch)]


def refusals(outputs: Any) -> list[Refuse]:
    return [output for output in outputs if isinstance(output, Refuse)]


def test_a_tenant_that_floods_does_not_keep_another_one_waiting() -> None:
    agent = a_router()
    for number in range(20):
        agent.handle(ready(f"c{number}", tenant="flood", forecast=HUNDRED), 0.0)
    for number in range(3):
        agent.handle(ready(f"b{number}", tenant="small", forecast=HUNDRED), 0.5)
    assert served(agent, 6) == ["c1", "b0", "c2", "b1", "c3", "b2"]


def test_tenants_are_served_in_proportion_to_their_weights() -> None:
    agent = a_router(tenants={"a": TenantSettings(weight=2.0), "b": TenantSettings()})
    for number in range(60):
        agent.handle(ready(f"c{number}", tenant="a", forecast=HUNDRED), 0.0)
        agent.handle(ready(f"d{number}", tenant="b", forecast=HUNDRED), 0.0)
    assert sum(call_id.startswith("c") for call_id in served(agent, 60)) == 40


def test_what_counts_is_what_the_calls_came_to_and_not_what_was_expected() -> None:
    agent = a_router()
    running, worked = "c0", {"a": 0.0, "b": 0.0}
    for number in range(200):
        agent.handle(ready(f"c{number}", tenant="a", forecast=HUNDRED, prompt_tokens=0), 0.0)
        agent.handle(ready(f"d{number}", tenant="b", forecast=HUNDRED, prompt_tokens=0), 0.0)
    for number in range(150):  # the calls of "a" come to three times what was expected of them
        tenant = "a" if running.startswith("c") else "b"
        work = 300.0 if tenant == "a" else 100.0
        worked[tenant] += work
        message = CallFinished(call_id=running, attempt=1, prompt_tokens=0, cached_tokens=0, work_done=work)
        running = next(o.call_id for o in agent.handle(message, float(number)) if isinstance(o, Dispatch))
    assert worked["a"] / worked["b"] == pytest.approx(1.0, abs=0.1)


def test_cached_prompt_tokens_are_no_service() -> None:
    agent = a_router()
    for tenant in ("a", "b"):
        for number in range(50):
            agent.handle(ready(f"{tenant}{number}", tenant=tenant, forecast=HUNDRED, prompt_tokens=1000), 0.0)
    running, count = "a0", {"a": 0, "b": 0}
    for number in range(60):
        cached = 1000 if running.startswith("a") else 0
        message = CallFinished(call_id=running, attempt=1, prompt_tokens=1000, cached_tokens=cached, work_done=100.0)
        running = next(o.call_id for o in agent.handle(message, float(number)) if isinstance(o, Dispatch))
        count[running[0]] += 1
    assert count["a"] > 3 * count["b"]


def test_a_failed_attempt_counts_for_its_prompt() -> None:
    agent = a_router(max_attempts=1, breaker_failures=1000)
    for number in range(30):
        agent.handle(ready(f"c{number}", tenant="unlucky", forecast=HUNDRED), 0.0)
        agent.handle(ready(f"d{number}", tenant="lucky", forecast=HUNDRED), 0.0)
    running, order = "c0", list[str]()
    for number in range(20):
        message = failed(running) if running.startswith("c") else finished(running)
        running = next(o.call_id for o in agent.handle(message, float(number)) if isinstance(o, Dispatch))
        order.append(running[0])
    assert order.count("c") == 3 * order.count("d")


@pytest.mark.parametrize("policy", POLICIES)
def test_with_one_tenant_and_one_priority_nothing_changes(policy: str) -> None:
    def run(**more: Any) -> list[Any]:
        agent = a_router(slots=2, policy=policy, **more)
        agent.handle(changed("r1", profile=a_profile(speed=3.0, max_batch=2)), 0.0)
        said = list[Any]()
        for number in range(30):
            said += agent.handle(ready(f"c{number}"), 0.1 * number)
        for number in range(200):
            running = [o.call_id for o in said if isinstance(o, Dispatch)]
            if number < len(running):
                said += agent.handle(finished(running[number]), 5.0 + 3.0 * number)
        return [(o.call_id, o.replica_id) for o in said if isinstance(o, Dispatch)]

    assert len(run()) == 30
    assert run() == run(tenants={"t": TenantSettings(weight=0.1)}, priority_age_s=0.5)


def test_an_urgent_call_overtakes_those_that_wait() -> None:
    agent = a_router(tenants={"t": TenantSettings(priority=5)})
    for call_id, priority in (("c0", 0), ("low", -1), ("usual", 0), ("high", 5)):
        agent.handle(ready(call_id, priority=priority), 0.0)
    assert served(agent, 3) == ["high", "usual", "low"]


def test_a_priority_above_what_the_tenant_may_have_is_cut_to_it() -> None:
    agent = a_router(tenants={"boss": TenantSettings(priority=1)})
    for call_id, tenant, priority in (("c0", "t", 0), ("a", "t", 10), ("b", "boss", 10), ("d", "t", 0)):
        agent.handle(ready(call_id, tenant=tenant, priority=priority), 0.0)
    assert served(agent, 3) == ["b", "a", "d"]


def test_a_call_of_low_priority_that_has_waited_long_goes_with_the_urgent_ones() -> None:
    agent = a_router(tenants={"t": TenantSettings(priority=2)}, priority_age_s=30.0)
    agent.handle(ready("c0"), 0.0)
    agent.handle(ready("old"), 1.0)
    agent.handle(ready("urgent", priority=2), 59.0)
    assert served(agent, 1, at_s=62.0) == ["old"]


def test_a_call_that_comes_while_others_are_held_back_waits_for_its_turn() -> None:
    agent = a_router(slots=2)
    agent.objective.policy = Holds()
    agent.handle(ready("c0", tenant="a"), 0.0)
    agent.handle(ready("c1", tenant="a"), 0.0)
    agent.objective.policy = Never()
    assert sent(agent.handle(ready("b0", tenant="b"), 1.0)) == ["c1"]
    assert sent(agent.handle(finished("c1"), 2.0)) == ["b0"]


def test_a_tenant_over_its_budget_is_told_when_to_come_back() -> None:
    agent = a_router(slots=99, tenants={"t": TenantSettings(tokens_per_minute=600.0)})
    for number in range(3):  # 100 of the prompt and 100 of the answer
        assert dispatches(agent.handle(ready(f"c{number}", forecast=HUNDRED), 0.0)) == ["r0"]
    (refusal,) = refusals(agent.handle(ready("over", forecast=HUNDRED), 0.0))
    assert (refusal.reason, refusal.attempts, refusal.retry_after_s) == ("budget", 0, pytest.approx(20.0))
    assert "may use 600 tokens a minute, 600 of them are used" in refusal.detail
    assert dispatches(agent.handle(ready("other", tenant="u", forecast=HUNDRED), 0.0)) == ["r0"]
    assert dispatches(agent.handle(ready("over", forecast=HUNDRED), 20.0)) == ["r0"]


@pytest.mark.parametrize(
    ("ending", "left"),
    [
        ([CallFinished(call_id="c", attempt=1, prompt_tokens=40, cached_tokens=30, work_done=10.0)], 550.0),
        ([failed("c", retryable=False)], 600.0),
        ([CallCancelled(call_id="c")], 400.0),
        ([FirstToken(call_id="c", attempt=1), CallCancelled(call_id="c")], 500.0),
        (
            [
                FirstToken(call_id="c", attempt=1),
                TokensProgressed(call_id="c", attempt=1, work_done=7.0),
                failed("c", retryable=False),
            ],
            493.0,
        ),
    ],
    ids=["finished", "failed", "cancelled", "cancelled while it streamed", "broken while it streamed"],
)
def test_a_budget_is_corrected_when_a_call_has_ended(ending: list[Any], left: float) -> None:
    agent = a_router(slots=99, tenants={"t": TenantSettings(tokens_per_minute=700.0)}, breaker_failures=99)
    agent.handle(ready("still there", forecast=point(0.0, unit="tokens")), 0.0)
    agent.handle(ready("c", forecast=HUNDRED, stream=True), 0.0)
    for message in ending:
        agent.handle(message, 0.0)
    fits, too_much = point(left - 100.0, unit="tokens"), point(left - 99.0, unit="tokens")
    assert refusals(agent.handle(ready("more", forecast=too_much), 0.0))
    assert dispatches(agent.handle(ready("more", forecast=fits), 0.0)) == ["r0"]


def test_a_call_that_is_cancelled_while_it_waits_or_refused_gives_its_tokens_back() -> None:
    agent = a_router(tenants={"t": TenantSettings(tokens_per_minute=600.0)}, max_waiting=1)
    for call_id in ("c0", "waits", "too many"):
        agent.handle(ready(call_id, forecast=HUNDRED), 0.0)
    agent.handle(CallCancelled(call_id="waits"), 0.0)
    assert not refusals(agent.handle(ready("big", forecast=point(300.0, unit="tokens")), 0.0))


def test_images_have_no_tokens() -> None:
    agent = a_router(slots=99, tenants={"t": TenantSettings(tokens_per_minute=1.0)})
    for number in range(5):
        assert dispatches(agent.handle(ready(f"c{number}", kind="image"), 0.0)) == ["r0"]


def test_calls_beyond_the_most_that_may_wait_are_refused_and_a_retry_is_not() -> None:
    agent = a_router(slots=1, max_waiting=2, breaker_failures=99)
    agent.handle(changed("r1", profile=a_profile(max_batch=1)), 0.0)
    for number in range(4):
        assert not refusals(agent.handle(ready(f"c{number}"), 0.0))
    (refusal,) = refusals(agent.handle(ready("c4"), 0.0))
    assert (refusal.reason, refusal.retry_after_s) == ("overload", 5.0)
    assert not refusals(agent.handle(failed("c0"), 1.0))
    agent.validate()


def test_a_tenant_that_fills_all_places_makes_room_for_another_one_up_to_its_share() -> None:
    agent = a_router(slots=1, max_waiting=4)
    for number in range(5):  # the first of them is sent
        assert not refusals(agent.handle(ready(f"c{number}", tenant="flood", deadline_at_s=99.0), 0.0))
    for number, last in enumerate(("c4", "c3")):
        outputs = agent.handle(ready(f"d{number}", tenant="small"), 1.0)
        (refusal,) = refusals(outputs)
        assert (refusal.call_id, refusal.reason) == (last, "overload")
        assert StopTimer(key=f"deadline:{last}") in outputs
        agent.validate()
    assert [r.call_id for r in refusals(agent.handle(ready("d2", tenant="small"), 1.0))] == ["d2"]
    assert [r.call_id for r in refusals(agent.handle(ready("c9", tenant="flood"), 1.0))] == ["c9"]


def test_a_call_that_cannot_meet_its_deadline_is_refused_at_once() -> None:
    agent = a_router(policy="least_work")
    (refusal,) = refusals(agent.handle(ready("c", deadline_at_s=0.2, forecast=HUNDRED), 0.0))  # 100 steps of 10 ms
    assert (refusal.reason, refusal.retry_after_s) == ("deadline", None)
    assert dispatches(agent.handle(ready("c", deadline_at_s=2.0, forecast=HUNDRED), 0.0)) == ["r0"]


@pytest.mark.parametrize("policy", ["least_work", "marginal"])
def test_a_call_that_would_wait_past_its_deadline_is_refused_at_once(policy: str) -> None:
    agent = a_router(policy=policy)
    agent.handle(ready("long", forecast=point(10_000.0, unit="tokens")), 0.0)
    (refusal,) = refusals(agent.handle(ready("c", deadline_at_s=20.0, forecast=HUNDRED), 0.0))
    assert refusal.reason == "deadline"
    assert refusal.retry_after_s == pytest.approx(85.0, abs=25.0)


def test_a_policy_that_knows_no_times_lets_a_call_wait_until_its_deadline() -> None:
    agent = a_router()
    agent.handle(ready("c0"), 0.0)
    assert agent.handle(ready("c", deadline_at_s=7.0), 0.0) == [StartTimer(key="deadline:c", at_s=7.0)]
    outputs = agent.handle(TimerFired(key="deadline:c"), 7.0)
    assert [refusal.reason for refusal in refusals(outputs)] == ["deadline"]
    agent.validate()
    assert dispatches(agent.handle(finished("c0"), 8.0)) == []


def test_a_call_that_gets_a_slot_in_time_has_no_deadline_timer_any_more() -> None:
    agent = a_router()
    agent.handle(ready("c0"), 0.0)
    agent.handle(ready("c", deadline_at_s=7.0), 0.0)
    outputs = agent.handle(finished("c0"), 1.0)
    assert StopTimer(key="deadline:c") in outputs
    assert dispatches(outputs) == ["r0"]
    assert agent.handle(TimerFired(key="deadline:c"), 7.0) == ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Holds:
    """A policy that never wants a call to go."""

    name: ClassVar[str] = "holds"
    order: ClassVar[Order] = "arrival"
    waits: ClassVar[bool] = True

    def choose(self, call: CallView, fleet: FleetView, rng: np.random.Generator) -> Choice:
        return Choice(index=int(rng.integers(len(fleet))), hold=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Never:
    """A policy that lets all calls go."""

    name: ClassVar[str] = "never"
    order: ClassVar[Order] = "arrival"
    waits: ClassVar[bool] = True

    def choose(self, call: CallView, fleet: FleetView, rng: np.random.Generator) -> Choice:
        return Choice(index=int(np.argmin(fleet.in_flight)))


def _nan(call: CallView, fleet: FleetView) -> Choice:
    return Choice(index=0, hold=True, expected_s=float("nan"), cost_s=np.full(len(fleet), np.nan))


def _beyond(call: CallView, fleet: FleetView) -> Choice:
    return Choice(index=len(fleet) + 3, hold=True)


def _raises(call: CallView, fleet: FleetView) -> Choice:
    raise RuntimeError("out of ideas")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mad:
    """A policy that now and then answers, and mostly does not."""

    answer: Callable[[CallView, FleetView], Choice]
    name: ClassVar[str] = "mad"
    order: ClassVar[Order] = "slack"
    waits: ClassVar[bool] = True

    def choose(self, call: CallView, fleet: FleetView, rng: np.random.Generator) -> Choice:
        return self.answer(call, fleet) if rng.random() < 0.7 else Choice(index=0, hold=True)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    policy=st.sampled_from([Holds(), Mad(answer=_nan), Mad(answer=_beyond), Mad(answer=_raises)]),
    late_binding=st.booleans(),
)
def test_every_call_ends_under_a_policy_that_always_holds_or_is_mad(seed: int, policy: Any, late_binding: bool) -> None:
    referee = Referee(RouterSettings(**{**_fields(IMPATIENT), "late_binding": late_binding, "hold_limit_s": 6.0}))
    referee.agent.objective.policy = policy
    world = ChaosWorld(seed)
    switchboard = Switchboard([referee], epoch=1, journal=MemoryJournal(limit=0))
    shell = VirtualShell(switchboard, world)
    for at_s, message in world.inputs(30):
        shell.post(message, at_s=at_s)
    shell.run()
    assert switchboard.faults == 0
    referee.check_settled()


def test_a_call_is_held_back_no_longer_than_the_limit_though_the_busy_replica_never_ends() -> None:
    agent = a_router(slots=2, hold_limit_s=60.0)
    agent.objective.policy = Holds()
    assert dispatches(agent.handle(ready("endless"), 0.0)) == ["r0"]  # nobody to wait for
    outputs = agent.handle(ready("c"), 10.0)
    assert outputs == [StartTimer(key="hold:m", at_s=70.0)]
    assert agent.handle(ready("d"), 20.0) == []
    outputs = agent.handle(TimerFired(key="hold:m"), 70.0)
    assert [o.call_id for o in outputs if isinstance(o, Dispatch)] == ["c"]
    agent.validate()


def test_the_timer_of_calls_that_are_held_back_is_started_anew_where_one_of_them_ends_its_patience_earlier() -> None:
    agent = a_router(slots=1, hold_limit_s=60.0)
    agent.handle(changed("r1", profile=a_profile(max_batch=1)), 0.0)
    agent.handle(changed("r2", profile=a_profile(max_batch=1)), 0.0)
    agent.objective.policy = Never()
    agent.handle(ready("early"), 0.0)
    agent.handle(ready("busy"), 1.0)
    agent.objective.policy = Holds()
    assert StartTimer(key="hold:m", at_s=65.0) in agent.handle(ready("late"), 5.0)
    assert StartTimer(key="hold:m", at_s=60.0) in agent.handle(failed("early"), 6.0)
    assert sent(agent.handle(TimerFired(key="hold:m"), 60.0)) == ["early"]


def test_a_call_that_waits_for_what_other_routers_have_there_is_asked_about_with_every_signal() -> None:
    agent = a_router(slots=2, shared=True)
    full = SignalReported(replica_id="r0", running=2, waiting=0, kv_usage=0.1, measured_at_s=1.0)
    agent.handle(full, 1.0)
    assert dispatches(agent.handle(ready("c"), 2.0)) == []
    idle = SignalReported(replica_id="r0", running=0, waiting=0, kv_usage=0.0, measured_at_s=3.0)
    assert dispatches(agent.handle(idle, 3.0)) == ["r0"]


def _fields(of: RouterSettings) -> dict[str, Any]:
    return {name: getattr(of, name) for name in of.__struct_fields__}
