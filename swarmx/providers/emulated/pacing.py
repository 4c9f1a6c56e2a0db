"""Runs the pure engine on the wall clock, and tells each call when its tokens are due."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from swarmx.core.batching import Counters, Engine, Event, Request
from swarmx.core.engine import EngineProfile
from swarmx.core.nouns import EngineOrder
from swarmx.providers.emulated.telemetry import Ended, Telemetry

EndReason = Literal["stop", "length"]


@dataclass(slots=True, kw_only=True, eq=False)
class Run:
    """One call inside the engine; `started` and `finished` resolve when its first and its last token are due."""

    request: Request
    reason: EndReason
    arrived_s: float
    started: asyncio.Future[None]
    finished: asyncio.Future[None]
    admitted_s: float | None = None
    first_token_s: float | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class PacedEngine:
    """An engine whose seconds are those of the wall clock: `profile` is already scaled to the wall clock."""

    model: str
    profile: EngineProfile
    order: EngineOrder = "arrival"
    telemetry: Telemetry = field(init=False)
    _engine: Engine = field(init=False)
    _runs: dict[str, Run] = field(init=False, default_factory=dict)
    _ids: Iterator[int] = field(init=False, default_factory=itertools.count)
    _timer: asyncio.TimerHandle | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._engine = Engine(self.profile, order=self.order)
        self.telemetry = Telemetry(self.model, self.counters)

    @property
    def idle(self) -> bool:
        """Whether no call is in the engine."""
        return not self._runs

    def counters(self) -> Counters:
        """What the engine says of itself as of the last time it ran."""
        return self._engine.counters()

    def submit(
        self,
        *,
        prompt_tokens: int,
        output_tokens: int,
        reason: EndReason,
        prefix: tuple[int, ...] = (),
        priority: int = 0,
    ) -> Run | None:
        """Hand a call to the engine now; None if it can never fit. In the order "priority" the lower one goes first."""
        loop, now_s = asyncio.get_running_loop(), time.monotonic()
        request = Request(
            request_id=str(next(self._ids)),
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            prefix=prefix,
            priority=float(priority),
        )
        if not self._engine.submit(request, now_s):
            return None
        run = Run(
            request=request,
            reason=reason,
            arrived_s=now_s,
            started=loop.create_future(),
            finished=loop.create_future(),
        )
        self._runs[request.request_id] = run
        self.catch_up()
        return run

    def abort(self, run: Run) -> None:
        """The client is gone: free the slot. Does nothing to a call that has ended."""
        self.catch_up()
        name = run.request.request_id
        if name in self._runs:
            now_s = time.monotonic()
            produced = self._engine.produced(name)
            self._engine.abort(name, now_s)
            self._end(run, "abort", now_s, produced)
            self.catch_up()

    def produced(self, run: Run) -> int:
        """How many tokens of the call are due by now."""
        self.catch_up()
        name = run.request.request_id
        return self._engine.produced(name) if name in self._runs else run.request.output_tokens

    def catch_up(self) -> None:
        """Run the engine up to now, resolve what is due, and set the timer for what comes next."""
        now_s = time.monotonic()
        for event in self._engine.advance(now_s):
            self._apply(event, now_s)
        if self._timer is not None:
            self._timer.cancel()
        at_s = self._engine.next_event_s()
        if at_s is None:
            self._timer = None
            return
        delay_ms = math.ceil(1e3 * max(0.0, at_s - now_s))  # the loop rounds to milliseconds: never wake too early
        self._timer = asyncio.get_running_loop().call_later(delay_ms / 1e3, self.catch_up)

    def reset(self) -> None:
        """Start over with an empty cache and counters; only while idle."""
        self._engine = Engine(self.profile, order=self.order)
        self.telemetry.reset()

    def _apply(self, event: Event, now_s: float) -> None:
        run = self._runs.get(event.request_id)
        if run is None:  # an event from the moment before an abort
            return
        match event.kind:
            case "admitted":
                run.admitted_s = event.at_s
            case "first_token":
                run.first_token_s = event.at_s
                self.telemetry.woke(now_s - event.at_s)
                run.started.set_result(None)
            case "finished":
                self.telemetry.woke(now_s - event.at_s)
                self._end(run, run.reason, event.at_s, run.request.output_tokens)
            case "preempted":
                pass

    def _end(self, run: Run, reason: str, at_s: float, produced: int) -> None:
        del self._runs[run.request.request_id]
        self.telemetry.ended(
            Ended(
                reason=reason,
                arrived_s=run.arrived_s,
                admitted_s=run.admitted_s,
                first_token_s=run.first_token_s,
                ended_s=at_s,
                prompt_tokens=run.request.prompt_tokens,
                output_tokens=produced,
            )
        )
        if not run.finished.done():
            run.finished.set_result(None)
