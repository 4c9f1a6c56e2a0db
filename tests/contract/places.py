"""Where a store can be: opened there, once or again, and how time passes there."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Protocol

from swarmx.core.ports import ControlStore, WorkflowStore
from swarmx.memory.control import SqliteControl
from swarmx.memory.postgres.control import PostgresControl
from swarmx.memory.postgres.store import PostgresStore
from swarmx.memory.sqlite import SqliteStore
from tests.postgres import PostgresServer


class Place(Protocol):
    """A store that is opened again has what was stored; only what is in memory is gone."""

    def now_s(self) -> float: ...
    async def opened(self) -> WorkflowStore: ...
    async def passes(self, seconds: float) -> None: ...
    async def crash(self) -> None: ...
    async def emptied(self) -> None: ...
    async def remove(self) -> None: ...


class FilePlace:
    """Time is a number that tests set forward."""

    def __init__(self, path: Path | str) -> None:
        self.path = path
        self.time_s = 100.0
        self._lives = 0

    def now_s(self) -> float:
        return self.time_s

    async def opened(self) -> SqliteStore:
        store = SqliteStore(self.path, clock=lambda: self.time_s)
        await store.open()
        return store

    async def passes(self, seconds: float) -> None:
        self.time_s += seconds

    async def crash(self) -> None:
        """Whoever opens next sees the files as they are now, as after a process that did not close them."""
        left = Path(self.path)
        self._lives += 1
        self.path = left.with_name(f"life{self._lives}.db")
        for suffix in ("", "-wal"):
            if (file := Path(f"{left}{suffix}")).exists():
                shutil.copyfile(file, f"{self.path}{suffix}")

    async def emptied(self) -> None:
        await self.crash()
        for suffix in ("", "-wal"):
            Path(f"{self.path}{suffix}").unlink(missing_ok=True)

    async def remove(self) -> None:
        pass


class MemoryPlace(FilePlace):
    """It cannot be opened again."""

    def __init__(self) -> None:
        super().__init__(":memory:")


class PostgresPlace:
    """The clock is the server's: that time passes means here that all leases end so much earlier."""

    def __init__(self, server: PostgresServer, url: str) -> None:
        self.server = server
        self.url = url

    def now_s(self) -> float:
        return time.time()

    async def opened(self) -> PostgresStore:
        store = PostgresStore(self.url)
        await store.open()
        return store

    async def passes(self, seconds: float) -> None:
        await self.server.sql("UPDATE owners SET expires_at_s = expires_at_s - $1", seconds, url=self.url)

    async def crash(self) -> None:
        """All connections break off."""
        await self.server.sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()",
            url=self.url,
        )

    async def emptied(self) -> None:
        await self.remove()
        self.url = await self.server.new_database()

    async def remove(self) -> None:
        await self.server.drop(self.url)


def control_of(store: WorkflowStore) -> ControlStore:
    """The control store that belongs to it."""
    if isinstance(store, PostgresStore):
        return PostgresControl(store)
    assert isinstance(store, SqliteStore)
    return SqliteControl(store)
