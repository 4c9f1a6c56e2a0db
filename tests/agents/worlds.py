"""Calls and replicas to test with, a referee that checks every step of a router, and a world that misbehaves."""

from __future__ import annotations

import asyncio
import math
import selectors
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any, TypeVarTuple

import msgspec
import numpy as np

from swarmx.agents.router import RouterAgent
from swarmx.agents.router_settings import RouterSettings, TenantSettings
from swarmx.core.actions import Action, Cancel, Dispatch, Refuse, StartTimer, StopTimer
from swarmx.core.engine import EngineProfile
from swarmx.core.forecast import Forecast, from_samples
from swarmx.core.messages import (
    AlertRaised,
    CallCancelled,
    CallFailed,
    CallFinished,
    CallReady,
    FirstToken,
    Message,
    ReplicaChanged,
    SignalReported,
    TimerFired,
    TokensProgressed,
)
from swarmx.core.nouns import Call, CallKind, Replica, ReplicaState
from swarmx.core.ports import Output
from swarmx.core.prompts import Encoding, PromptText, cut
from swarmx.runtime.journal import Journal
from swarmx.runtime.live import LiveShell
from swarmx.runtime.switchboard import Switchboard
from swarmx.runtime.virtual import VirtualShell

_Ts = TypeVarTuple("_Ts")

FAST = EngineProfile(
    model="m",
    device="fast",
    step_base_s=0.01,
    decode_seq_s=0.0002,
    decode_ctx_token_s=1e-8,
    prefill_token_s=2e-5,
    prefill_ctx_token_s=1e-9,
    call_base_s=0.005,
    max_batch=8,
)
FORECAST = from_samples([40.0, 60.0, 100.0, 150.0, 400.0], unit="tokens")
PROMPT: PromptText = cut(b"Write a report.")
UNREAD = Encoding(encoder="", vector=np.zeros(0, dtype=np.float32))


def a_profile(*, speed: float = 1.0, **changes: Any) -> EngineProfile:
    """`FAST`, so many times faster, with changes."""
    known = {name: getattr(FAST, name) for name in FAST.__struct_fields__}
    return EngineProfile(**(known | changes)).scaled(speed)


def a_replica(replica_id: str, *, model: str = "m", profile: EngineProfile = FAST, url: str = "http://r") -> Replica:
    return Replica(
        replica_id=replica_id,
        model=model,
        kind="llm",
        device=profile.device,
        url=url,
        profile=profile,
        provider="test",
        emulated=True,
    )


def a_call(
    call_id: str,
    *,
    model: str = "m",
    role: str = "writer",
    kind: CallKind = "llm",
    prompt_tokens: int = 100,
    work_limit: float = 500.0,
    stream: bool = False,
    tenant: str = "t",
    **more: Any,
) -> Call:
    return Call(
        call_id=call_id,
        tenant=tenant,
        kind=kind,
        model=model,
        role=role,
        workflow_id="w",
        workflow_kind="report",
        node="n",
        prompt_key="0" * 16,
        prompt_bytes=4 * prompt_tokens,
        prompt_tokens=prompt_tokens,
        work_limit=work_limit,
        stream=stream,
        **more,
    )


def ready(call_id: str, *, forecast: Forecast = FORECAST, **about: Any) -> CallReady:
    return CallReady(call=a_call(call_id, **about), forecast=forecast)


def changed(replica_id: str, state: ReplicaState = "ready", **about: Any) -> ReplicaChanged:
    return ReplicaChanged(replica=a_replica(replica_id, **about), state=state)


def finished(call_id: str, attempt: int = 1, *, work_done: float = 100.0) -> CallFinished:
    return CallFinished(call_id=call_id, attempt=attempt, prompt_tokens=100, cached_tokens=0, work_done=work_done)


def failed(call_id: str, attempt: int = 1, *, reason: Any = "connect", retryable: bool = True) -> CallFailed:
    return CallFailed(call_id=call_id, attempt=attempt, reason=reason, retryable=retryable)


def dispatches(outputs: Iterable[Output]) -> list[str]:
    """Where the outputs send calls."""
    return [output.replica_id for output in outputs if isinstance(output, Dispatch)]


@dataclass(slots=True, kw_only=True)
class _Seen:
    """What the referee knows of a call."""

    call: Call
    attempt: int = 0
    replica_id: str | None = None
    streamed: bool = False
    tried: set[str] = field(default_factory=set)
    ended: int = 0
    waits_since: int | None = None  # the number of the message after which it waited


