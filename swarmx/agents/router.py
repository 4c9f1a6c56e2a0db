"""The router agent: sends every call to a replica, keeps exact count of what is where, retries what may be retried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self, assert_never

import msgspec
import numpy as np

from swarmx.agents.choice import is_sound, second_of
from swarmx.agents.demand import TIMER, DemandSketch, Load
from swarmx.agents.policies import DEFAULT_POLICY, make_policy, parameters_of
from swarmx.agents.pool import Pool
from swarmx.core.actions import Cancel, Dispatch, RefusalReason, Refuse, StartTimer, StopTimer
from swarmx.core.errors import ConfigError
from swarmx.core.fleet import CallView, Choice, FleetView
from swarmx.core.forecast import Forecast
from swarmx.core.messages import (
    AlertRaised,
    BoundsChanged,
    CallCancelled,
    CallFailed,
    CallFinished,
    CallReady,
    DecisionMade,
    DemandReported,
    FirstToken,
    Message,
    PolicyChanged,
    ReplicaChanged,
    ScalePlanned,
    ScaleRequested,
    ScalingPolicyChanged,
    SignalReported,
    TimerFired,
    TokensProgressed,
    WorkflowEnded,
    WorkflowSubmitted,
)
from swarmx.core.nouns import Call, Decision, FailureReason
from swarmx.core.ports import Output, Policy

# Reasons that speak against the replica and not against the call.
_REPLICA_FAULTS: frozenset[FailureReason] = frozenset(
    {"connect", "timeout", "bad_answer", "connection_lost", "replica_gone", "replica_error"}
)


class RouterSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How patient a router is. Times in seconds.

    `first_token_timeout_s` is for streamed calls; `call_timeout_s` for the whole of others, and for the rest of a
    stream from its first token on. `demand_every_s` is the time between two reports of demand, 0 for none. Calls for
    `models` wait for a replica even before the first one of that model is known.
    """

    policy: str = DEFAULT_POLICY
    parameters: dict[str, float] = {}
    seed: int = 0
    max_attempts: int = 3
    queue_timeout_s: float = 30.0
    first_token_timeout_s: float = 120.0
    call_timeout_s: float = 1200.0
    breaker_failures: int = 3
    breaker_open_s: float = 10.0
    demand_every_s: float = 2.0
    models: list[str] = []


FALLBACK_POLICY = "least_outstanding"  # needs nothing but this router's own counts, so nothing can make it fail


@dataclass(slots=True, kw_only=True)
class _InFlight:
    """One call of this router: waiting while `replica_id` is None, else on that replica."""

    call: Call
    forecast: Forecast
    attempt: int = 0
    replica_id: str | None = None
    streamed: bool = False
    work_left: float = 0.0
    work_done: float = 0.0
    context: float = 0.0
    tried: frozenset[str] = field(default_factory=frozenset)
    patience_until_s: float | None = None  # set when it first has to wait; retries do not extend it


