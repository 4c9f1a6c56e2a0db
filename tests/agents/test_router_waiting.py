"""Calls that wait in the router: for a replica to come, and for room at one that is full."""

from __future__ import annotations

from typing import Any

import pytest

from swarmx.agents.router import RouterAgent
from swarmx.agents.router_settings import RouterSettings
from swarmx.core.actions import Dispatch, Refuse, StartTimer, StopTimer
from swarmx.core.messages import CallCancelled, DecisionMade, TimerFired
from tests.agents.routers import a_full_router, a_router, placed
from tests.agents.worlds import a_profile, changed, dispatches, failed, finished, ready


def test_a_call_waits_for_a_replica_and_goes_out_when_one_is_ready() -> None:
    agent = a_router(queue_timeout_s=30.0)
    assert agent.handle(ready("c"), 5.0) == [StartTimer(key="queue:c", at_s=35.0)]
    agent.handle(changed("r0", "starting"), 6.0)
    outputs = agent.handle(changed("r0", "ready"), 7.0)
    assert outputs[0] == StopTimer(key="queue:c")
    assert dispatches(outputs) == ["r0"]


def test_calls_that_wait_go_out_in_the_order_of_their_arrival() -> None:
    agent = a_router()
    for number in range(5):
        agent.handle(ready(f"c{number}"), float(number))
    outputs = agent.handle(changed("r0"), 9.0)
    assert [o.call_id for o in outputs if isinstance(o, Dispatch)] == [f"c{number}" for number in range(5)]


def test_where_calls_may_be_held_back_one_leaves_before_the_others_are_asked_about() -> None:
    agent = a_router(policy="marginal")
    for number in range(2):
        agent.handle(ready(f"c{number}"), float(number))
    outputs = agent.handle(changed("r0"), 9.0)
    assert placed(outputs) == [("c0", "r0")]
    [again] = [o for o in outputs if isinstance(o, StartTimer) and o.key.startswith("hold:")]
    assert 9.0 < again.at_s < 9.01
    assert placed(agent.handle(TimerFired(key=again.key), again.at_s)) == [("c1", "r0")]


def test_a_call_waits_without_a_timer_while_all_replicas_are_full() -> None:
    agent = a_router("r0")
    for number in range(a_profile().max_batch):
        assert dispatches(agent.handle(ready(f"c{number}"), 0.0)) == ["r0"]
    assert agent.handle(ready("late"), 0.0) == []
    assert placed(agent.handle(finished("c3"), 1.0)) == [("late", "r0")]


@pytest.mark.parametrize(
    "message",
    [
        finished("c0"),
        failed("c0", reason="rejected", retryable=False),
        CallCancelled(call_id="c0"),
        TimerFired(key="answer:c0"),
    ],
    ids=["finished", "failed", "cancelled", "out of patience"],
)
def test_a_slot_that_frees_goes_to_the_call_that_waits_longest(message: Any) -> None:
    agent = a_full_router("r0", max_attempts=1)
    for number in range(1, 4):
        agent.handle(ready(f"c{number}"), 0.0)
    assert placed(agent.handle(message, 1.0)) == [("c1", "r0")]
    assert placed(agent.handle(finished("c1"), 2.0)) == [("c2", "r0")]


def test_calls_that_wait_are_spread_over_replicas_as_these_become_ready() -> None:
    agent = a_router()
    for number in range(60):
        agent.handle(ready(f"c{number}"), 0.0)
    order = list[str]()
    for number in range(4):
        outputs = placed(agent.handle(changed(f"r{number}"), 5.0 + number))
        assert {replica_id for _, replica_id in outputs} == {f"r{number}"}
        order += [call_id for call_id, _ in outputs]
    assert [agent.in_flight(f"r{number}") for number in range(4)] == [8, 8, 8, 8]
    for number in range(28):
        order += [call_id for call_id, _ in placed(agent.handle(finished(f"c{number}"), 10.0))]
    assert order == [f"c{number}" for number in range(60)]
    assert [agent.in_flight(f"r{number}") for number in range(4)] == [8, 8, 8, 8]


def test_the_policy_sees_only_the_replicas_with_room() -> None:
    agent = a_full_router("r0", "r1")
    agent.handle(changed("r2"), 1.0)
    agent.handle(finished("c1"), 1.0)
    (decision,) = [o.decision for o in agent.handle(ready("c"), 1.0) if isinstance(o, DecisionMade)]
    assert (decision.candidates.total, decision.candidates.replica_ids) == (2, ("r1", "r2"))


def test_a_retry_waits_for_a_full_replica_and_leaves_the_one_that_failed_it_to_others() -> None:
    agent = a_full_router("r0", "r1")
    agent.handle(ready("c2"), 0.0)
    agent.handle(ready("c3"), 0.0)
    assert placed(agent.handle(failed("c0"), 1.0)) == [("c2", "r0")]
    assert placed(agent.handle(finished("c1"), 2.0)) == [("c0", "r1")]
    assert placed(agent.handle(finished("c2"), 3.0)) == [("c3", "r0")]