class Referee:
    """A router with somebody who keeps books of his own beside it and raises AssertionError at the first foul."""

    def __init__(self, settings: RouterSettings) -> None:
        self.agent = RouterAgent(settings)
        self.name = self.agent.name
        self.listens = self.agent.listens
        self.actions = self.agent.actions
        self.timers: dict[str, float] = {}
        self.calls: dict[str, _Seen] = {}
        self.most_waiting = 0
        self._states: dict[str, tuple[Replica, ReplicaState]] = {}
        self._broken: set[str] = set()
        self._messages = 0

    def handle(self, message: Message, now_s: float) -> Sequence[Output]:
        self._messages += 1
        self._hear(message)
        outputs = self.agent.handle(message, now_s)
        for output in outputs:
            self._check(output)
        self.agent.validate()
        self._check_books()
        return outputs

    def live_calls(self) -> list[str]:
        return [call_id for call_id, seen in self.calls.items() if not seen.ended]

    def calls_on_replicas(self) -> list[str]:
        return [call_id for call_id in self.live_calls() if self.calls[call_id].replica_id is not None]

    def check_settled(self) -> None:
        """Every call ended exactly once and nothing is left over."""
        assert {call_id: seen.ended for call_id, seen in self.calls.items() if seen.ended != 1} == {}
        assert [key for key in self.timers if not key.startswith("breaker:")] == []
        assert [replica_id for replica_id in self._states if self.agent.in_flight(replica_id)] == []

    def _current(self, call_id: str, attempt: int) -> _Seen | None:
        seen = self.calls.get(call_id)
        on_replica = seen is not None and not seen.ended and seen.replica_id is not None
        return seen if on_replica and seen is not None and seen.attempt == attempt else None

    def _hear(self, message: Message) -> None:
        match message:
            case CallReady(call=call):
                if call.call_id not in self.calls or self.calls[call.call_id].ended:
                    self.calls[call.call_id] = _Seen(call=call)
            case FirstToken():
                if seen := self._current(message.call_id, message.attempt):
                    seen.streamed = True
            case CallFinished():
                if seen := self._current(message.call_id, message.attempt):
                    seen.replica_id = None
                    seen.ended += 1
            case CallFailed():
                if seen := self._current(message.call_id, message.attempt):
                    self._off(seen)
            case CallCancelled():
                if (cancelled := self.calls.get(message.call_id)) is not None and not cancelled.ended:
                    cancelled.ended += 1
            case ReplicaChanged(replica=replica, state=state):
                if state == "gone":
                    self._states.pop(replica.replica_id, None)
                    self._broken.discard(replica.replica_id)
                else:
                    self._states[replica.replica_id] = (replica, state)
            case TimerFired(key=key):
                self.timers.pop(key, None)
            case _:
                pass

    def _check(self, output: Output) -> None:
        match output:
            case Dispatch():
                self._check_dispatch(output)
            case Cancel():
                seen = self.calls[output.call_id]
                assert (seen.attempt, seen.replica_id) == (output.attempt, output.replica_id), "cancels what is not"
                self._off(seen)
            case Refuse():
                self.calls[output.call_id].ended += 1
                assert self.calls[output.call_id].replica_id is None
            case StartTimer():
                self.timers[output.key] = output.at_s
            case StopTimer():
                self.timers.pop(output.key, None)
            case AlertRaised(kind="breaker_opened"):
                self._broken.add(output.subject)
            case AlertRaised(kind="breaker_closed"):
                self._broken.discard(output.subject)
            case _:
                pass

    def _check_dispatch(self, action: Dispatch) -> None:
        seen = self.calls[action.call_id]
        assert not seen.ended, "dispatches a call that has ended"
        assert seen.replica_id is None, "dispatches a call that is on a replica"
        assert not seen.streamed, "retries after the first token"
        assert action.attempt == seen.attempt + 1 <= self.agent.settings.max_attempts
        open_ids = self._open_ids(seen.call.model)
        assert action.replica_id in open_ids, f"{action.replica_id} does not take calls"
        if action.replica_id in seen.tried:
            assert open_ids <= seen.tried, "goes back to a replica that failed it, though there are others"
        assert self._has_room(action.replica_id), f"{action.replica_id} is full"
        self._check_turn(seen)
        seen.attempt, seen.replica_id, seen.waits_since = action.attempt, action.replica_id, None

    def _check_turn(self, seen: _Seen) -> None:
        """First come first served among the calls of a tenant that were tried nowhere, or on the same replicas."""
        if seen.tried and seen.waits_since is None:  # a retry may go before those that wait
            return
        if self.agent.policy.order != "arrival" or self.agent.policy.waits:
            return
        if seen.tried and len({other.call.priority for other in self.calls.values()}) > 1:
            return  # what counts for one that has aged is how long it has been ready
        before = self._messages if seen.waits_since is None else seen.waits_since
        for other in self.calls.values():
            alike = self._kind_of(other) == self._kind_of(seen) and not other.ended
            if alike and other.waits_since is not None:
                assert other.waits_since >= before, f"{seen.call.call_id} goes before {other.call.call_id}"

    @staticmethod
    def _kind_of(seen: _Seen) -> tuple[object, ...]:
        return seen.call.model, seen.tried, seen.call.tenant, seen.call.priority

    def _open_ids(self, model: str) -> set[str]:
        return {
            replica_id
            for replica_id, (replica, state) in self._states.items()
            if (replica.model, state) == (model, "ready") and replica_id not in self._broken
        }

    def _has_room(self, replica_id: str) -> bool:
        in_flight = sum(not seen.ended and seen.replica_id == replica_id for seen in self.calls.values())
        return not self.agent.settings.late_binding or in_flight < self._states[replica_id][0].profile.max_batch

    def _check_books(self) -> None:
        counts: dict[str, int] = {}
        answers, queued, must_hurry = set[str](), set[str](), set[str]()
        rooms = {model: self._open_ids(model) for model in {replica.model for replica, _ in self._states.values()}}
        roomy = {replica_id for ids in rooms.values() for replica_id in ids if self._has_room(replica_id)}
        busy = {seen.replica_id for seen in self.calls.values() if not seen.ended and seen.replica_id is not None}
        for call_id, seen in self.calls.items():
            assert seen.ended <= 1, f"{call_id} ended twice"
            if seen.ended:
                continue
            if seen.replica_id is not None:
                answers.add(f"answer:{call_id}")
                counts[seen.replica_id] = counts.get(seen.replica_id, 0) + 1
                continue
            queued.add(f"queue:{call_id}")
            seen.waits_since = self._messages if seen.waits_since is None else seen.waits_since
            if not (open_ids := rooms.get(seen.call.model, set())):
                must_hurry.add(f"queue:{call_id}")
            could = roomy & ((open_ids - seen.tried) or open_ids)
            may_hold = self.agent.policy.waits and bool(open_ids & busy)  # for a busy one that will have done
            assert not could or may_hold, f"{call_id} waits though there is room"
        self.most_waiting = max(self.most_waiting, len(queued - must_hurry))
        others = ("breaker:", "hold:", "deadline:", "demand")
        timers = {key for key in self.timers if not key.startswith(others)}
        assert answers | must_hurry <= timers <= answers | queued
        assert {key for key in self.timers if key.startswith("breaker:")} == {f"breaker:{i}" for i in self._broken}
        due = {
            f"deadline:{i}"
            for i, s in self.calls.items()
            if f"queue:{i}" in queued and s.call.deadline_at_s is not None
        }
        assert {key for key in self.timers if key.startswith("deadline:")} == due
        assert {i: self.agent.in_flight(i) for i in self._states if self.agent.in_flight(i)} == counts

    @staticmethod
    def _off(seen: _Seen) -> None:
        if seen.replica_id is not None:
            seen.tried.add(seen.replica_id)
        seen.replica_id = None


