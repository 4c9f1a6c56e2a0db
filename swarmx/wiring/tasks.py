"""Tasks that live as long as the server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from swarmx.runtime.journal import FileJournal

log = logging.getLogger(__name__)

_FLUSH_EVERY_S = 0.5


@asynccontextmanager
async def running_task(work: Coroutine[Any, Any, None], *, name: str) -> AsyncIterator[None]:
    """The task runs within the block and is cancelled at its end. One that dies is logged, and hurts nobody else."""
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_ended)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


@asynccontextmanager
async def flushed(journal: FileJournal) -> AsyncIterator[None]:
    """The journal is flushed twice a second within the block, and closed at its end. A full disk stops nothing else."""
    try:
        async with running_task(_flush(journal), name="journal"):
            yield
    finally:
        try:
            journal.close()
        except OSError as error:
            log.error("the end of the journal %s is lost: %s", journal.path, error)


async def _flush(journal: FileJournal) -> None:
    while True:
        await asyncio.sleep(_FLUSH_EVERY_S)
        try:
            journal.flush()
        except OSError as error:
            log.error("the journal %s is not flushed any more: %s", journal.path, error)
            return


def _ended(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("%s ended: the server goes on without it", task.get_name(), exc_info=error)
