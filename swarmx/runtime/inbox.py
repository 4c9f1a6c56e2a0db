"""What one task is told by others, in its order: it waits until there is something, and takes all that there is."""

from __future__ import annotations

import asyncio
from typing import Generic, TypeVar

T = TypeVar("T")


class Inbox(Generic[T]):
    """For one reader at a time. One that is cancelled while it waits takes nothing away."""

    def __init__(self) -> None:
        self._items: list[T] = []
        self._waiting: asyncio.Future[None] | None = None

    def put(self, item: T) -> None:
        """Add something, from within the loop of the reader."""
        self._items.append(item)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def heard(self) -> list[T]:
        """All that came since the last time, at least one thing."""
        while not self._items:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        return self.drained()

    def drained(self) -> list[T]:
        """All that came since the last time, which may be nothing."""
        found, self._items = self._items, []
        return found
