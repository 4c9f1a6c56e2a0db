"""Workflows that are known only from headers: a store that fails as told, a clock that stands still, calls."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from swarmx.core.errors import StoreError
from swarmx.core.records import Accepted
from swarmx.gateway.identity import Identity, Source
from swarmx.gateway.program_events import ProgramEvent, program_events
from swarmx.gateway.transparent import TransparentWorkflows
from swarmx.memory.sqlite import SqliteStore

T = TypeVar("T")

CLIENTS: list[Source] = ["swarmx", "dynamo", "claude_code", "codex", "deepseek", "session", "trace"]


@dataclass
class Clock:
    """Stands still until it is moved."""

    at_s: float = 1000.0

    def now_s(self) -> float:
        return self.at_s


class ShakyStore(SqliteStore):
    """The real store, whose disk fails as often as it is told to."""

    failures = 0
    unanswered = 0

    async def accept(self, *args: Any, **more: Any) -> Accepted:
        self._shake()
        return self._answer(await super().accept(*args, **more))

    async def append(self, *args: Any, **more: Any) -> bool:
        self._shake()
        return self._answer(await super().append(*args, **more))

    def _answer(self, done: T) -> T:
        if self.unanswered:
            self.unanswered -= 1
            raise StoreError("the answer was lost")
        return done

    def _shake(self) -> None:
        if self.failures:
            self.failures -= 1
            raise StoreError("the disk is full")


def alone(store: SqliteStore, *, exclusive: bool = True) -> Callable[[], Awaitable[int]]:
    """The epoch of a server that has the store to itself: it ends those before it once it is asked for."""
    enlisted: list[asyncio.Future[int]] = []

    async def epoch() -> int:
        if not enlisted:
            enlisted.append(asyncio.ensure_future(store.enlist("me", ttl_s=1e9, exclusive=exclusive)))
        return await enlisted[0]

    return epoch


def among(store: SqliteStore) -> Callable[[], Awaitable[int]]:
    """The epoch of one of several servers that share the store."""
    return alone(store, exclusive=False)


def a(workflow_id: str = "w", *, final: bool = False, source: Source = "swarmx", parent: str | None = None) -> Identity:
    return Identity(workflow_id=workflow_id, kind="k", node="n", final=final, source=source, parent=parent)


async def visit(workflows: TransparentWorkflows, identity: Identity, tenant: str = "red") -> str:
    """One call from its beginning to its end; returns the id of its workflow."""
    begun = await workflows.touch(identity, tenant)
    await workflows.release(begun)
    return begun.workflow_id


async def state(store: SqliteStore, workflow_id: str = "red:w") -> str | None:
    record = await store.workflow(workflow_id, tenant=None)
    return None if record is None else record.state


async def until(ask: Callable[[], Awaitable[object]], wanted: object) -> None:
    async with asyncio.timeout(20.0):
        while await ask() != wanted:
            await asyncio.sleep(0.005)


async def events_of(store: ShakyStore, workflow_id: str = "red:w") -> list[ProgramEvent]:
    return program_events(await store.events(workflow_id))
