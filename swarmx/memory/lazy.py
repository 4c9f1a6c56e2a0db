"""A vector memory that opens beside everything else: Chroma takes seconds to import, and a start must not wait."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from swarmx.core.control import Facts
from swarmx.core.ports import VectorMemory


class LazyVectors:
    """The memory that `opener` makes; `open` returns when it is there, and so does a use that comes before."""

    def __init__(self, opener: Callable[[], Awaitable[VectorMemory]]) -> None:
        self._opener = opener
        self._memory: VectorMemory | None = None
        self._opening = asyncio.Lock()

    async def open(self) -> None:
        await self._opened()

    async def close(self) -> None:
        if self._memory is not None:
            await self._memory.close()

    async def add(self, key: str, vector: Sequence[float], facts: Facts) -> None:
        await (await self._opened()).add(key, vector, facts)

    async def nearest(self, vector: Sequence[float], count: int) -> list[tuple[str, float, Facts]]:
        return await (await self._opened()).nearest(vector, count)

    async def _opened(self) -> VectorMemory:
        async with self._opening:
            if self._memory is None:
                self._memory = await self._opener()
            return self._memory
