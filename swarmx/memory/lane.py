"""One thread that owns one SQLite connection: jobs queue up, and what is queued is committed together."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

from swarmx.core import failpoints
from swarmx.core.errors import StoreError, SwarmXError

T = TypeVar("T")
_MAX_BATCH = 256


class _Job(NamedTuple):
    work: Callable[[sqlite3.Connection], Any]
    future: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop


class Lane:
    """Runs jobs on its thread, in their order. With `commits`, each batch of jobs is one transaction.

    A job that fails is undone alone and hears its own error; the others of its batch do not notice, but are run again:
    jobs depend on the connection only. When the commit itself fails, every job of the batch fails with it and nothing
    of it is stored. What is asked for in one turn of a loop comes to the thread at once: to wake it is dear, and a
    batch of one keeps the others waiting for the disk.
    """

    def __init__(self, connect: Callable[[], sqlite3.Connection], *, name: str, commits: bool) -> None:
        self._connect = connect
        self._commits = commits
        self._asked: deque[_Job] = deque()
        self._handing_over: set[asyncio.AbstractEventLoop] = set()
        self._jobs: SimpleQueue[list[_Job] | None] = SimpleQueue()
        self._opened: SimpleQueue[BaseException | None] = SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @classmethod
    async def open(cls, connect: Callable[[], sqlite3.Connection], *, name: str, commits: bool) -> Lane:
        """Start the thread and its connection. Raises what `connect` raises."""
        lane = cls(connect, name=name, commits=commits)
        lane._thread.start()
        error = await asyncio.to_thread(lane._opened.get)
        if error is not None:
            raise error
        return lane

    async def close(self) -> None:
        """Finish what is queued, then stop."""
        if not self._closed:
            self._closed = True
            self._hand_over()
            self._jobs.put(None)
            await asyncio.to_thread(self._thread.join)

    def do(self, work: Callable[[sqlite3.Connection], T]) -> asyncio.Future[T]:
        """Run the job and give what it returned, once that is durable. A cancelled wait does not undo the job."""
        if self._closed:
            raise StoreError("the store is closed, nothing can be read or written; open it first")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._asked.append(_Job(work, future, loop))
        if loop not in self._handing_over:
            self._handing_over.add(loop)
            loop.call_soon(self._end_turn, loop)
        return future

    def _end_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._handing_over.discard(loop)
        self._hand_over()

    def _hand_over(self) -> None:
        jobs: list[_Job] = []
        with contextlib.suppress(IndexError):  # loops of several threads may share a lane
            while True:
                jobs.append(self._asked.popleft())
        if jobs:
            self._jobs.put(jobs)

    def _run(self) -> None:
        try:
            connection = self._connect()
        except BaseException as error:  # noqa: BLE001  # handed to whoever opens
            self._opened.put(error)
            return
        self._opened.put(None)
        last = False
        while not last:
            batch, last = self._batch()
            if batch:
                results = self._transact(connection, batch) if self._commits else self._each(connection, batch)
                _deliver(batch, results)
        with contextlib.suppress(sqlite3.Error):
            connection.close()

    def _batch(self) -> tuple[list[_Job], bool]:
        """What is queued, up to about `_MAX_BATCH` jobs, and whether they are the last."""
        batch: list[_Job] = []
        while (jobs := self._jobs.get()) is not None:
            batch += jobs
            if len(batch) >= _MAX_BATCH or self._jobs.empty():
                return batch, False
        return batch, True

    def _each(self, connection: sqlite3.Connection, batch: list[_Job]) -> list[Any]:
        return [_attempt(connection, job) for job in batch]

    def _transact(self, connection: sqlite3.Connection, batch: list[_Job]) -> list[Any]:
        try:
            failpoints.hit("lane.begin")
            connection.execute("BEGIN IMMEDIATE")
            results = _together(connection, batch)
            if results is None:
                connection.execute("ROLLBACK")
                connection.execute("BEGIN IMMEDIATE")
                results = _one_by_one(connection, batch)
            failpoints.hit("lane.commit")
            connection.execute("COMMIT")
            failpoints.hit("lane.committed")
        except BaseException as error:  # noqa: BLE001  # handed to whoever waits for the batch
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            return [explained(error) for _ in batch]
        return results


def _together(connection: sqlite3.Connection, batch: list[_Job]) -> list[Any] | None:
    """The results of all jobs, or None once one fails. Most batches have no such job, so savepoints are left out."""
    results: list[Any] = []
    for job in batch:
        result = _attempt(connection, job)
        if isinstance(result, BaseException):
            _check_transaction(connection, result)
            return None
        results.append(result)
        failpoints.hit("lane.job")
    return results


def _one_by_one(connection: sqlite3.Connection, batch: list[_Job]) -> list[Any]:
    """The results or errors of all jobs, each with a savepoint to go back to."""
    results: list[Any] = []
    for job in batch:
        connection.execute("SAVEPOINT job")
        result = _attempt(connection, job)
        if isinstance(result, BaseException):
            _check_transaction(connection, result)
            connection.execute("ROLLBACK TO job")
        connection.execute("RELEASE job")
        results.append(result)
        failpoints.hit("lane.job")
    return results


def _check_transaction(connection: sqlite3.Connection, error: BaseException) -> None:
    if not connection.in_transaction:  # disk full and the like roll back everything
        raise error


def explained(error: BaseException) -> BaseException:
    """SQLite's errors as StoreError, with what to do; others as they are."""
    if not isinstance(error, sqlite3.Error):
        return error
    name = getattr(error, "sqlite_errorname", "") or ""
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        hint = "another process keeps the database locked; stop it, one server owns a database"
    elif name.startswith("SQLITE_FULL"):
        hint = "the disk is full; free some space, nothing of this write was stored"
    elif name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        hint = "the file or its folder is missing or cannot be written; check the path and its permissions"
    elif name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        hint = "the file is not a sound SQLite database; restore a backup or choose another path"
    elif name.startswith("SQLITE_IOERR"):
        hint = "the disk reported an error; check the device and its space"
    else:
        hint = "nothing of this write was stored"
    return StoreError(f"the database refused ({name or type(error).__name__}: {error}): {hint}")


def _attempt(connection: sqlite3.Connection, job: _Job) -> Any:
    try:
        return job.work(connection)
    except SwarmXError as error:
        return error
    except Exception as error:  # noqa: BLE001  # handed to whoever waits for the job
        return explained(error)


def _deliver(batch: list[_Job], results: list[Any]) -> None:
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Job, Any]]] = {}
    for job, result in zip(batch, results, strict=True):
        by_loop.setdefault(job.loop, []).append((job, result))
    for loop, answered in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the loop that asked is gone
            loop.call_soon_threadsafe(_settle, answered)


def _settle(answered: list[tuple[_Job, Any]]) -> None:
    for job, result in answered:
        if job.future.done():
            continue
        if isinstance(result, BaseException):
            job.future.set_exception(result)
        else:
            job.future.set_result(result)