TENANTS = {
    "t": TenantSettings(priority=2),
    "heavy": TenantSettings(weight=3.0, priority=1),
    "poor": TenantSettings(tokens_per_minute=2_000.0, priority=-1),
}

# Reports no demand: there is nobody here to hear of it.
IMPATIENT = RouterSettings(
    max_attempts=3,
    queue_timeout_s=4.0,
    first_token_timeout_s=3.0,
    call_timeout_s=20.0,
    breaker_open_s=2.0,
    demand_every_s=0.0,
)


class ChaosWorld:
    """Replicas that answer after `EngineProfile.alone_s`, or fail, hang, vanish, or say the same thing twice.

    It does not take back what it has set going when a call is cancelled, so that late answers are common.
    """

    def __init__(self, seed: int, *, replicas: int = 4) -> None:
        self._rng = np.random.default_rng(seed)
        self._profiles = {f"r{i}": a_profile(speed=2.0**-i, max_batch=1 + i) for i in range(replicas)}

    def inputs(self, calls: int) -> Iterator[tuple[float, Message]]:
        """Replicas come up, calls arrive, some clients leave, replicas go and come back."""
        for replica_id in self._profiles:
            yield self._at(1.0), self._changed(replica_id, "ready")
        for number in range(calls):
            at_s, call_id = self._at(10.0), f"c{number}"
            message = ready(call_id, stream=self._rng.random() < 0.5, prompt_tokens=int(self._rng.integers(1, 3000)))
            yield at_s, message
            if self._rng.random() < 0.2:
                yield at_s, message
            if self._rng.random() < 0.1:
                yield at_s + self._at(3.0), CallCancelled(call_id=call_id)
        states: list[ReplicaState] = ["gone", "draining", "cordoned", "starting"]
        for replica_id in self._profiles:
            leaves_s = 1.0 + self._at(8.0)
            yield leaves_s, self._changed(replica_id, states[int(self._rng.integers(4))])
            yield leaves_s + self._at(4.0), self._changed(replica_id, "ready")
            signal = SignalReported(replica_id=replica_id, running=1, waiting=0, kv_usage=0.1, measured_at_s=1.0)
            yield self._at(10.0), signal
        yield 5.0, finished("nobody")
        yield 5.0, TimerFired(key="answer:nobody")

    def perform(self, action: Action, now_s: float) -> Iterator[tuple[float, Message]]:
        if not isinstance(action, Dispatch):
            return
        call_id, attempt = action.call_id, action.attempt
        work = float(self._rng.integers(1, 400))
        whole_s = self._profiles[action.replica_id].alone_s(500, work) + self._at(0.01)
        fate = self._rng.random()
        if fate < 0.1:
            return  # hangs
        if fate < 0.3:
            yield self._at(0.5), failed(call_id, attempt, reason="bad_answer")
            return
        if self._rng.random() < 0.5:
            yield whole_s * 0.2, FirstToken(call_id=call_id, attempt=attempt)
            yield whole_s * 0.6, TokensProgressed(call_id=call_id, attempt=attempt, work_done=work / 2)
        if fate < 0.4:
            return  # hangs, perhaps in the middle of its answer
        if fate < 0.5:
            yield whole_s * 0.8, failed(call_id, attempt, reason="connection_lost", retryable=False)
            return
        yield whole_s, finished(call_id, attempt, work_done=work)
        if fate < 0.6:
            yield whole_s + self._at(1.0), finished(call_id, attempt, work_done=work)

    def _changed(self, replica_id: str, state: ReplicaState) -> ReplicaChanged:
        return changed(replica_id, state, profile=self._profiles[replica_id])

    def _at(self, within_s: float) -> float:
        return float(self._rng.random()) * within_s