@pytest.mark.parametrize("state", ["cordoned", "draining"])
def test_a_retry_goes_back_when_the_replica_that_it_waits_for_leaves(state: Any) -> None:
    agent = a_full_router("r0", "r1")
    assert placed(agent.handle(failed("c0"), 1.0)) == []
    assert placed(agent.handle(changed("r1", state), 2.0)) == [("c0", "r0")]


@pytest.mark.parametrize("state", ["gone", "cordoned", "draining"])
def test_calls_that_wait_for_a_full_fleet_are_refused_some_time_after_it_is_lost(state: Any) -> None:
    agent = a_full_router("r0", "r1", queue_timeout_s=30.0)
    assert agent.handle(ready("c"), 10.0) == []
    assert StartTimer(key="queue:c", at_s=50.0) not in agent.handle(changed("r0", state), 20.0)
    assert StartTimer(key="queue:c", at_s=50.0) in agent.handle(changed("r1", state), 20.0)
    (refusal,) = agent.handle(TimerFired(key="queue:c"), 50.0)
    assert refusal == Refuse(call_id="c", reason="no_replica", attempts=0, detail="none became ready in 30 s")


def test_calls_that_wait_have_a_timer_while_the_only_breaker_is_open() -> None:
    agent = a_full_router("r0", breaker_failures=1, queue_timeout_s=30.0)
    agent.handle(ready("c"), 0.0)
    assert StartTimer(key="queue:c", at_s=31.0) in agent.handle(failed("c0", retryable=False), 1.0)
    outputs = agent.handle(TimerFired(key="breaker:r0"), 11.0)
    assert StopTimer(key="queue:c") in outputs
    assert placed(outputs) == [("c", "r0")]


def test_a_call_whose_patience_ends_while_replicas_are_only_full_stays_until_they_are_gone() -> None:
    agent = a_router(queue_timeout_s=30.0)
    agent.handle(ready("c0"), 0.0)
    agent.handle(ready("c1"), 0.0)
    assert StopTimer(key="queue:c1") in agent.handle(changed("r0", profile=a_profile(max_batch=1)), 5.0)
    assert agent.handle(TimerFired(key="queue:c1"), 30.0) == ()  # it was on its way
    assert StartTimer(key="queue:c1", at_s=70.0) in agent.handle(changed("r0", "cordoned"), 40.0)
    agent.handle(changed("r0", profile=a_profile(max_batch=1)), 40.0)
    assert placed(agent.handle(finished("c0"), 41.0)) == [("c1", "r0")]


def test_a_call_that_is_cancelled_while_it_waits_gets_no_slot() -> None:
    agent = a_full_router("r0")
    agent.handle(ready("c1"), 0.0)
    agent.handle(ready("c2"), 0.0)
    assert agent.handle(CallCancelled(call_id="c1"), 1.0) == ()
    assert placed(agent.handle(finished("c0"), 2.0)) == [("c2", "r0")]


def test_a_call_that_is_cancelled_while_there_is_no_replica_stops_its_timer() -> None:
    agent = a_router()
    agent.handle(ready("c"), 0.0)
    assert agent.handle(CallCancelled(call_id="c"), 1.0) == (StopTimer(key="queue:c"),)
    assert placed(agent.handle(changed("r0"), 2.0)) == []


def test_without_late_binding_calls_go_to_full_replicas_at_once() -> None:
    agent = a_router(late_binding=False)
    for number in range(20):
        agent.handle(ready(f"c{number}"), 0.0)
    assert len(placed(agent.handle(changed("r0"), 1.0))) == 20
    assert placed(agent.handle(ready("c"), 2.0)) == [("c", "r0")]
    assert agent.handle(changed("r1"), 3.0) == []


def test_a_call_that_waited_too_long_is_refused() -> None:
    agent = a_router(queue_timeout_s=30.0)
    agent.handle(ready("c"), 0.0)
    (refusal,) = agent.handle(TimerFired(key="queue:c"), 30.0)
    assert refusal == Refuse(call_id="c", reason="no_replica", attempts=0, detail="none became ready in 30 s")
    assert dispatches(agent.handle(changed("r0"), 31.0)) == []


def test_calls_for_a_model_that_can_be_had_wait_for_its_first_replica() -> None:
    agent = RouterAgent(RouterSettings(models=["m"], demand_every_s=0.0))
    assert agent.handle(ready("c"), 0.0) == [StartTimer(key="queue:c", at_s=30.0)]
    assert dispatches(agent.handle(changed("r0"), 5.0)) == ["r0"]
