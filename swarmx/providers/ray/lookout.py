"""The lookout: a small actor that hears which nodes are to go and what observers say, and passes it on."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from typing import Any

import msgspec

from swarmx.providers.ray.placing import LOOKOUT
from swarmx.providers.ray.standing_actor import standing_actor
from swarmx.providers.ray.wire import Curve, Leaving, Load, News

_LOOK_S = 0.5
_LONGEST_S = 10.0  # that a reader waits before it is told that there is nothing
_GATHER_S = 0.005  # in which further news join the first
_MOST = 10_000
_FAR_MS = 4e12  # a deadline beyond is none


class Notices:
    """Which nodes are to go, as Ray's control plane has it: a node is told once, and again when its time changes."""

    def __init__(self) -> None:
        self._told: dict[str, int] = {}

    def fresh(self, draining: dict[str, int], now_s: float) -> list[Leaving]:
        """What is new; `draining` are deadlines in Unix milliseconds by node, 0 where there is none."""
        self._told = {node: at for node, at in self._told.items() if node in draining}
        found = []
        for node, at_ms in draining.items():
            if self._told.get(node) != at_ms:
                self._told[node] = at_ms
                left_s = max(0.0, at_ms / 1000.0 - now_s) if 0 < at_ms < _FAR_MS else None
                found.append(Leaving(node_id=node, left_s=left_s))
        return found


class Lookout:
    """Keeps the newest of each kind about each replica or node, and hands it to whoever asks what is new.

    `news` with a number of an earlier life of this actor starts from the beginning.
    """

    def __init__(self) -> None:
        self._seq = 0
        self._life = time.time_ns()
        self._news: OrderedDict[tuple[str, str], tuple[int, bytes]] = OrderedDict()
        self._event = asyncio.Event()
        self._nodes: asyncio.Task[None] | None = None

    async def say(self, data: bytes) -> None:
        """Something new, from beside a replica."""
        self._put(msgspec.json.decode(data, type=News), data)

    async def news(self, life: int, after: int) -> tuple[int, int, list[bytes]]:
        """(this life, the last number, what came after `after`); waits while there is nothing."""
        if self._nodes is None:
            self._nodes = asyncio.create_task(self._watch_nodes())
        after = after if life == self._life else 0
        if not (found := self._since(after)):
            self._event.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._event.wait(), _LONGEST_S)
                await asyncio.sleep(_GATHER_S)
            found = self._since(after)
        return self._life, self._seq, found

    async def _watch_nodes(self) -> None:
        from ray._private.state import state  # what Ray's own watchers of preemption read

        notices = Notices()
        while True:
            with contextlib.suppress(Exception):  # the control plane may be away for a while
                for leaving in notices.fresh(await asyncio.to_thread(state.get_draining_nodes), time.time()):
                    self._put(leaving, msgspec.json.encode(leaving))
            await asyncio.sleep(_LOOK_S)

    def _put(self, news: News, data: bytes) -> None:
        self._seq += 1
        key = _about(news)
        self._news.pop(key, None)
        self._news[key] = (self._seq, data)
        if len(self._news) > _MOST:
            self._news.popitem(last=False)
        self._event.set()

    def _since(self, after: int) -> list[bytes]:
        found = []
        for seq, data in reversed(self._news.values()):
            if seq <= after:
                break
            found.append(data)
        return found[::-1]


def _about(news: News) -> tuple[str, str]:
    match news:
        case Load():
            return "load", news.replica_id
        case Curve():
            return "curve", news.curve.replica_id
        case Leaving():
            return "node", news.node_id


def find_lookout(namespace: str) -> Any:
    """The lookout of this namespace, made if there is none yet. Blocks; raises Ray's errors."""
    return standing_actor(Lookout, LOOKOUT, namespace)
