"""What only reads: a few connections for questions, and one that hears what was posted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import asyncpg
from tenacity import AsyncRetrying, retry_if_exception, stop_after_delay, wait_random_exponential

from swarmx.memory.postgres.connection import connect, explained, lost

log = logging.getLogger(__name__)

T = TypeVar("T")
_MOST = 4
_AGAIN_S = 1.0


class Readers:
    """Up to four connections. A question whose connection was lost is asked again, for up to `patience_s`."""

    def __init__(self, pool: asyncpg.Pool, *, where: str, patience_s: float) -> None:
        self._pool = pool
        self._where = where
        self._patience_s = patience_s

    @classmethod
    async def open(cls, url: str, *, where: str, timeout_s: float, patience_s: float) -> Readers:
        """Connect. Raises what the connection raises."""
        pool = await asyncpg.create_pool(
            url,
            min_size=1,
            max_size=_MOST,
            timeout=timeout_s,
            command_timeout=timeout_s,
            server_settings={"application_name": "swarmx-reader", "default_transaction_read_only": "on"},
        )
        return cls(pool, where=where, patience_s=patience_s)

    async def do(self, work: Callable[[asyncpg.Connection], Awaitable[T]]) -> T:
        """Run the job on a connection of its own. Raises StoreError."""
        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception(lambda error: lost(None, error)),
                stop=stop_after_delay(self._patience_s),
                wait=wait_random_exponential(multiplier=0.05, max=1.0),
                reraise=True,
            ):
                with attempt:
                    async with self._pool.acquire() as connection:
                        return await work(connection)
        except Exception as error:
            raise explained(error, self._where) from error
        raise AssertionError("the last attempt returns or raises")

    async def close(self) -> None:
        """Close all connections, also those that do not answer any more."""
        try:
            async with asyncio.timeout(_AGAIN_S):
                await self._pool.close()
        except Exception:  # noqa: BLE001  # a server that is gone closes nothing
            self._pool.terminate()


class Listener:
    """Calls `heard` with whatever other processes say on the channel. May miss some: who must know, asks as well.

    It listens again, after a second, whatever ended it. The log says once that nothing is heard, and once that it is
    again. A connection that says nothing is asked every `quiet_s` whether it is still there.
    """

    def __init__(
        self,
        url: str,
        channel: str,
        heard: Callable[[str], None],
        *,
        where: str,
        timeout_s: float,
        quiet_s: float = 20.0,
    ) -> None:
        self._url = url
        self._channel = channel
        self._heard = heard
        self._where = where
        self._timeout_s = timeout_s
        self._quiet_s = quiet_s
        self._deaf = False
        self._task = asyncio.get_running_loop().create_task(self._listen(), name="store-listener")

    async def close(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _listen(self) -> None:
        while True:
            try:
                await self._listen_once()
                why: object = "the connection was closed"
            except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
                why = error or type(error).__name__
            except Exception as error:
                log.exception("a listener to %s ran into a defect", self._where)
                why = type(error).__name__
            if not self._deaf:
                log.warning("other servers at %s are not heard, trying again every second: %s", self._where, why)
            self._deaf = True
            await asyncio.sleep(_AGAIN_S)

    async def _listen_once(self) -> None:
        """Returns or raises once the connection is gone."""
        connection: asyncpg.Connection | None = None
        try:
            connection = await connect(self._url, name="swarmx-listener", timeout_s=self._timeout_s)
            gone = asyncio.Event()
            connection.add_termination_listener(lambda _: gone.set())
            await connection.add_listener(self._channel, self._hear)
            if self._deaf:
                log.info("other servers at %s are heard again", self._where)
            self._deaf = False
            while not gone.is_set():
                try:
                    async with asyncio.timeout(self._quiet_s):
                        await gone.wait()
                except TimeoutError:
                    await connection.fetchval("SELECT 1")
        finally:
            if connection is not None:
                connection.terminate()

    def _hear(self, connection: Any, pid: int, channel: str, payload: str) -> None:
        try:
            self._heard(payload)
        except Exception:
            log.exception("whoever listens to other servers raised at %r", payload)
