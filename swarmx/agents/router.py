"""The router agent: sends every call to a replica with room, keeps exact count, retries what may be retried."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self, assert_never

import msgspec
import numpy as np

from swarmx.agents.accounts import Accounts
from swarmx.agents.admission import Refusal, over_budget, refuse
from swarmx.agents.breakers import REPLICA_FAULTS, Breakers
from swarmx.agents.calls import CallState
from swarmx.agents.demand import DemandSketch, Load, load_of
from swarmx.agents.invariants import check_memory
from swarmx.agents.objective import Objective
from swarmx.agents.placing import Placed, Placing
from swarmx.agents.pool import Pool
from swarmx.agents.put_off import PutOff
from swarmx.agents.router_settings import RouterSettings
from swarmx.agents.waiting_room import Displaced, WaitingRoom
from swarmx.agents.workflow_book import WorkflowBook
from swarmx.core.actions import Cancel, Dispatch, RefusalReason, Refuse, StartTimer, StopTimer
from swarmx.core.messages import (
    AlertRaised,
    BoundsChanged,
    CallCancelled,
    CallFailed,
    CallFinished,
    CallReady,
    DecisionMade,
    DemandReported,
    DrainNoticed,
    FirstToken,
    ForecastRefined,
    ForecastScored,
    Message,
    PolicyChanged,
    PredictorReady,
    ReplicaChanged,
    RetrainEnded,
    ScalePlanned,
    ScaleRequested,
    ScalingPolicyChanged,
    ServiceCurvePublished,
    SignalReported,
    TimerFired,
    TokensProgressed,
    WorkflowEnded,
    WorkflowSubmitted,
)
from swarmx.core.ports import Output, Policy

_NOBODY: frozenset[str] = frozenset()


class RouterAgent:
    """The four parts: forecasts arrive with each call, `_pools` and `_calls` are its memory, `objective`
    is its objective, and `actions` are its tools.

    Late, duplicate and stale messages are ordinary: an event of an attempt that is not the current one is ignored.
    """

    name = "router"
    listens: frozenset[type] = frozenset(
        {
            CallReady,
            ForecastRefined,
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
        self.objective = Objective(self.settings.policy, self.settings.parameters)
        self._book = WorkflowBook(self.settings.targets)
        self._placing = Placing(
            self.objective,
            self._book,
            late_binding=self.settings.late_binding,
            hold_limit_s=self.settings.hold_limit_s,
            rng=np.random.default_rng(self.settings.seed),
        )
        self._pools = {model: self._new_pool(model) for model in self.settings.models}
        self._pool_of: dict[str, Pool] = {}
        self._calls: dict[str, CallState] = {}
        self._accounts = Accounts(self.settings)
        self._room = WaitingRoom(self.settings, self._placing, self._accounts.shares)
        self._unsettled: dict[str, None] = {}  # models whose waiting calls may have got, or lost, a replica
        self._breakers = Breakers(self.settings.breaker_failures, self.settings.breaker_open_s)
        self._decisions = 0
        self._demand = DemandSketch(self.settings.demand_every_s)
        self._put_off = PutOff(self.settings.put_off_s)

    @classmethod
    def from_config(cls, config: dict[str, object]) -> Self:
        """Rebuild the agent that wrote a journal; `config` is `msgspec.to_builtins(settings)`."""
        return cls(msgspec.convert(config, RouterSettings))

    def _new_pool(self, model: str) -> Pool:
        of = self.settings
        return Pool(model, late_binding=of.late_binding, shared=of.shared, seed=of.seed)

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self.objective.policy

    def handle(self, message: Message, now_s: float) -> Sequence[Output]:
        first = self._put_off.done() if self._put_off else ()
        outputs = self._answer(message, now_s)
        while self._unsettled:
            model, _ = self._unsettled.popitem()
            if settled := self._settle(model, now_s):
                outputs = [*outputs, *settled]
        if self._put_off:
            outputs = [*outputs, *self._put_off.handled(now_s)]
        return [*first, *outputs] if first else outputs

    def _answer(self, message: Message, now_s: float) -> Sequence[Output]:
        match message:
            case CallReady():
                return self._ready(message, now_s)
            case ForecastRefined():
                return self._refined(message)
            case FirstToken():
                return self._first_token(message, now_s)
            case TokensProgressed():
                return self._progressed(message)
            case CallFinished():
                return self._finished(message, now_s)
            case CallFailed():
                return self._failed(message, now_s)
            case CallCancelled():
                return self._cancelled(message, now_s)
            case ReplicaChanged():
                return self._replica_changed(message, now_s)
            case SignalReported():
                return self._signal(message)
            case PolicyChanged():
                alerts = self.objective.change(message)
                for waiting in self._room.lines.values():
                    waiting.reorder(lambda state: self._placing.key(state, now_s))
                self._unsettled.update(dict.fromkeys(self._room.lines))
                return alerts
            case WorkflowSubmitted():
                self._book.submitted(message, now_s)
                return self._demand.submitted(message, now_s)
            case WorkflowEnded():
                finished = message.state == "finished"
                self._book.ended(message.workflow_id, finished=finished, now_s=now_s)
                self._demand.workflow_ended(message.workflow_id, finished=finished, now_s=now_s)
                return ()
            case TimerFired():
                return self._timer(message.key, now_s)
            case (
                DecisionMade()
                | AlertRaised()
                | DemandReported()
                | DrainNoticed()
                | BoundsChanged()
                | ScaleRequested()
                | ScalingPolicyChanged()
                | ScalePlanned()
                | ServiceCurvePublished()
                | ForecastScored()
                | RetrainEnded()
                | PredictorReady()
            ):
                return ()
            case _:
                assert_never(message)

    def _ready(self, message: CallReady, now_s: float) -> Sequence[Output]:
        call, call_id = message.call, message.call.call_id
        if call_id in self._calls:
            return ()
        state = CallState(call=call, forecast=message.forecast, path=message.path, ready_at_s=now_s)
        state.priority = self._accounts.priority(call)
        if call.model not in self._pools:
            detail = f"no replica serves the model {call.model!r}"
            return [Refuse(call_id=call_id, reason="no_replica", attempts=0, detail=detail)]
        if (over := self._accounts.accept(state, now_s)) is not None:
            return [refuse(state, over_budget(over))]
        self._calls[call_id] = state
        self._book.call_ready(call, now_s)
        outputs = self._place(state, now_s)
        self._put_off.add(self._demand.arrived, call, message.forecast.mean, now_s)
        return outputs

    def _refined(self, message: ForecastRefined) -> Sequence[Output]:
        """Count on the better forecast from now on, where the call is at a replica as well as where it waits."""
        state = self._calls.get(message.call_id)
        if state is None:
            return ()
        state.forecast = message.forecast
        if state.replica_id is not None:
            left = state.forecast.mean_remaining(state.work_done)
            if (pool := self._pool_of.get(state.replica_id)) is not None:
                pool.progressed(state.replica_id, left - state.work_left, 0.0)
            state.work_left = left
        else:
            self._room[state.call.model].refined(state)
        return ()

    def _place(self, state: CallState, now_s: float) -> Sequence[Output]:
        """Dispatch the call, refuse it, or let it wait for a replica."""
        first = self._put_off.done() if self._put_off else ()
        pool = self._pools[state.call.model]
        if queues := self._room[pool.model].must_queue(state):
            self._unsettled[pool.model] = None
        placed = self._room.enter(state, pool, now_s, queues=queues)
        if isinstance(placed, Placed | Refusal):
            return [*first, *self._send(state, pool, placed, now_s)]
        if isinstance(placed, Displaced):
            return [*first, *placed.timers, self._refuse(placed.state, placed.refusal, now_s)]
        return [*first, *placed]

    def _settle(self, model: str, now_s: float) -> list[Output]:
        """Place the calls that wait, in the order of the policy, while there is room for them."""
        pool, outputs = self._pools[model], self._put_off.done()
        if not self._room[model]:
            return outputs
        for state, placed, left in self._room.call_in(pool, now_s):
            outputs += [*left, *self._send(state, pool, placed, now_s), *self._put_off.done()]
        return [*outputs, *self._room.timers(pool, now_s)]

    def _send(self, state: CallState, pool: Pool, placed: Placed | Refusal, now_s: float) -> list[Output]:
        """Send the call where the policy wants it, unless it is refused."""
        if isinstance(placed, Refusal):
            return [self._refuse(state, placed, now_s)]
        call_id, replica_id = state.call.call_id, pool.replicas[placed.column].replica_id
        state.sent(replica_id, placed.choice, placed.cached_tokens, now_s)
        self._put_off.add(self._sent, state, pool, placed, now_s)
        return [Dispatch(call_id=call_id, attempt=state.attempt, replica_id=replica_id, urgency=placed.choice.urgency)]

    def _sent(self, state: CallState, pool: Pool, placed: Placed, now_s: float) -> Sequence[Output]:
        """All that has to be known of an attempt before anything else happens, but not before it is on its way."""
        call, replica_id, cached_tokens = state.call, pool.replicas[placed.column].replica_id, placed.cached_tokens
        self._decisions += 1
        self._accounts.sent(state, self._room[pool.model], cached_tokens)
        if placed.choice.expected_s is not None:
            self._book.call_placed(call.workflow_id, call.call_id, now_s + placed.choice.expected_s)
        patience_s = self.settings.first_token_timeout_s if call.stream else self.settings.call_timeout_s
        outputs: list[Output] = [StartTimer(key=f"answer:{call.call_id}", at_s=now_s + patience_s)]
        if self.settings.log_decisions:
            outputs.append(self._placing.decision(state, pool, placed, now_s))
        pool.dispatched(replica_id, call, state.forecast, self._decisions, now_s, cached_tokens, state.weight)
        return [*outputs, *placed.alerts]

    def _first_token(self, message: FirstToken, now_s: float) -> Sequence[Output]:
        state = self._current(message.call_id, message.attempt)
        if state is None or state.streamed:
            return ()
        state.streamed = True
        if state.replica_id is not None and (pool := self._pool_of.get(state.replica_id)) is not None:
            pool.prompt_read(state.replica_id, state.unread)
        state.unread = 0.0
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
        replica_id = self._release(state, now_s)
        del self._calls[message.call_id]
        self._accounts.finished(state, self._room[state.call.model], message, now_s)
        self._placing.took(state, now_s)
        self._room.ended(state.call.model, message.work_done, now_s)
        self._book.call_ended(state.call, now_s - state.dispatched_at_s, message.work_done)
        self._demand.ended(state.call.model)
        pool = self._pool_of.get(replica_id)
        if pool is not None and (ratio := state.slowness(message.work_done, now_s)) is not None:
            pool.took(replica_id, ratio)
        return [StopTimer(key=f"answer:{message.call_id}"), *self._breakers.answered(pool, replica_id)]

    def _failed(self, message: CallFailed, now_s: float) -> Sequence[Output]:
        state = self._current(message.call_id, message.attempt)
        if state is None:
            return ()
        outputs: list[Output] = [StopTimer(key=f"answer:{message.call_id}")]
        if message.reason in REPLICA_FAULTS and state.replica_id is not None:
            outputs += self._breakers.failed(self._pool_of.get(state.replica_id), state.replica_id, now_s)
        retryable = message.retryable and not state.streamed
        return [*outputs, *self._again_or_refuse(message.call_id, message.reason, retryable, now_s)]

    def _again_or_refuse(self, call_id: str, reason: str, retryable: bool, now_s: float) -> Sequence[Output]:
        state = self._calls[call_id]
        state.tried |= {self._release(state, now_s)}
        self._accounts.failed(state, self._room[state.call.model])
        if retryable and state.attempt < self.settings.max_attempts:
            return self._place(state, now_s)
        why: RefusalReason = "retries_exhausted" if retryable else "failed"
        return [self._refuse(state, Refusal(reason=why, detail=reason), now_s)]

    def _refuse(self, state: CallState, refusal: Refusal, now_s: float) -> Refuse:
        """The call ends here, without an answer."""
        del self._calls[state.call.call_id]
        self._demand.ended(state.call.model)
        self._accounts.given_up(state, now_s)
        return refuse(state, refusal)

    def _cancelled(self, message: CallCancelled, now_s: float) -> Sequence[Output]:
        state = self._calls.pop(message.call_id, None)
        if state is None:
            return ()
        self._demand.ended(state.call.model)
        waiting = self._room[state.call.model]
        self._accounts.cancelled(state, waiting, now_s, at_replica=state.replica_id is not None)
        if state.replica_id is None:
            return waiting.remove(state)
        replica_id = self._release(state, now_s)
        cancel = Cancel(call_id=message.call_id, attempt=state.attempt, replica_id=replica_id)
        return (cancel, StopTimer(key=f"answer:{message.call_id}"))

    def _replica_changed(self, message: ReplicaChanged, now_s: float) -> Sequence[Output]:
        replica = message.replica
        pool = self._pools.get(replica.model)
        if pool is None:
            pool = self._pools[replica.model] = self._new_pool(replica.model)
        pool.set_state(replica, message.state, now_s)
        self._unsettled[pool.model] = None
        outputs: list[Output] = []
        if message.state == "gone":
            self._pool_of.pop(replica.replica_id, None)
            outputs += self._breakers.forget(replica.replica_id)
            for call_id, state in list(self._calls.items()):
                if state.replica_id == replica.replica_id:
                    cancel = Cancel(call_id=call_id, attempt=state.attempt, replica_id=replica.replica_id)
                    outputs += [StopTimer(key=f"answer:{call_id}"), cancel]
                    outputs += self._again_or_refuse(call_id, "replica_gone", state.movable, now_s)
        else:
            self._pool_of[replica.replica_id] = pool
        return outputs

    def _signal(self, message: SignalReported) -> Sequence[Output]:
        pool = self._pool_of.get(message.replica_id)
        if pool is not None:
            told = (message.running, message.waiting, message.kv_usage, message.measured_at_s)
            if pool.set_signal(message.replica_id, *told) and self._room[pool.model]:
                self._unsettled[pool.model] = None  # another router's calls have left, perhaps
        return ()

    def _timer(self, key: str, now_s: float) -> Sequence[Output]:
        kind, _, subject = key.partition(":")
        state = self._calls.get(subject)
        waits = state is not None and state.replica_id is None
        match kind:
            case "put_off":
                self._put_off.timer_fired()
            case "demand":
                return self._demand.report(self._loads(now_s), now_s)
            case "hold" if subject in self._pools:
                self._room.looks_again(subject)
                self._unsettled[subject] = None
            case "breaker" if (pool := self._pool_of.get(subject)) is not None:
                self._unsettled[pool.model] = None
                return self._breakers.half_open(pool, subject)
            case "queue" if waits and state is not None:
                return self._out_of_patience(state, now_s)
            case "deadline" if waits and state is not None:
                left = self._room[state.call.model].remove(state)
                late = Refusal(reason="deadline", detail="it came while the call waited", retry_after_s=0.0)
                return [*left, self._refuse(state, late, now_s)]
            case "answer" if state is not None and state.replica_id is not None:
                cancel = Cancel(call_id=subject, attempt=state.attempt, replica_id=state.replica_id)
                faults = self._breakers.failed(self._pool_of.get(state.replica_id), state.replica_id, now_s)
                return [cancel, *faults, *self._again_or_refuse(subject, "timeout", state.movable, now_s)]
        return ()

    def _out_of_patience(self, state: CallState, now_s: float) -> Sequence[Output]:
        """Give the call up, unless there are replicas by now: then it waits for room."""
        waiting = self._room[state.call.model]
        waiting.untimed[state.call.call_id] = state  # its timer has just run out
        if len(self._pools[state.call.model].eligible(_NOBODY)):
            return ()
        detail = f"none became ready in {self.settings.queue_timeout_s:g} s"
        return [*waiting.remove(state), self._refuse(state, Refusal(reason="no_replica", detail=detail), now_s)]

    def _loads(self, now_s: float) -> dict[str, Load]:
        return {model: load_of(pool, self._room[model], now_s) for model, pool in self._pools.items()}

    def _current(self, call_id: str, attempt: int) -> CallState | None:
        state = self._calls.get(call_id)
        return state if state is not None and state.replica_id is not None and state.attempt == attempt else None

    def _release(self, state: CallState, now_s: float) -> str:
        """Take the call off its replica; returns which one that was."""
        replica_id, state.replica_id = state.replica_id, None
        assert replica_id is not None
        self._book.call_left(state.call.workflow_id, state.call.call_id)
        if (pool := self._pool_of.get(replica_id)) is not None:
            pool.prompt_read(replica_id, state.unread)
            pool.ended(replica_id, state.work_left, state.variance, state.context, now_s, state.shared, state.weight)
            self._unsettled[pool.model] = None
        return replica_id

    def in_flight(self, replica_id: str) -> int:
        """How many calls this router has on the replica; none on one that it does not know."""
        self._put_off.do()
        pool = self._pool_of.get(replica_id)
        return 0 if pool is None else pool.in_flight(replica_id)

    def validate(self) -> None:
        """Check the memory against itself; tests call it after every step. Raises AssertionError."""
        self._put_off.do()
        check_memory(self._calls, self._room.lines, self._pools, self._pool_of, policy_waits=self.policy.waits)
