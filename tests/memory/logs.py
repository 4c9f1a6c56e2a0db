"""Audit logs to test with."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec

from swarmx.core.audit import AuditEntry, Head
from swarmx.core.control import Actor
from swarmx.core.ports import AuditTrail
from swarmx.memory.audit import LOG_NAME, AuditLog

OPERATOR = Actor(type="key", name="ops", role="operator")


def entry(number: int = 0, **changes: Any) -> AuditEntry:
    made = AuditEntry(kind="note", actor=OPERATOR, via="cli", tool="no_op", arguments={"number": number})
    return msgspec.structs.replace(made, **changes)


@contextlib.asynccontextmanager
async def opened(folder: Path, **options: Any) -> AsyncIterator[AuditLog]:
    log = AuditLog(folder / LOG_NAME, clock=lambda: 1000.0, **options)
    await log.open()
    try:
        yield log
    finally:
        await log.close()


async def filled(folder: Path, count: int) -> None:
    async with opened(folder) as log:
        trail: AuditTrail = log
        for number in range(1, count + 1):
            assert await trail.write(entry(number)) == number


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


def heads(folder: Path) -> list[Head]:
    return [msgspec.json.decode(line, type=Head) for line in (folder / "audit.heads").read_bytes().splitlines()]


async def write_many(log: AuditLog, count: int) -> None:
    for number in range(count):
        await log.write(entry(number))
