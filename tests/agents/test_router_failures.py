"""Failures under the router: retries, time-outs, open breakers and replicas that go."""

from __future__ import annotations

import pytest

from swarmx.agents.policies import POLICIES
from swarmx.core.actions import Cancel, Refuse, StartTimer, StopTimer
from swarmx.core.messages import AlertRaised, FirstToken, TimerFired
from tests.agents.routers import a_router
from tests.agents.worlds import changed, dispatches, failed, finished, ready


def test_a_retry_that_has_to_wait_again_is_as_patient_as_at_first() -> None:
    agent = a_router(queue_timeout_s=30.0)
    agent.handle(ready("c"), 0.0)
    agent.handle(changed("r0"), 10.0)
    outputs = agent.handle(changed("r0", "gone"), 20.0)
    assert [o.at_s for o in outputs if isinstance(o, StartTimer)] == [50.0]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(5))
def test_a_failed_call_does_not_go_back_while_there_are_others(policy: str, seed: int) -> None:
    agent = a_router("r0", "r1", "r2", policy=policy, seed=seed)
    tried = dispatches(agent.handle(ready("c"), 0.0))
    for attempt in (1, 2):
        tried += dispatches(agent.handle(failed("c", attempt), 1.0))
    assert sorted(tried) == ["r0", "r1", "r2"]


def test_a_failure_before_the_first_token_is_retried_on_another_replica() -> None:
    agent = a_router("r0", "r1")
    agent.handle(ready("c"), 0.0)
    outputs = agent.handle(failed("c"), 1.0)
    assert dispatches(outputs) == ["r1"]
    assert agent.in_flight("r0") == 0
    assert agent.in_flight("r1") == 1


def test_a_failure_after_the_first_token_is_not_retried() -> None:
    agent = a_router("r0", "r1")
    agent.handle(ready("c", stream=True), 0.0)
    agent.handle(FirstToken(call_id="c", attempt=1), 0.5)
    outputs = agent.handle(failed("c", reason="connection_lost"), 1.0)
    assert dispatches(outputs) == []
    assert outputs[-1] == Refuse(call_id="c", reason="failed", attempts=1, detail="connection_lost")


def test_a_replica_that_hangs_is_cancelled_and_another_takes_over() -> None:
    agent = a_router("r0", "r1", call_timeout_s=5.0)
    assert StartTimer(key="answer:c", at_s=5.0) in agent.handle(ready("c"), 0.0)
    outputs = agent.handle(TimerFired(key="answer:c"), 5.0)
    assert outputs[0] == Cancel(call_id="c", attempt=1, replica_id="r0")
    assert dispatches(outputs) == ["r1"]


def test_a_stream_has_the_shorter_patience_until_its_first_token_and_the_longer_one_then() -> None:
    agent = a_router("r0", first_token_timeout_s=2.0, call_timeout_s=30.0)
    assert StartTimer(key="answer:c", at_s=2.0) in agent.handle(ready("c", stream=True), 0.0)
    outputs = agent.handle(FirstToken(call_id="c", attempt=1), 1.0)
    assert outputs == (StartTimer(key="answer:c", at_s=31.0),)


def test_a_stream_that_hangs_in_the_middle_is_cancelled_and_given_up() -> None:
    agent = a_router("r0", "r1")
    agent.handle(ready("c", stream=True), 0.0)
    agent.handle(FirstToken(call_id="c", attempt=1), 1.0)
    outputs = agent.handle(TimerFired(key="answer:c"), 1201.0)
    assert outputs == [
        Cancel(call_id="c", attempt=1, replica_id="r0"),
        Refuse(call_id="c", reason="failed", attempts=1, detail="timeout"),
    ]


def test_attempts_are_limited() -> None:
    agent = a_router("r0", "r1", "r2", "r3", max_attempts=2)
    agent.handle(ready("c"), 0.0)
    agent.handle(failed("c", 1), 1.0)
    outputs = agent.handle(failed("c", 2), 2.0)
    assert outputs[-1] == Refuse(call_id="c", reason="retries_exhausted", attempts=2, detail="connect")


def test_the_only_replica_is_tried_again() -> None:
    agent = a_router("r0")
    agent.handle(ready("c"), 0.0)
    assert dispatches(agent.handle(failed("c"), 1.0)) == ["r0"]


def test_a_request_that_the_replica_rejects_speaks_against_the_request_alone() -> None:
    agent = a_router("r0", breaker_failures=1)
    agent.handle(ready("c"), 0.0)
    outputs = agent.handle(failed("c", reason="rejected", retryable=False), 1.0)
    assert outputs == [
        StopTimer(key="answer:c"),
        Refuse(call_id="c", reason="failed", attempts=1, detail="rejected"),
    ]


