"""Tells who waits for news of a workflow that there is some; what it is, they read in the store."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from swarmx.core.errors import Unavailable

MOST_WATCHES = 2_000


class Watch:
    """One who waits. However much happens while it is busy, it is woken once: nothing queues up behind the slow."""

    def __init__(self) -> None:
        self._news = asyncio.Event()

    def wake(self) -> None:
        self._news.set()

    async def wait(self, timeout_s: float) -> None:
        """Return at the next change, or one since the last wait; after `timeout_s` without any."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        except TimeoutError:
            return
        self._news.clear()


class Changes:
    """Hears of the changes that this process stores; of those of others it knows nothing.

    `closed` is set while the server stops: nobody should wait for long any more.
    """

    def __init__(self, *, most: int = MOST_WATCHES) -> None:
        self.most = most
        self._watches: dict[str, set[Watch]] = {}
        self._count = 0
        self.closed = False

    @property
    def count(self) -> int:
        """How many wait now."""
        return self._count

    def notify(self, workflow_id: str) -> None:
        """Something about the workflow was stored."""
        for watch in self._watches.get(workflow_id, ()):
            watch.wake()

    @contextmanager
    def watching(self, workflow_id: str) -> Iterator[Watch]:
        """Hear of one workflow inside the block. Raises Unavailable when too many wait already."""
        if self._count >= self.most:
            raise Unavailable(f"{self.most} clients wait for news of workflows, which is the most; ask again later")
        watch = Watch()
        self._watches.setdefault(workflow_id, set()).add(watch)
        self._count += 1
        try:
            yield watch
        finally:
            self._count -= 1
            watches = self._watches[workflow_id]
            watches.discard(watch)
            if not watches:
                del self._watches[workflow_id]

    def close(self) -> None:
        """Wake everybody: the server stops."""
        self.closed = True
        for watches in self._watches.values():
            for watch in watches:
                watch.wake()
