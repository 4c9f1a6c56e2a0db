from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from swarmx.agents.objective import FALLBACK_POLICY
from swarmx.agents.policies import POLICIES
from swarmx.agents.router import RouterAgent
from swarmx.agents.router_settings import RouterSettings
from swarmx.core.actions import Cancel, Dispatch, Refuse, StartTimer, StopTimer
from swarmx.core.fleet import CallView, Choice, FleetView, Order
from swarmx.core.messages import (
    AlertRaised,
    CallCancelled,
    DecisionMade,
    DemandReported,
    FirstToken,
    PolicyChanged,
    SignalReported,
    TimerFired,
    TokensProgressed,
    WorkflowEnded,
    WorkflowSubmitted,
)
from tests.agents.worlds import (
    FORECAST,
    IMPATIENT,
    TENANTS,
    Referee,
    a_profile,
    changed,
    dispatches,
    failed,
    finished,
    ready,
)

MODELS = ("m", "other")
REPLICAS = tuple(f"r{i}" for i in range(6))  # the even ones serve "m"
FAULTS = ("connect", "timeout", "bad_answer", "connection_lost", "replica_gone", "replica_error", "rejected")


class Chaos(RuleBasedStateMachine):
    """Any order of messages that the world and the clock can bring about, and some that they cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.referee = Referee(
            msgspec.structs.replace(
                IMPATIENT, demand_every_s=2.0, tenants=TENANTS, priority_age_s=2.0, max_waiting=20, hold_limit_s=5.0
            )
        )
        self.made = 0

    def say(self, message: Any) -> None:
        self.referee.handle(message, self.now_s)

    @initialize(
        numbers=st.sets(st.integers(0, 5), min_size=2),
        calls=st.integers(0, 12),
        late_binding=st.sampled_from([True, True, True, False]),
    )
    def the_world_is_up(self, numbers: set[int], calls: int, late_binding: bool) -> None:
        settings = msgspec.structs.replace(self.referee.agent.settings, late_binding=late_binding)
        self.referee = Referee(settings)
        for number in sorted(numbers):
            self.replica_changes(number, "ready")
        for number in range(calls):
            self.call_arrives(MODELS[number % 2], stream=number % 3 == 0, prompt=100 * number)

    @rule(number=st.integers(0, 5), state=st.sampled_from(["ready", "starting", "cordoned", "draining", "gone"]))
    def replica_changes(self, number: int, state: Any) -> None:
        profile = a_profile(speed=1.0 + number, max_batch=1 + number // 2)
        self.say(changed(REPLICAS[number], state, model=MODELS[number % 2], profile=profile))

    @rule(model=st.sampled_from(MODELS), stream=st.booleans(), prompt=st.integers(0, 100_000))
    def call_arrives(self, model: str, stream: bool, prompt: int) -> None:
        self.made += 1
        self.say(ready(f"c{self.made}", model=model, stream=stream, prompt_tokens=prompt))

    @rule(
        tenant=st.sampled_from([*TENANTS, "unheard-of"]),
        priority=st.integers(-10, 10),
        within_s=st.none() | st.floats(0.0, 8.0),
    )
    def a_call_of_a_tenant_arrives(self, tenant: str, priority: int, within_s: float | None) -> None:
        self.made += 1
        due_s = None if within_s is None else self.now_s + within_s
        self.say(ready(f"c{self.made}", tenant=tenant, priority=priority, deadline_at_s=due_s))

    @precondition(lambda self: self.referee.live_calls())
    @rule(data=st.data())
    def call_arrives_twice(self, data: st.DataObject) -> None:
        call_id = data.draw(st.sampled_from(self.referee.live_calls()))
        self.say(ready(call_id, model=self.referee.calls[call_id].call.model))

    @rule(data=st.data(), kind=st.sampled_from(["first", "progress", "finish", "fail", "cancel"]))
    def something_happens_to_a_call(self, data: st.DataObject, kind: str) -> None:
        call_id = data.draw(st.sampled_from([*self.referee.calls, "nobody"]))
        known = self.referee.calls.get(call_id)
        attempt = (known.attempt if known else 1) + data.draw(st.sampled_from([0, 0, 0, 0, -1, 1]))
        match kind:
            case "first":
                self.say(FirstToken(call_id=call_id, attempt=attempt))
            case "progress":
                work = data.draw(st.floats(0.0, 1e6))
                self.say(TokensProgressed(call_id=call_id, attempt=attempt, work_done=work))
            case "finish":
                self.say(finished(call_id, attempt))
            case "fail":
                reason = data.draw(st.sampled_from(FAULTS))
                self.say(failed(call_id, attempt, reason=reason, retryable=reason != "rejected"))
            case _:
                self.say(CallCancelled(call_id=call_id))

    @precondition(lambda self: self.referee.calls_on_replicas())
    @rule(data=st.data(), reason=st.sampled_from(FAULTS))
    def an_attempt_fails(self, data: st.DataObject, reason: str) -> None:
        call_id = data.draw(st.sampled_from(self.referee.calls_on_replicas()))
        self.say(failed(call_id, self.referee.calls[call_id].attempt, reason=reason, retryable=reason != "rejected"))

    @rule(replica_id=st.sampled_from([*REPLICAS, "nobody"]), running=st.integers(0, 9), at_s=st.floats(0.0, 100.0))
    def engine_reports(self, replica_id: str, running: int, at_s: float) -> None:
        self.say(SignalReported(replica_id=replica_id, running=running, waiting=0, kv_usage=0.5, measured_at_s=at_s))

    @rule(name=st.sampled_from([*POLICIES, "unheard-of"]))
    def policy_changes(self, name: str) -> None:
        self.say(PolicyChanged(policy=name, parameters={}))

    @rule(workflow_id=st.sampled_from(["w", "v"]), kind=st.sampled_from(["report", "chat"]))
    def a_workflow_begins(self, workflow_id: str, kind: str) -> None:
        self.say(WorkflowSubmitted(workflow_id=workflow_id, kind=kind))

    @rule(workflow_id=st.sampled_from(["w", "v", "nobody"]), state=st.sampled_from(["finished", "failed", "cancelled"]))
    def a_workflow_ends(self, workflow_id: str, state: Any) -> None:
        self.say(WorkflowEnded(workflow_id=workflow_id, state=state))

    @rule(
        key=st.sampled_from(
            [
                "answer:nobody",
                "queue:nobody",
                "breaker:nobody",
                "deadline:nobody",
                "hold:m",
                "demand",
                "plan",
                "",
                "tea",
            ]
        )
    )
    def a_timer_fires_that_nobody_started(self, key: str) -> None:
        self.say(TimerFired(key=key))

    @rule(by_s=st.floats(0.0, 6.0))
    def time_passes(self, by_s: float) -> None:
        until_s = self.now_s + by_s
        while (due := self.next_timer()) is not None and self.referee.timers[due] <= until_s:
            self.fire(due)
        self.now_s = until_s

    def next_timer(self) -> str | None:
        timers = self.referee.timers
        return min(timers, key=lambda key: timers[key]) if timers else None

    def fire(self, key: str) -> None:
        self.now_s = max(self.now_s, self.referee.timers[key])
        self.say(TimerFired(key=key))

    @invariant()
    def every_live_call_is_known(self) -> None:
        self.referee.agent.validate()

    @invariant()
    def a_replica_weighs_what_its_calls_weigh(self) -> None:
        agent = self.referee.agent
        weights = dict.fromkeys(REPLICAS, 0.0)
        for state in agent._calls.values():
            if state.replica_id is not None:
                weights[state.replica_id] += state.weight
        for pool in agent._pools.values():
            told = pool.view(np.arange(len(pool)), self.now_s).weight.tolist()
            for replica, weight in zip(pool.replicas, told, strict=True):
                assert math.isclose(weight, weights[replica.replica_id], rel_tol=1e-9, abs_tol=1e-9)

    def teardown(self) -> None:
        for workflow_id in ("w", "v"):
            self.a_workflow_ends(workflow_id, "finished")
        for _ in range(10_000):
            if (due := self.next_timer()) is None:
                break
            self.fire(due)
        self.referee.check_settled()
        assert self.referee.timers == {}


TestAnyOrderOfMessages = Chaos.TestCase
TestAnyOrderOfMessages.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


def a_router(*replica_ids: str, policy: str = "round_robin", **patience: Any) -> RouterAgent:
    """With the ready replicas; without any, one of their model is still starting. It reports no demand unless asked."""
    agent = RouterAgent(RouterSettings(**{"policy": policy, "demand_every_s": 0.0, **patience}))
    agent.handle(changed(replica_ids[0] if replica_ids else "r0", "starting"), 0.0)
    for replica_id in replica_ids:
        agent.handle(changed(replica_id), 0.0)
    return agent


def test_a_call_for_a_model_that_nobody_serves_is_refused_at_once() -> None:
    (refusal,) = a_router("r0").handle(ready("c", model="nope"), 0.0)
    assert isinstance(refusal, Refuse)
    assert (refusal.reason, refusal.attempts) == ("no_replica", 0)
    assert "'nope'" in refusal.detail


def test_a_retry_that_has_to_wait_again_is_as_patient_as_at_first() -> None:
    agent = a_router(queue_timeout_s=30.0)
    agent.handle(ready("c"), 0.0)
    agent.handle(changed("r0"), 10.0)
    outputs = agent.handle(changed("r0", "gone"), 20.0)
    assert [o.at_s for o in outputs if isinstance(o, StartTimer)] == [50.0]


def test_a_call_goes_to_a_ready_replica_and_the_decision_says_why() -> None:
    outputs = a_router("r0", "r1", policy="least_work").handle(ready("c"), 1.0)
    assert [type(output) for output in outputs] == [Dispatch, StartTimer, DecisionMade]
    decision = outputs[2].decision  # type: ignore[union-attr]
    assert decision.replica_id == outputs[0].replica_id  # type: ignore[union-attr]
    assert {decision.replica_id, decision.runner_up} == {"r0", "r1"}
    assert decision.policy == "least_work"


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


def a_full_router(*replica_ids: str, **patience: Any) -> RouterAgent:
    """Each replica takes one call at a time and has one: c0 at the first, and so on."""
    agent = a_router(**patience)
    for number, replica_id in enumerate(replica_ids):
        agent.handle(changed(replica_id, profile=a_profile(max_batch=1)), 0.0)
        agent.handle(ready(f"c{number}"), 0.0)
        assert agent.in_flight(replica_id) == 1
    return agent


def placed(outputs: Any) -> list[tuple[str, str]]:
    return [(output.call_id, output.replica_id) for output in outputs if isinstance(output, Dispatch)]


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


@pytest.mark.parametrize("state", ["starting", "cordoned", "draining"])
def test_a_replica_that_is_not_ready_gets_no_new_calls_but_may_end_its_own(state: Any) -> None:
    agent = a_router("r0")
    agent.handle(ready("old"), 0.0)
    agent.handle(changed("r0", state), 1.0)
    assert dispatches(agent.handle(ready("new"), 2.0)) == []
    assert agent.in_flight("r0") == 1
    agent.handle(finished("old"), 3.0)
    assert agent.in_flight("r0") == 0


def test_a_cancelled_call_is_stopped_where_it_runs() -> None:
    agent = a_router("r0")
    agent.handle(ready("c"), 0.0)
    outputs = agent.handle(CallCancelled(call_id="c"), 1.0)
    assert outputs == (Cancel(call_id="c", attempt=1, replica_id="r0"), StopTimer(key="answer:c"))
    assert agent.handle(finished("c"), 2.0) == ()


def test_the_answer_of_an_attempt_that_was_given_up_is_ignored() -> None:
    agent = a_router("r0", "r1")
    agent.handle(ready("c"), 0.0)
    agent.handle(failed("c", 1), 1.0)
    assert agent.handle(finished("c", 1), 2.0) == ()
    assert agent.in_flight("r1") == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """A policy that does what `answer` says."""

    answer: Callable[[FleetView], Choice]
    name: ClassVar[str] = "broken"
    order: ClassVar[Order] = "arrival"
    waits: ClassVar[bool] = False

    def choose(self, call: CallView, fleet: FleetView, rng: np.random.Generator) -> Choice:
        return self.answer(fleet)


def _raises(fleet: FleetView) -> Choice:
    raise RuntimeError("out of ideas")


@pytest.mark.parametrize(
    "answer",
    [
        _raises,
        lambda fleet: Choice(index=len(fleet)),
        lambda fleet: Choice(index=-1),
        lambda fleet: Choice(index=0.5),  # type: ignore[arg-type]
        lambda fleet: None,
        lambda fleet: Choice(index=0, cost_s=np.zeros(len(fleet) + 1)),
        lambda fleet: Choice(index=0, terms_s={"wait_s": np.zeros(0)}),
        lambda fleet: Choice(index=0, weight=0.0),
        lambda fleet: Choice(index=0, weight=np.inf),
        lambda fleet: Choice(index=0, weight=np.nan),
    ],
    ids=[
        *("raises", "beyond", "before", "between", "nothing", "other costs", "other terms"),
        *("worthless", "priceless", "of no known worth"),
    ],
)
def test_a_policy_that_fails_is_overruled_by_name(answer: Callable[[FleetView], Choice]) -> None:
    agent = a_router("r0", "r1")
    agent.objective.policy = Broken(answer=answer)
    outputs = agent.handle(ready("c"), 0.0)
    assert len(dispatches(outputs)) == 1
    assert outputs[-1] == AlertRaised(kind="policy_failed", subject="broken")
    assert [o.decision.policy for o in outputs if isinstance(o, DecisionMade)] == [FALLBACK_POLICY]


def test_an_unknown_policy_leaves_the_one_in_force() -> None:
    agent = a_router("r0", policy="power_of_two")
    outputs = agent.handle(PolicyChanged(policy="psychic", parameters={}), 0.0)
    assert outputs == (AlertRaised(kind="policy_failed", subject="psychic"),)
    assert agent.policy.name == "power_of_two"


def test_a_policy_change_takes_effect_with_the_next_call() -> None:
    agent = a_router("r0")
    agent.handle(PolicyChanged(policy="random", parameters={}), 0.0)
    (decision,) = [o.decision for o in agent.handle(ready("c"), 1.0) if isinstance(o, DecisionMade)]
    assert decision.policy == "random"


def test_the_same_messages_give_the_same_answers() -> None:
    def run() -> list[Any]:
        agent = a_router("r0", "r1", "r2", policy="power_of_two", seed=7)
        return [agent.handle(ready(f"c{i}"), float(i)) for i in range(50)]

    assert run() == run()


def test_a_call_is_lighter_the_further_it_has_come() -> None:
    agent = a_router("r0", "r1", policy="least_work")
    agent.handle(ready("c0"), 0.0)
    agent.handle(ready("c1"), 0.0)
    agent.handle(TokensProgressed(call_id="c0", attempt=1, work_done=90.0), 1.0)
    (decision,) = [o.decision for o in agent.handle(ready("c2"), 1.0) if isinstance(o, DecisionMade)]
    left = dict(zip(decision.candidates.replica_ids, decision.candidates.remaining_work, strict=True))
    assert left["r0"] != left["r1"]


def test_the_settings_of_a_journal_rebuild_the_agent() -> None:
    agent = RouterAgent.from_config({"policy": "random", "seed": 3})
    assert agent.settings == RouterSettings(policy="random", seed=3)


def reports(outputs: Any) -> list[DemandReported]:
    return [output for output in outputs if isinstance(output, DemandReported)]


def test_demand_is_reported_while_there_is_any_and_once_more_with_zeros() -> None:
    agent = a_router("r0", demand_every_s=2.0)
    assert StartTimer(key="demand", at_s=12.0) in agent.handle(ready("c0"), 10.0)
    assert StartTimer(key="demand", at_s=13.0) not in agent.handle(ready("c1"), 11.0)
    outputs = agent.handle(TimerFired(key="demand"), 12.0)
    assert outputs[-1] == StartTimer(key="demand", at_s=14.0)
    (report,) = reports(outputs)
    assert (report.model, report.window_s, report.arrived, report.in_flight, report.waiting) == ("m", 2.0, 2, 2, 0)
    assert report.work_left == report.arrived_work == pytest.approx(2 * FORECAST.mean)
    agent.handle(finished("c0"), 13.0)
    agent.handle(CallCancelled(call_id="c1"), 13.0)
    (report,) = reports(agent.handle(TimerFired(key="demand"), 14.0))
    assert (report.arrived, report.finished, report.in_flight, report.work_left) == (0, 2, 0, 0.0)
    assert not any(report.upcoming_mean + report.upcoming_p90 + report.fresh_mean)
    assert agent.handle(TimerFired(key="demand"), 16.0) == []
    assert agent.handle(ready("c2"), 500.0)[-1] == StartTimer(key="demand", at_s=502.0)
    (report,) = reports(agent.handle(TimerFired(key="demand"), 502.0))
    assert (report.window_s, report.arrived) == (2.0, 1)


def test_calls_that_wait_are_demand_as_well() -> None:
    agent = a_router("r0", demand_every_s=2.0)
    agent.handle(ready("c0"), 0.0)
    agent.handle(changed("r0", "cordoned"), 0.5)
    agent.handle(ready("c1"), 1.0)
    (report,) = reports(agent.handle(TimerFired(key="demand"), 2.0))
    assert (report.in_flight, report.waiting) == (1, 1)
    assert report.work_left == pytest.approx(2 * FORECAST.mean)


def test_calls_that_wait_for_room_are_demand_as_well() -> None:
    agent = a_full_router("r0", demand_every_s=2.0)
    for number in range(1, 4):
        agent.handle(ready(f"c{number}"), 0.0)
    (report,) = reports(agent.handle(TimerFired(key="demand"), 2.0))
    assert (report.in_flight, report.waiting) == (1, 3)
    assert report.work_left == pytest.approx(4 * FORECAST.mean)


def test_a_call_that_is_retried_arrived_once_and_one_that_is_refused_has_ended() -> None:
    agent = a_router("r0", "r1", demand_every_s=2.0, max_attempts=2)
    agent.handle(ready("c"), 0.0)
    agent.handle(failed("c", 1), 1.0)
    agent.handle(failed("c", 2), 1.0)
    (report,) = reports(agent.handle(TimerFired(key="demand"), 2.0))
    assert (report.arrived, report.finished, report.in_flight) == (1, 1, 0)


def test_a_model_that_nobody_serves_is_no_demand() -> None:
    agent = a_router("r0", demand_every_s=2.0)
    assert not any(isinstance(o, StartTimer) for o in agent.handle(ready("c", model="nope"), 0.0))
    agent.handle(ready("c"), 0.0)
    assert [report.model for report in reports(agent.handle(TimerFired(key="demand"), 2.0))] == ["m"]


def test_a_workflow_is_demand_from_its_submission_to_its_end() -> None:
    agent = a_router("r0", demand_every_s=2.0)
    agent.handle(ready("first"), 0.0)
    agent.handle(finished("first"), 1.0)
    assert agent.handle(TimerFired(key="demand"), 2.0)[-1] == StartTimer(key="demand", at_s=4.0)
    assert len(agent.handle(TimerFired(key="demand"), 4.0)) == 1
    assert agent.handle(WorkflowSubmitted(workflow_id="v", kind="chat"), 10.0) == [StartTimer(key="demand", at_s=12.0)]
    assert agent.handle(TimerFired(key="demand"), 12.0)[-1] == StartTimer(key="demand", at_s=14.0)
    agent.handle(WorkflowEnded(workflow_id="v", state="finished"), 13.0)
    assert not any(isinstance(output, StartTimer) for output in agent.handle(TimerFired(key="demand"), 14.0))


def test_calls_for_a_model_that_can_be_had_wait_for_its_first_replica() -> None:
    agent = RouterAgent(RouterSettings(models=["m"], demand_every_s=0.0))
    assert agent.handle(ready("c"), 0.0) == [StartTimer(key="queue:c", at_s=30.0)]
    assert dispatches(agent.handle(changed("r0"), 5.0)) == ["r0"]
