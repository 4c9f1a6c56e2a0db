"""Records that nobody waits for, on their way to the store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from swarmx.gateway.telemetry import Telemetry

log = logging.getLogger(__name__)


class Background:
    """Records that nobody waits for, handed to the store together every 50 ms: one commit carries many.

    At most `limit` wait; more are counted as lost, as are those that the store refuses.
    """

    def __init__(self, telemetry: Telemetry, *, every_s: float = 0.05, limit: int = 20_000) -> None:
        self._telemetry = telemetry
        self._every_s = every_s
        self._limit = limit
        self._waiting: list[Coroutine[Any, Any, None]] = []
        self._writing = asyncio.Lock()
        self._under_way: set[asyncio.Task[None]] = set()

    def add(self, work: Coroutine[Any, Any, None]) -> None:
        if len(self._waiting) < self._limit:
            self._waiting.append(work)
        else:
            work.close()
            self._telemetry.record_lost()

    async def run(self) -> None:
        """Flush for ever; cancel it, then flush once more."""
        while True:
            await asyncio.sleep(self._every_s)
            await self.flush()

    async def flush(self) -> None:
        """Return once everything that was added before is in the store. Whoever gives up waiting calls nothing off."""
        task = asyncio.ensure_future(self._write())
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        await asyncio.shield(task)

    async def _write(self) -> None:
        async with self._writing:
            batch, self._waiting = self._waiting, []
            for result in await asyncio.gather(*batch, return_exceptions=True):
                if isinstance(result, Exception):
                    self._telemetry.record_lost()
                    log.error("a record was lost: %s", result)
