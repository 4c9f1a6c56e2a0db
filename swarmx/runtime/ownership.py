"""This process as an owner of workflows: enlists, keeps its epoch by heartbeats, and stops its work once it cannot."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from swarmx.core import failpoints
from swarmx.core.errors import StoreError
from swarmx.core.ports import Ownership

log = logging.getLogger(__name__)


class Owner:
    """One epoch at a time. An `exclusive` owner knows that no other process uses the store, and ends all others.

    `on_lost` is called when the epoch is over without having been retired: others may run its workflows by now.
    `on_beat` is called, where others use the store too, after each heartbeat: it is time to look what they left. While
    that takes its time heartbeats go on, and it is not called again.
    """

    def __init__(
        self,
        store: Ownership,
        *,
        name: str,
        ttl_s: float,
        exclusive: bool,
        on_lost: Callable[[], None],
        on_beat: Callable[[], Awaitable[object]],
    ) -> None:
        self._store = store
        self._name = name
        self._ttl_s = ttl_s
        self._exclusive = exclusive
        self._on_lost = on_lost
        self._on_beat = on_beat
        self._enlisting = asyncio.Lock()
        self._epoch: int | None = None
        self._beating: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._enlisted = False
        self._renewed_s = 0.0

    async def epoch(self) -> int:
        """The epoch of this process; enlists when it has none. Raises StoreError."""
        async with self._enlisting:
            if self._epoch is None:
                self._renewed_s = asyncio.get_running_loop().time()
                first = not self._enlisted  # a successor that ended this process is not to be ended in turn
                self._epoch = await self._store.enlist(
                    self._name, ttl_s=self._ttl_s, exclusive=self._exclusive and first
                )
                failpoints.hit("owner.enlisted")
                self._enlisted = True
                if self._beating is None:
                    self._beating = asyncio.get_running_loop().create_task(self._beat())
            return self._epoch

    async def stop(self) -> None:
        """No more heartbeats: the epoch runs out unless it is retired."""
        for task in (self._beating, self._looking):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def retire(self) -> None:
        """End the epoch, so that others need not wait for it."""
        epoch, self._epoch = self._epoch, None
        if epoch is not None:
            try:
                await self._store.retire(epoch)
            except StoreError as error:
                log.warning("the epoch %d could not be retired, it runs out by itself: %s", epoch, error)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._ttl_s / 3.0)
            if self._epoch is not None and not await self._renewed(self._epoch):
                log.error("epoch %d is over: its workflows are let go, another process may run them", self._epoch)
                self._epoch = None
                self._on_lost()
            if not self._exclusive and (self._looking is None or self._looking.done()):
                self._looking = asyncio.get_running_loop().create_task(self._look())

    async def _look(self) -> None:
        try:
            await self._on_beat()
        except StoreError as error:
            log.warning("the workflows of others could not be looked at: %s", error)
        except Exception:
            log.exception("the workflows of others could not be looked at")

    async def _renewed(self, epoch: int) -> bool:
        asked_s = asyncio.get_running_loop().time()
        failpoints.hit("owner.heartbeat")
        try:
            kept = await self._store.heartbeat(epoch, ttl_s=self._ttl_s)
            self._renewed_s = asked_s
        except StoreError as error:
            log.warning("the heartbeat of epoch %d failed: %s", epoch, error)
            next_s = asyncio.get_running_loop().time() + self._ttl_s / 3.0  # by then it must still be this one's
            kept = self._exclusive or next_s < self._renewed_s + self._ttl_s
        return kept
