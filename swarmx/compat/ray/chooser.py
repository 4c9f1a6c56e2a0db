"""The router agent for a program that has no event loop: it is asked for a place, and has one at once."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from swarmx.agents.router import RouterAgent
from swarmx.agents.router_settings import RouterSettings
from swarmx.compat.ray.lane import Lane
from swarmx.compat.ray.options import RoutingOptions
from swarmx.compat.ray.speeds import Speeds
from swarmx.compat.ray_serve.decision_log import DecisionLog
from swarmx.core.actions import Action, Dispatch, StartTimer, StopTimer
from swarmx.core.engine import EngineProfile
from swarmx.core.forecast import Forecast
from swarmx.core.messages import (
    CallFailed,
    CallFinished,
    CallReady,
    DecisionMade,
    Message,
    ReplicaChanged,
    TimerFired,
    WorkflowEnded,
    WorkflowSubmitted,
)
from swarmx.core.nouns import Call, FailureReason, Replica
from swarmx.core.prompts import Encoding, PromptText
from swarmx.neural.empirical import EmpiricalForecaster
from swarmx.runtime.clock import Clock
from swarmx.runtime.journal import Journal
from swarmx.runtime.requests import new_id
from swarmx.runtime.switchboard import Switchboard

_NEWS = 1.05  # a factor that changed by less is not told
_PATIENCE_S = 1e7  # Ray decides how long a call may take
_STALE = 64  # timers that were stopped are thrown away when there are more of them than of others, and than this
_NO_PROMPT = PromptText(text=b"", total_bytes=0)


class NoPlace(Exception):
    """The agent has none, or failed."""


@dataclass(slots=True, kw_only=True, eq=False)
class Sent:
    """One call where it went."""

    call: Call
    encoding: Encoding
    forecast: Forecast
    place: str
    attempt: int


class Chooser:
    """Places by name, each with so many slots. Safe to use from several threads.

    The agent binds early: a call waits at its place, in Ray, and not here.
    """

    def __init__(
        self,
        model: str,
        options: RoutingOptions,
        *,
        clock: Clock,
        decisions: DecisionLog | None = None,
        journal: Journal | None = None,
    ) -> None:
        self.model = model
        self._options = options
        self._clock = clock
        self._decisions = decisions
        self._switchboard = Switchboard(
            [RouterAgent(self.settings(model, options))],
            epoch=int(clock.now_s()),
            journal=journal,
        )
        self._switchboard.observers.append(self._observe)
        self._forecaster = EmpiricalForecaster()
        self._speeds = Speeds()
        self._lanes: dict[str, Lane] = {}
        self._replicas: dict[str, Replica] = {}
        self._there: dict[str, Sent] = {}
        self._timers: dict[str, float] = {}
        self._due: list[tuple[float, str]] = []
        self._dispatched: Dispatch | None = None
        self._lock = threading.RLock()

    @staticmethod
    def settings(model: str, options: RoutingOptions) -> RouterSettings:
        """The agent's own form of the options."""
        return RouterSettings(
            policy=options.policy,
            parameters=options.parameters,
            seed=options.seed,
            max_attempts=1,
            late_binding=False,
            first_token_timeout_s=_PATIENCE_S,
            call_timeout_s=_PATIENCE_S,
            demand_every_s=0.0,
            models=[model],
        )

    @property
    def faults(self) -> int:
        """Messages that the agent, or who watches it, failed on."""
        return self._switchboard.faults

    def places(self, wanted: Mapping[str, int]) -> None:
        """These places there are now, with so many slots each, and no others."""
        with self._lock:
            for place in self._lanes.keys() - wanted.keys():
                self._lost(place)
            for place, slots in wanted.items():
                if place not in self._lanes:
                    self._lanes[place] = Lane(slots)
                    self._tell_speed(place)

    def lost(self, place: str) -> None:
        """The place is gone, with the calls that it had."""
        with self._lock:
            self._lost(place)

    def send(self, method: str, size_class: int) -> Sent:
        """Choose a place for a call. Raises NoPlace."""
        with self._lock:
            call_id = new_id("call")
            call = self._call(call_id, method, size_class)
            encoding = self._forecaster.encode(call, _NO_PROMPT)
            forecast = self._forecaster.forecast(call, encoding)
            self._dispatched = None
            self._post(WorkflowSubmitted(workflow_id=call.workflow_id, kind=call.workflow_kind))
            self._post(CallReady(call=call, forecast=forecast))
            chosen = self._dispatched
            if chosen is None or chosen.call_id != call_id or chosen.replica_id not in self._lanes:
                self._post(WorkflowEnded(workflow_id=call.workflow_id, state="failed"))
                raise NoPlace(f"{self.model}: none of {len(self._lanes)} places for {method}")
            sent = Sent(
                call=call, encoding=encoding, forecast=forecast, place=chosen.replica_id, attempt=chosen.attempt
            )
            self._lanes[sent.place].sent(call_id, self._clock.now_s())
            self._there[call_id] = sent
            return sent

    def ended(self, sent: Sent, failed: FailureReason | None = None) -> None:
        """The call is over, with an answer or (`failed`) without. Twice is fine."""
        with self._lock:
            call_id = sent.call.call_id
            if self._there.pop(call_id, None) is None:
                return
            took_s = self._lanes[sent.place].ended(call_id, self._clock.now_s())
            if failed is not None:
                self._post(CallFailed(call_id=call_id, attempt=sent.attempt, reason=failed, retryable=False))
            else:
                work = sent.forecast.mean if took_s is None else took_s / self._speeds.factor(sent.place)
                self._post(
                    CallFinished(
                        call_id=call_id, attempt=sent.attempt, prompt_tokens=0, cached_tokens=0, work_done=work
                    )
                )
                if took_s is not None:
                    self._learn(sent, took_s, work)
            workflow_id = sent.call.workflow_id
            self._post(WorkflowEnded(workflow_id=workflow_id, state="finished" if failed is None else "failed"))

    def in_flight(self) -> dict[str, int]:
        """Calls at each place."""
        with self._lock:
            return {place: len(lane) for place, lane in self._lanes.items()}

    def close(self) -> None:
        if self._decisions is not None:
            self._decisions.close()

    def _call(self, call_id: str, method: str, size_class: int) -> Call:
        return Call(
            call_id=call_id,
            tenant="ray",
            kind="tool",
            model=self.model,
            role=f"{method}~{size_class}",
            workflow_id=call_id,
            workflow_kind=self._options.kind,
            node=method,
            prompt_key="",
            prompt_bytes=0,
            prompt_tokens=0,
            work_limit=_PATIENCE_S,
        )

    def _learn(self, sent: Sent, took_s: float, work: float) -> None:
        expected, is_guess = sent.forecast.mean, sent.forecast.source == "prior"
        self._forecaster.observe(sent.call, sent.encoding, work)
        if not is_guess:
            self._speeds.observe(sent.place, took_s, expected)
            for place in self._lanes:
                self._tell_speed(place)

    def _tell_speed(self, place: str) -> None:
        factor = self._speeds.factor(place)
        known = self._replicas.get(place)
        if known is not None and max(factor / known.profile.step_base_s, known.profile.step_base_s / factor) < _NEWS:
            return
        profile = EngineProfile(model=self.model, device="ray", step_base_s=factor, max_batch=self._lanes[place].slots)
        replica = Replica(
            replica_id=place,
            model=self.model,
            kind="tool",
            device="ray",
            url="",
            profile=profile,
            provider="ray",
            emulated=False,
        )
        self._replicas[place] = replica
        self._post(ReplicaChanged(replica=replica, state="ready"))

    def _lost(self, place: str) -> None:
        lane = self._lanes.get(place)
        if lane is None:
            return
        self._post(ReplicaChanged(replica=self._replicas[place], state="draining"))  # or it would get calls meanwhile
        for sent in [sent for sent in self._there.values() if sent.place == place]:
            self.ended(sent, failed="replica_gone")
        del self._lanes[place]
        self._speeds.forget(place)
        self._post(ReplicaChanged(replica=self._replicas.pop(place), state="gone"))

    def _post(self, message: Message) -> None:
        now_s = self._clock.now_s()
        while self._due and self._due[0][0] <= now_s:
            at_s, key = heapq.heappop(self._due)
            if self._timers.get(key) == at_s:
                del self._timers[key]
                self._deliver(TimerFired(key=key), now_s)
        self._deliver(message, now_s)

    def _deliver(self, message: Message, now_s: float) -> None:
        for command in self._switchboard.deliver(message, now_s):
            self._perform(command.action)

    def _perform(self, action: Action) -> None:
        """Timers fire when somebody comes next: nothing here needs them sooner."""
        match action:
            case StartTimer():
                self._timers[action.key] = action.at_s
                heapq.heappush(self._due, (action.at_s, action.key))
                if len(self._due) > 2 * len(self._timers) + _STALE:
                    self._due = sorted((at_s, key) for key, at_s in self._timers.items())
            case StopTimer():
                self._timers.pop(action.key, None)
            case Dispatch():
                self._dispatched = action
            case _:
                pass  # Ray stops what it has sent by itself

    def _observe(self, message: Message, now_s: float) -> None:
        if isinstance(message, DecisionMade) and self._decisions is not None:
            self._decisions.write(message.decision)
