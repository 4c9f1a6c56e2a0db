"""One attempt of a job at one server, followed to its end: events are hints, the server's history is the truth."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from swarmx.compat.comfyui.jobs import Event, Job
from swarmx.compat.comfyui.scheduling import Placement, Waiting
from swarmx.compat.comfyui.server import ComfyServer, ServerAway
from swarmx.compat.comfyui.settings import FrontSettings

LossReason = Literal["unreachable", "refused", "forgotten", "stalled", "files", "gone", "cancelled"]
_SOON_S = 0.02
_LOOKS = 2  # how often a job has to be nowhere before it is taken to be lost: it moves between two looks


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The server kept this in its history."""

    entry: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """The job will not end there. With `may_run`, nobody knows whether the server is still at it.

    One that never came there has not `begun`. `owner` is another server, whose file could not be had; where that file
    is `gone` for good, so is the job.
    """

    reason: LossReason
    detail: str
    may_run: bool
    begun: bool = True
    owner: str | None = None


@dataclass(slots=True)
class Attempt:
    """Hears events of its job, and polls where there are none. `node` is what the server said that it is at."""

    prompt_id: str
    server: ComfyServer
    settings: FrontSettings
    clock: Callable[[], float]
    node: dict[str, Any] | None = None
    _end_heard: bool = False
    _heard_s: float = 0.0
    _progress_s: float = 0.0
    _begin_heard: bool = False
    _at_s: float = 0.0
    _took_s: dict[str, float] = field(default_factory=dict)
    _stirred: asyncio.Event = field(default_factory=asyncio.Event)

    def progressed(self) -> float:
        """The server is at the job, now: gives when that is."""
        self._heard_s = self._progress_s = self.clock()
        return self._heard_s

    def heard(self, kind: str, data: dict[str, Any]) -> None:
        """An event of the job came."""
        now_s = self.progressed()
        self._begin_heard |= kind == "execution_start"
        if kind == "executing":
            if self.node is not None:  # what a node was expanded into is shown as that node
                shown = str(self.node.get("display_node") or self.node["node"])
                self._took_s[shown] = self._took_s.get(shown, 0.0) + now_s - self._at_s
            self._at_s = now_s
            self.node = data if data.get("node") is not None else None
        if kind == "executing" and data.get("node") is None:  # success is told before history is written, this after
            self._end_heard = True
            self._stirred.set()

    def node_seconds(self, *, whole: bool) -> Mapping[str, float]:
        """What the nodes took that have ended, by id; empty where some may have been missed. With `whole`, only once
        the last one has ended."""
        return self._took_s if self._begin_heard and (self._end_heard or not whole) else {}

    def stir(self) -> None:
        """Look at once: something has changed."""
        self._stirred.set()

    async def follow(self) -> Done | Lost:
        """Until the job has ended there, or is lost."""
        settings, nowhere = self.settings, 0
        self._heard_s = self._progress_s = answered_s = self.clock()
        refused_s: float | None = None
        while True:
            await self._pause(nowhere)
            now_s = self.clock()
            if not self._end_heard and now_s - self._heard_s < settings.poll_s:
                continue
            try:
                entry = await self.server.history(self.prompt_id)
                if entry is not None:
                    return Done(entry=entry)
                nowhere = 0 if self.prompt_id in await self.server.queue() else nowhere + 1
                answered_s, refused_s = self.clock(), None
            except ServerAway as away:
                now_s = self.clock()
                refused_s = (now_s if refused_s is None else refused_s) if away.refused else None
                if refused_s is not None and now_s - refused_s >= settings.refused_after_s:
                    return Lost(reason="refused", detail=str(away), may_run=False)
                if now_s - max(answered_s, self._heard_s) >= settings.lost_after_s:
                    return Lost(reason="unreachable", detail=str(away), may_run=True)
                continue
            if nowhere >= _LOOKS:
                return Lost(reason="forgotten", detail="neither its history nor its queue knows the job", may_run=False)
            if self.clock() - self._progress_s >= settings.stall_s:
                return Lost(reason="stalled", detail=f"no progress for {settings.stall_s:g} s", may_run=True)

    async def _pause(self, nowhere: int) -> None:
        """Until there is something to look for. History is written a moment after the last event."""
        if self._end_heard or nowhere:
            if not self._stirred.is_set():
                await asyncio.sleep(_SOON_S)
            self._stirred.clear()
            return
        try:
            async with asyncio.timeout(self.settings.poll_s):
                await self._stirred.wait()
        except TimeoutError:
            return
        self._stirred.clear()


class Run:
    """A job at a server: its attempt, what its client is told, and what became of it at first."""

    def __init__(self, waiting: Waiting, attempt: Attempt, started_s: float) -> None:
        self.waiting = waiting
        self.attempt = attempt
        self.started_s = started_s
        self.placement: Placement | None = None
        self.held: list[Event] = []
        self.cancelled = False
        self.stops = 0  # how often its server is still to be told to stop it
        self.awaited = False  # a client waits for the server's word on its graph
        self.verdict: asyncio.Future[dict[str, Any] | None] = asyncio.get_running_loop().create_future()
        """What the server said against the graph, None where it said nothing."""

    @property
    def job(self) -> Job:
        return self.waiting.job