class RouterAgent:
    """The four parts: forecasts arrive with each call, `_pools` and `_calls` are its memory, `policy` is its
    objective, and `actions` are its tools.

    Late, duplicate and stale messages are ordinary: an event of an attempt that is not the current one is ignored.
    """

    name = "router"
    listens: frozenset[type] = frozenset(
        {
            CallReady,
            FirstToken,
            TokensProgressed,
            CallFinished,
            CallFailed,
            CallCancelled,
            ReplicaChanged,
            SignalReported,
            PolicyChanged,
            WorkflowSubmitted,
            WorkflowEnded,
            TimerFired,
        }
    )
    actions: frozenset[type] = frozenset({Dispatch, Cancel, Refuse, StartTimer, StopTimer})

    def __init__(self, settings: RouterSettings | None = None) -> None:
        self.settings = settings or RouterSettings()
        self.policy: Policy = make_policy(self.settings.policy, self.settings.parameters)
        self.parameters = _parameters(self.policy)
        self._fallback = make_policy(FALLBACK_POLICY)
        self._rng = np.random.default_rng(self.settings.seed)
        self._pools = {model: Pool(model) for model in self.settings.models}
        self._pool_of: dict[str, Pool] = {}
        self._calls: dict[str, _InFlight] = {}
        self._waiting: dict[str, None] = {}  # call ids in order of arrival
        self._failures: dict[str, int] = {}
        self._decisions = 0
        self._demand = DemandSketch(self.settings.demand_every_s)

    @classmethod
    def from_config(cls, config: dict[str, object]) -> Self:
        """Rebuild the agent that wrote a journal; `config` is `msgspec.to_builtins(settings)`."""
        return cls(msgspec.convert(config, RouterSettings))

    def handle(self, message: Message, now_s: float) -> Sequence[Output]:
        match message:
            case CallReady():
                return self._ready(message, now_s)
            case FirstToken():
                return self._first_token(message, now_s)
            case TokensProgressed():
                return self._progressed(message)
            case CallFinished():
                return self._finished(message, now_s)
            case CallFailed():
                return self._failed(message, now_s)
            case CallCancelled():
                return self._cancelled(message)
            case ReplicaChanged():
                return self._replica_changed(message, now_s)
            case SignalReported():
                return self._signal(message)
            case PolicyChanged():
                return self._change_policy(message)
            case WorkflowSubmitted():
                return self._demand.submitted(message.workflow_id, message.kind, now_s)
            case WorkflowEnded():
                self._demand.workflow_ended(message.workflow_id, finished=message.state == "finished", now_s=now_s)
                return ()
            case TimerFired():
                return self._timer(message.key, now_s)
            case (
                DecisionMade()
                | AlertRaised()
                | DemandReported()
                | BoundsChanged()
                | ScaleRequested()
                | ScalingPolicyChanged()
                | ScalePlanned()
            ):
                return ()
            case _:
                assert_never(message)

    def _ready(self, message: CallReady, now_s: float) -> Sequence[Output]:
        call_id = message.call.call_id
        if call_id in self._calls:
            return ()
        self._calls[call_id] = _InFlight(call=message.call, forecast=message.forecast)
        if message.call.model not in self._pools:
            return self._place(call_id, now_s)
        started = self._demand.arrived(message.call, message.forecast.mean, now_s)
        return [*self._place(call_id, now_s), *started]

    def _place(self, call_id: str, now_s: float) -> list[Output]:
        """Dispatch the call, or let it wait for a replica."""
        state = self._calls[call_id]
        pool = self._pools.get(state.call.model)
        if pool is None:
            return [self._refuse(call_id, "no_replica", f"no replica serves the model {state.call.model!r}")]
        if len(columns := pool.eligible(state.tried)) == 0:
            if state.patience_until_s is None:
                state.patience_until_s = now_s + self.settings.queue_timeout_s
            self._waiting[call_id] = None
            return [StartTimer(key=f"queue:{call_id}", at_s=state.patience_until_s)]
        view = pool.view(columns, now_s)
        choice, policy, alerts = self._choose(CallView(call=state.call, forecast=state.forecast), view)
        second = second_of(choice)
        replica_id = pool.replicas[columns[choice.index]].replica_id
        self._decisions += 1
        state.attempt += 1
        state.replica_id = replica_id
        state.work_left, state.work_done = state.forecast.mean, 0.0
        state.context = float(state.call.prompt_tokens)
        pool.dispatched(replica_id, state.call, state.work_left, self._decisions, now_s)
        patience_s = self.settings.first_token_timeout_s if state.call.stream else self.settings.call_timeout_s
        return [
            Dispatch(call_id=call_id, attempt=state.attempt, replica_id=replica_id),
            StartTimer(key=f"answer:{call_id}", at_s=now_s + patience_s),
            DecisionMade(
                decision=Decision(
                    call=state.call,
                    attempt=state.attempt,
                    at_s=now_s,
                    policy=policy.name,
                    parameters=self.parameters if policy is self.policy else _parameters(policy),
                    replica_id=replica_id,
                    runner_up=None if second is None else pool.replicas[columns[second]].replica_id,
                    forecast=state.forecast,
                    candidates=pool.candidates(columns, view, choice, second),
                    note="retry" if state.attempt > 1 else "",
                )
            ),
            *alerts,
        ]

    def _choose(self, call: CallView, view: FleetView) -> tuple[Choice, Policy, list[Output]]:
        """Ask the policy; one that raises or answers nonsense is overruled by `FALLBACK_POLICY`, by name."""
        try:
            choice = self.policy.choose(call, view, self._rng)
            sound = is_sound(choice, len(view))
        except Exception:  # noqa: BLE001  # a policy is a plug-in: whatever it raises must not stop the data path
            sound = False
        if sound:
            return choice, self.policy, []
        alert = AlertRaised(kind="policy_failed", subject=self.policy.name)
        return self._fallback.choose(call, view, self._rng), self._fallback, [alert]

    def _change_policy(self, message: PolicyChanged) -> Sequence[Output]:
        try:
            policy = make_policy(message.policy, message.parameters)
        except ConfigError:  # from a newer version, say: the policy in force stays
            return (AlertRaised(kind="policy_failed", subject=message.policy),)
        self.policy, self.parameters = policy, _parameters(policy)
        return ()

    def _first_token(self, message: FirstToken, now_s: float) -> Sequence[Output]:
        state = self._current(message.call_id, message.attempt)
        if state is None or state.streamed:
            return ()
        state.streamed = True
        return (StartTimer(key=f"answer:{message.call_id}", at_s=now_s + self.settings.call_timeout_s),)

    def _progressed(self, message: TokensProgressed) -> Sequence[Output]:
        state = self._current(message.call_id, message.attempt)
        if state is None or message.work_done <= state.work_done:
            return ()
        left = state.forecast.mean_remaining(message.work_done)
        grown = message.work_done - state.work_done
        if state.replica_id is not None and (pool := self._pool_of.get(state.replica_id)) is not None:
            pool.progressed(state.replica_id, left - state.work_left, grown)
        state.work_left, state.work_done, state.context = left, message.work_done, state.context + grown
        return ()

    def _finished(self, message: CallFinished, now_s: float) -> Sequence[Output]:
        state = self._current(message.call_id, message.attempt)
        if state is None:
            return ()
        replica_id = self._release(state)
        del self._calls[message.call_id]
        self._demand.ended(state.call.model)
        outputs: list[Output] = [StopTimer(key=f"answer:{message.call_id}")]
        if self._failures.pop(replica_id, 0) >= self.settings.breaker_failures:
            outputs += [StopTimer(key=f"breaker:{replica_id}"), *self._close_breaker(replica_id, now_s)]
        return outputs

    def _failed(self, message: CallFailed, now_s: float) -> Sequence[Output]:
        state = self._current(message.call_id, message.attempt)
        if state is None:
            return ()
        outputs: list[Output] = [StopTimer(key=f"answer:{message.call_id}")]
        if message.reason in _REPLICA_FAULTS and state.replica_id is not None:
            outputs += self._count_failure(state.replica_id, now_s)
        retryable = message.retryable and not state.streamed
        return [*outputs, *self._again_or_refuse(message.call_id, message.reason, retryable, now_s)]

    def _again_or_refuse(self, call_id: str, reason: str, retryable: bool, now_s: float) -> list[Output]:
        state = self._calls[call_id]
        state.tried |= {self._release(state)}
        if retryable and state.attempt < self.settings.max_attempts:
            return self._place(call_id, now_s)
        why: RefusalReason = "retries_exhausted" if retryable else "failed"
        return [self._refuse(call_id, why, reason)]

    def _refuse(self, call_id: str, why: RefusalReason, detail: str) -> Refuse:
        state = self._calls.pop(call_id)
        self._waiting.pop(call_id, None)
        self._demand.ended(state.call.model)
        return Refuse(call_id=call_id, reason=why, attempts=state.attempt, detail=detail)

    def _cancelled(self, message: CallCancelled) -> Sequence[Output]:
        state = self._calls.pop(message.call_id, None)
        if state is None:
            return ()
        self._demand.ended(state.call.model)
        if state.replica_id is None:
            self._waiting.pop(message.call_id, None)
            return (StopTimer(key=f"queue:{message.call_id}"),)
        replica_id = self._release(state)
        cancel = Cancel(call_id=message.call_id, attempt=state.attempt, replica_id=replica_id)
        return (cancel, StopTimer(key=f"answer:{message.call_id}"))

    def _replica_changed(self, message: ReplicaChanged, now_s: float) -> Sequence[Output]:
        replica = message.replica
        pool = self._pools.setdefault(replica.model, Pool(replica.model))
        pool.set_state(replica, message.state, now_s)
        outputs: list[Output] = []
        if message.state == "gone":
            self._pool_of.pop(replica.replica_id, None)
            if self._failures.pop(replica.replica_id, 0) >= self.settings.breaker_failures:
                outputs.append(StopTimer(key=f"breaker:{replica.replica_id}"))
            for call_id, state in list(self._calls.items()):
                if state.replica_id == replica.replica_id:
                    outputs += [
                        StopTimer(key=f"answer:{call_id}"),
                        Cancel(call_id=call_id, attempt=state.attempt, replica_id=replica.replica_id),
                    ]
                    outputs += self._again_or_refuse(call_id, "replica_gone", not state.streamed, now_s)
        else:
            self._pool_of[replica.replica_id] = pool
        return [*outputs, *self._drain_queue(replica.model, now_s)]

    def _drain_queue(self, model: str, now_s: float) -> list[Output]:
        pool = self._pools[model]
        outputs: list[Output] = []
        for call_id in [c for c in self._waiting if self._calls[c].call.model == model]:
            if len(pool.eligible(self._calls[call_id].tried)) == 0:
                break
            del self._waiting[call_id]
            outputs += [StopTimer(key=f"queue:{call_id}"), *self._place(call_id, now_s)]
        return outputs

    def _signal(self, message: SignalReported) -> Sequence[Output]:
        pool = self._pool_of.get(message.replica_id)
        if pool is not None:
            pool.set_signal(
                message.replica_id, message.running, message.waiting, message.kv_usage, message.measured_at_s
            )
        return ()

    def _timer(self, key: str, now_s: float) -> Sequence[Output]:
        if key == TIMER:
            return self._demand.report(self._loads(now_s), now_s)
        kind, _, subject = key.partition(":")
        if kind == "queue" and subject in self._waiting:
            return (self._refuse(subject, "no_replica", f"none became ready in {self.settings.queue_timeout_s:g} s"),)
        if kind == "breaker" and subject in self._pool_of:
            self._failures[subject] = self.settings.breaker_failures - 1  # half open: the next failure opens it again
            return self._close_breaker(subject, now_s)
        if kind == "answer" and (state := self._calls.get(subject)) is not None and state.replica_id is not None:
            cancel = Cancel(call_id=subject, attempt=state.attempt, replica_id=state.replica_id)
            faults = self._count_failure(state.replica_id, now_s)
            return [cancel, *faults, *self._again_or_refuse(subject, "timeout", not state.streamed, now_s)]
        return ()

    def _loads(self, now_s: float) -> dict[str, Load]:
        loads: dict[str, Load] = {}
        for model, pool in self._pools.items():
            view = pool.view(np.arange(len(pool)), now_s)
            loads[model] = Load(int(view.in_flight.sum()), 0, float(view.remaining_work.sum()))
        for call_id in self._waiting:
            state = self._calls[call_id]
            load = loads[state.call.model]
            loads[state.call.model] = Load(load.in_flight, load.waiting + 1, load.work_left + state.forecast.mean)
        return loads

    def _count_failure(self, replica_id: str, now_s: float) -> list[Output]:
        """One more failure in a row; from `breaker_failures` on the replica gets no calls for a while."""
        pool = self._pool_of.get(replica_id)
        if pool is None:
            return []
        count = self._failures[replica_id] = self._failures.get(replica_id, 0) + 1
        if count != self.settings.breaker_failures:  # below: not yet; above: open already, these are stragglers
            return []
        pool.set_broken(replica_id, True)
        return [
            AlertRaised(kind="breaker_opened", subject=replica_id, value=float(count)),
            StartTimer(key=f"breaker:{replica_id}", at_s=now_s + self.settings.breaker_open_s),
        ]

    def _close_breaker(self, replica_id: str, now_s: float) -> list[Output]:
        """Let calls through again: its time is over, or a call came back from behind it."""
        pool = self._pool_of[replica_id]
        pool.set_broken(replica_id, False)
        return [AlertRaised(kind="breaker_closed", subject=replica_id), *self._drain_queue(pool.model, now_s)]

    def _current(self, call_id: str, attempt: int) -> _InFlight | None:
        state = self._calls.get(call_id)
        return state if state is not None and state.replica_id is not None and state.attempt == attempt else None

    def _release(self, state: _InFlight) -> str:
        """Take the call off its replica; returns which one that was."""
        replica_id, state.replica_id = state.replica_id, None
        assert replica_id is not None
        if (pool := self._pool_of.get(replica_id)) is not None:
            pool.ended(replica_id, state.work_left, state.context)
        return replica_id

    def in_flight(self, replica_id: str) -> int:
        """How many calls this router has on the replica; none on one that it does not know."""
        pool = self._pool_of.get(replica_id)
        return 0 if pool is None else pool.in_flight(replica_id)

    def validate(self) -> None:
        """Check the memory against itself; tests call it after every step. Raises AssertionError."""
        counts: dict[str, int] = {}
        for call_id, state in self._calls.items():
            assert (call_id in self._waiting) == (state.replica_id is None), f"{call_id} is neither here nor there"
            if state.replica_id is not None:
                counts[state.replica_id] = counts.get(state.replica_id, 0) + 1
        for replica_id, pool in self._pool_of.items():
            assert pool.in_flight(replica_id) == counts.get(replica_id, 0), f"{replica_id} counts its calls wrongly"
        for call_id in self._waiting:
            waited_for = self._pools.get(self._calls[call_id].call.model)
            assert waited_for is None or not len(waited_for.eligible(frozenset())), f"{call_id} waits for nothing"


def _parameters(policy: Policy) -> dict[str, float]:
    return {name: float(getattr(policy, name)) for name in parameters_of(policy.name)}