def test_three_failures_in_a_row_open_the_breaker_and_time_half_opens_it() -> None:
    agent = a_router("r0", breaker_failures=3, breaker_open_s=10.0, max_attempts=9)
    agent.handle(ready("c"), 0.0)
    assert dispatches(agent.handle(failed("c", 1), 1.0)) == ["r0"]
    assert dispatches(agent.handle(failed("c", 2), 2.0)) == ["r0"]
    outputs = agent.handle(failed("c", 3), 3.0)
    assert AlertRaised(kind="breaker_opened", subject="r0", value=3.0) in outputs
    assert StartTimer(key="breaker:r0", at_s=13.0) in outputs
    assert dispatches(outputs) == []

    outputs = agent.handle(TimerFired(key="breaker:r0"), 13.0)
    assert AlertRaised(kind="breaker_closed", subject="r0") in outputs
    assert dispatches(outputs) == ["r0"]
    assert AlertRaised(kind="breaker_opened", subject="r0", value=3.0) in agent.handle(failed("c", 4), 14.0)


def test_an_answer_from_behind_an_open_breaker_closes_it_and_lets_waiting_calls_through() -> None:
    agent = a_router("r0", breaker_failures=1)
    agent.handle(ready("slow"), 0.0)
    agent.handle(ready("unlucky"), 0.0)
    assert dispatches(agent.handle(failed("unlucky"), 1.0)) == []
    outputs = agent.handle(finished("slow"), 2.0)
    assert AlertRaised(kind="breaker_closed", subject="r0") in outputs
    assert StopTimer(key="breaker:r0") in outputs
    assert dispatches(outputs) == ["r0"]


def test_stragglers_of_an_open_breaker_neither_open_it_again_nor_keep_it_open() -> None:
    agent = a_router("r0", breaker_failures=1)
    for number in range(3):
        agent.handle(ready(f"c{number}"), 0.0)
    assert any(isinstance(output, AlertRaised) for output in agent.handle(failed("c0"), 1.0))
    for number in (1, 2):
        outputs = agent.handle(failed(f"c{number}"), 2.0)
        assert [type(output) for output in outputs] == [StopTimer, StartTimer]
        assert outputs[-1] == StartTimer(key=f"queue:c{number}", at_s=32.0)


def test_a_replica_that_is_gone_takes_the_timer_of_its_open_breaker_along() -> None:
    agent = a_router("r0", breaker_failures=1)
    agent.handle(ready("c"), 0.0)
    agent.handle(failed("c"), 1.0)
    assert StopTimer(key="breaker:r0") in agent.handle(changed("r0", "gone"), 2.0)
    assert StopTimer(key="breaker:r0") not in agent.handle(changed("r0", "gone"), 3.0)


def test_an_answer_in_between_starts_the_count_of_failures_anew() -> None:
    agent = a_router("r0", breaker_failures=2, max_attempts=9)
    for number in range(4):
        agent.handle(ready(f"bad{number}", stream=True), 0.0)
        agent.handle(FirstToken(call_id=f"bad{number}", attempt=1), 0.0)
        outputs = agent.handle(failed(f"bad{number}"), 0.0)
        assert not any(isinstance(output, AlertRaised) for output in outputs)
        agent.handle(ready(f"good{number}"), 0.0)
        agent.handle(finished(f"good{number}"), 0.0)


def test_the_calls_of_a_replica_that_is_gone_go_to_another() -> None:
    agent = a_router("r0", "r1")
    agent.handle(ready("c"), 0.0)
    outputs = agent.handle(changed("r0", "gone"), 1.0)
    assert Cancel(call_id="c", attempt=1, replica_id="r0") in outputs
    assert dispatches(outputs) == ["r1"]


def test_a_stream_of_a_replica_that_is_gone_is_given_up() -> None:
    agent = a_router("r0", "r1")
    agent.handle(ready("c", stream=True), 0.0)
    agent.handle(FirstToken(call_id="c", attempt=1), 0.5)
    outputs = agent.handle(changed("r0", "gone"), 1.0)
    assert outputs[-1] == Refuse(call_id="c", reason="failed", attempts=1, detail="replica_gone")


def test_the_answer_of_an_attempt_that_was_given_up_is_ignored() -> None:
    agent = a_router("r0", "r1")
    agent.handle(ready("c"), 0.0)
    agent.handle(failed("c", 1), 1.0)
    assert agent.handle(finished("c", 1), 2.0) == ()
    assert agent.in_flight("r1") == 1
