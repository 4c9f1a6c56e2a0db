"""One writing connection to PostgreSQL: jobs queue up, and what is queued is committed together, once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import uuid4

import asyncpg
from asyncpg import exceptions as refused
from tenacity import AsyncRetrying, retry_if_exception, stop_after_delay, wait_random_exponential

from swarmx.core import failpoints
from swarmx.core.errors import StoreError, SwarmXError
from swarmx.memory.postgres.connection import connect, explained, lost

log = logging.getLogger(__name__)

T = TypeVar("T")
_MAX_BATCH = 256
_IDLE_S = 3  # a process that stands still in mid-transaction holds up the others no longer than this
_AGAIN = (refused.DeadlockDetectedError, refused.SerializationError)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    work: Callable[[asyncpg.Connection], Awaitable[Any]]
    future: asyncio.Future[Any]


class _JobFailed(Exception):  # control flow within this module, not an error
    """A job of the batch failed, for a reason of its own."""


class Lane:
    """Runs jobs one after the other, in their order; each batch is one transaction.

    A job that fails is undone alone and hears its own error; the others of its batch do not notice, but are run again:
    jobs depend on the connection only. A lost connection is made anew for up to `patience_s`. Each batch writes its
    number, so that one whose commit was under way is looked up rather than written twice; StoreError says when that
    was not possible either.
    """

    def __init__(self, url: str, *, where: str, timeout_s: float, patience_s: float) -> None:
        self._url = url
        self._where = where
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._name = f"swarmx-{uuid4().hex}"
        self._number = 0
        self._jobs: deque[_Job] = deque()
        self._queued = asyncio.Event()
        self._closed = False
        self._connection: asyncpg.Connection | None = None
        self._running: asyncio.Task[None] | None = None

    async def open(self, first: Callable[[asyncpg.Connection], Awaitable[None]]) -> None:
        """Connect, do what is to be done `first`, and begin. Raises what the connection or that raises."""
        self._connection = await self._connected()
        try:
            await first(self._connection)
        except BaseException:
            self._connection.terminate()
            raise
        self._running = asyncio.get_running_loop().create_task(self._run(), name="store-writer")

    async def close(self) -> None:
        """Finish what is queued, then stop."""
        self._closed = True
        self._queued.set()
        if self._running is not None:
            await self._running
            self._running = None
        if self._connection is not None:
            with contextlib.suppress(Exception):  # whatever is left of it
                await self._connection.execute("DELETE FROM writers WHERE writer = $1", self._name)
                await self._connection.close(timeout=self._timeout_s)
            self._connection.terminate()
            self._connection = None

    async def do(self, work: Callable[[asyncpg.Connection], Awaitable[T]]) -> T:
        """Run the job and return what it returned, once that is durable. A cancelled wait does not undo the job."""
        if self._closed:
            raise StoreError("the store is closed, nothing can be read or written; open it first")
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._jobs.append(_Job(work=work, future=future))
        self._queued.set()
        return await future

    async def _run(self) -> None:
        while self._jobs or not self._closed:
            if not self._jobs:
                self._queued.clear()
                await self._queued.wait()
                continue
            batch = [self._jobs.popleft() for _ in range(min(len(self._jobs), _MAX_BATCH))]
            try:
                results = await self._transact(batch)
            except Exception as error:  # noqa: BLE001  # handed to whoever waits for the batch
                results = [explained(error, self._where) for _ in batch]
            for job, result in zip(batch, results, strict=True):
                if job.future.done():
                    continue
                if isinstance(result, BaseException):
                    job.future.set_exception(result)
                else:
                    job.future.set_result(result)

    async def _transact(self, batch: list[_Job]) -> list[Any]:
        self._number += 1
        loop = asyncio.get_running_loop()
        end_s = loop.time() + self._patience_s
        results: list[Any] = []
        committing = False
        while True:
            connection = self._connection
            try:
                if connection is None or connection.is_closed():
                    connection = self._connection = await self._connected()
                    if committing and await self._was_stored(connection):
                        return results
                committing = False
                results = await self._results(connection, batch)
                failpoints.hit("lane.commit")
                committing = True
                if (done := await connection.execute("COMMIT")) != "COMMIT":
                    raise StoreError(f"the database {self._where} answered {done} to a commit: nothing was stored")
                failpoints.hit("lane.committed")
                return results
            except _AGAIN as error:
                log.info("a batch of %d writes is run again: %s", len(batch), error)
                await self._rolled_back()
            except Exception as error:
                if not lost(connection, error):
                    await self._rolled_back()
                    raise
                self._drop()
                if loop.time() >= end_s:
                    raise self._unreachable(error, committing=committing) from error
                log.warning("the connection to %s was lost: %s", self._where, error or type(error).__name__)

    async def _results(self, connection: asyncpg.Connection, batch: list[_Job]) -> list[Any]:
        """What the jobs returned or, each for itself, raised. Few raise, so savepoints are left out until one does."""
        try:
            await self._begin(connection)
            return [await self._done(connection, job) for job in batch]
        except _JobFailed:
            await connection.execute("ROLLBACK")
        await self._begin(connection)
        results: list[Any] = []
        for job in batch:
            await connection.execute("SAVEPOINT job")
            try:
                results.append(await self._done(connection, job))
            except _JobFailed as failed:
                await connection.execute("ROLLBACK TO job")
                results.append(failed.__cause__)
            await connection.execute("RELEASE job")
        return results

    async def _begin(self, connection: asyncpg.Connection) -> None:
        failpoints.hit("lane.begin")
        await connection.execute(
            f"BEGIN; INSERT INTO writers VALUES ('{self._name}', {self._number}) "  # noqa: S608  # both are ours
            "ON CONFLICT (writer) DO UPDATE SET batch = excluded.batch, at = excluded.at"
        )

    async def _done(self, connection: asyncpg.Connection, job: _Job) -> Any:
        try:
            result = await job.work(connection)
        except SwarmXError as error:
            raise _JobFailed from error
        except Exception as error:
            if isinstance(error, _AGAIN) or lost(connection, error):
                raise
            raise _JobFailed from explained(error, self._where)
        failpoints.hit("lane.job")
        return result

    async def _rolled_back(self) -> None:
        """Whatever happened, the connection has no transaction any more; or there is no connection any more."""
        try:
            if self._connection is not None:
                await self._connection.execute("ROLLBACK")
        except Exception:  # noqa: BLE001  # the next batch connects anew
            self._drop()

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None

    async def _connected(self) -> asyncpg.Connection:
        """A new connection, without one of its predecessors still at work."""
        async for attempt in AsyncRetrying(
            retry=retry_if_exception(lambda error: lost(None, error)),
            stop=stop_after_delay(self._patience_s),
            wait=wait_random_exponential(multiplier=0.05, max=1.0),
            reraise=True,
        ):
            with attempt:
                connection = await connect(
                    self._url,
                    name=self._name,
                    timeout_s=self._timeout_s,
                    idle_in_transaction_session_timeout=f"{_IDLE_S}s",
                )
        try:
            await connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE application_name = $1 AND pid <> pg_backend_pid()",
                self._name,
            )
            if await connection.fetchval("SHOW synchronous_commit") == "off":
                await connection.execute("SET synchronous_commit = on")
        except BaseException:
            connection.terminate()
            raise
        return connection

    async def _was_stored(self, connection: asyncpg.Connection) -> bool:
        """Whether the batch of this number was committed; waits for a transaction that still has the row."""
        found = await connection.fetchval("SELECT batch FROM writers WHERE writer = $1 FOR UPDATE", self._name)
        return bool(found == self._number)

    def _unreachable(self, error: BaseException, *, committing: bool) -> StoreError:
        known = "it is not known whether this write was stored" if committing else "nothing of this write was stored"
        return StoreError(
            f"the database {self._where} cannot be reached ({error or type(error).__name__}): {known}; "
            "look whether it runs"
        )
