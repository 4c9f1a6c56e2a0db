"""Any order of messages, late, broken and duplicate ones among them: a referee checks every step of the router."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from swarmx.agents.policies import POLICIES
from swarmx.core.messages import (
    CallCancelled,
    FirstToken,
    PolicyChanged,
    SignalReported,
    TimerFired,
    TokensProgressed,
    WorkflowEnded,
    WorkflowSubmitted,
)
from tests.agents.worlds import IMPATIENT, TENANTS, Referee, a_profile, changed, failed, finished, ready

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
