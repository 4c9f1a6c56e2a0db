"""The board: one small actor on which replicas put their state, and which wakes the routers that read it."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from typing import Any

from swarmx.compat.ray_serve.signals import report_in, signal_in
from swarmx.providers.ray.standing_actor import standing_actor

NAME = "swarmx-board"
NAMESPACE = "swarmx"
_MOST = 10_000  # replicas, and routers, that are remembered
_LONGEST_S = 10.0  # that a reader waits before it is told that there is nothing
_GATHER_S = 0.005  # in which further news join the first
_SILENT_S = 10.0  # after which a router's report counts no more


class Board:
    """Keeps the newest signal of each replica and the newest report of each router, as they came."""

    def __init__(self) -> None:
        self._seq = 0
        self._signals: OrderedDict[str, tuple[int, str, bytes]] = OrderedDict()  # by replica; the newest last
        self._reports: OrderedDict[tuple[str, str], tuple[float, bytes]] = OrderedDict()
        self._news: dict[str, asyncio.Event] = {}

    async def push(self, data: bytes) -> None:
        """A replica's signal."""
        signal = signal_in(data)
        self._seq += 1
        self._signals.pop(signal.replica_id, None)
        self._signals[signal.replica_id] = (self._seq, signal.deployment, data)
        if len(self._signals) > _MOST:
            self._signals.popitem(last=False)
        self._news.setdefault(signal.deployment, asyncio.Event()).set()

    async def news(self, deployment: str, after: int) -> tuple[int, list[bytes]]:
        """What replicas of the deployment have said since `after`; waits for the next when they have said nothing."""
        if not (found := self._since(deployment, after)):
            event = self._news.setdefault(deployment, asyncio.Event())
            try:
                await asyncio.wait_for(event.wait(), _LONGEST_S)
            except TimeoutError:
                return self._seq, []
            await asyncio.sleep(_GATHER_S)
            event.clear()
            found = self._since(deployment, after)
        return self._seq, found

    async def report(self, data: bytes) -> None:
        """A router's demand."""
        report = report_in(data)
        key = (report.deployment, report.router)
        self._reports.pop(key, None)
        self._reports[key] = (time.monotonic(), data)
        if len(self._reports) > _MOST:
            self._reports.popitem(last=False)

    async def reports(self, deployment: str) -> list[bytes]:
        """The newest report of each router of the deployment that spoke lately."""
        since = time.monotonic() - _SILENT_S
        return [data for (name, _), (at, data) in self._reports.items() if name == deployment and at >= since]

    def _since(self, deployment: str, after: int) -> list[bytes]:
        found = []
        for seq, name, data in reversed(self._signals.values()):
            if seq <= after:
                break
            if name == deployment:
                found.append(data)
        return found[::-1]


def find_board() -> Any:
    """The board of this cluster, made if there is none yet. Blocks; raises Ray's errors."""
    return standing_actor(Board, NAME, NAMESPACE)