def run_virtual(seed: int, journal: Journal, *, calls: int = 40, late_binding: bool = True) -> Referee:
    """The whole schedule in the virtual-time shell."""
    referee = Referee(msgspec.structs.replace(IMPATIENT, late_binding=late_binding))
    world = ChaosWorld(seed)
    switchboard = Switchboard([referee], epoch=1, journal=journal)
    shell = VirtualShell(switchboard, world)
    for at_s, message in world.inputs(calls):
        shell.post(message, at_s=at_s)
    shell.run()
    assert switchboard.faults == 0
    return referee


def run_live(seed: int, journal: Journal, *, calls: int = 40, late_binding: bool = True) -> Referee:
    """The whole schedule in the live shell, on an event loop that leaps over the time in which nothing happens."""
    referee = Referee(msgspec.structs.replace(IMPATIENT, late_binding=late_binding))
    world = ChaosWorld(seed)
    switchboard = Switchboard([referee], epoch=1, journal=journal)
    loop = LeapingLoop()
    try:
        loop.run_until_complete(_live(loop, switchboard, world, calls))
    finally:
        loop.close()
    assert switchboard.faults == 0
    return referee


async def _live(loop: LeapingLoop, switchboard: Switchboard, world: ChaosWorld, calls: int) -> None:
    def perform(action: Action) -> None:
        for delay_s, message in world.perform(action, loop.now_s()):
            loop.call_later(delay_s, shell.post, message)

    shell = LiveShell(switchboard, loop, performers(perform))
    for at_s, message in world.inputs(calls):
        loop.call_at(at_s, shell.post, message)
    await asyncio.sleep(1000.0)
    shell.close()


def performers(perform: Any) -> Mapping[type, Any]:
    return {Dispatch: perform, Cancel: perform, Refuse: perform}


class LeapingLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer instead of waiting for it; also its own `Clock`.

    Timers that are due at once fire in the order in which they were started, as they do in virtual time.
    """

    def __init__(self) -> None:
        self._leapt_s = 0.0
        self._due_s = set[float]()
        super().__init__(_LeapingSelector(self))

    def time(self) -> float:
        return self._leapt_s

    def now_s(self) -> float:
        return self._leapt_s

    def call_at(
        self, when: float, callback: Callable[[*_Ts], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        while when in self._due_s:
            when = math.nextafter(when, math.inf)
        self._due_s.add(when)
        return super().call_at(when, callback, *args, context=context)

    def leap(self, by_s: float) -> None:
        self._leapt_s += by_s


class _LeapingSelector(selectors.SelectSelector):
    def __init__(self, loop: LeapingLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout:
            self._loop.leap(timeout)
        return super().select(0)
