"""Writes what is seen of workflows that nobody declared: later and together, so that no call waits for it."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Any

import msgspec

from swarmx.core.errors import StoreError
from swarmx.core.ports import Store
from swarmx.core.records import TERMINAL, WorkflowRecord, WorkflowState
from swarmx.gateway.program_events import ProgramEnded, ProgramEvent, ProgramStarted, Why, encode
from swarmx.runtime.clock import Clock

log = logging.getLogger(__name__)

MOST_WAITING = 1000  # events of one workflow


@dataclass(slots=True, kw_only=True)
class _Page:
    """One workflow: `seq` of its events are stored, `waiting` are not yet, `lost` were too many.

    `ending`: its end was written, though perhaps without an answer.
    """

    seq: int
    waiting: list[bytes] = field(default_factory=list)
    lost: int = 0
    ending: bool = False
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)


class ProgramLog:
    """Mostly the only writer of these workflows. Their beginnings and ends are durable; a crash loses what waits."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._pages: dict[str, _Page] = {}

    async def begin(self, record: WorkflowRecord, started: ProgramStarted) -> None:
        """Store a new workflow. Raises StoreError."""
        await self._store.accept(record, (encode(started),))
        self._pages[record.workflow_id] = _Page(seq=1)

    def resume(self, record: WorkflowRecord) -> None:
        """Go on with one that is in the store."""
        self._pages[record.workflow_id] = _Page(seq=record.seq)

    async def catch_up(self, workflow_id: str) -> tuple[WorkflowRecord | None, bool]:
        """The workflow as it is now, and whether another server has written to it meanwhile. Raises StoreError."""
        page = self._pages[workflow_id]
        async with page.writing:
            found = await self._store.workflow(workflow_id, tenant=None)
            if page.waiting or found is None or found.state in TERMINAL or found.seq == page.seq:
                return found, False
            page.seq = found.seq
            return found, True

    def forget(self, workflow_id: str) -> None:
        """Another server has it; what waits is dropped."""
        self._pages.pop(workflow_id, None)

    def note(self, workflow_id: str, event: ProgramEvent) -> None:
        """Keep the event; of an unknown workflow it is dropped."""
        page = self._pages.get(workflow_id)
        if page is None:
            return
        if len(page.waiting) < MOST_WAITING:
            page.waiting.append(encode(event))
        else:
            page.lost += 1

    async def flush(self) -> None:
        """Store what waits; what the store refuses waits on."""
        waiting = [(workflow_id, page) for workflow_id, page in self._pages.items() if page.waiting]
        results = await asyncio.gather(*(self._write(*found) for found in waiting), return_exceptions=True)
        for result in results:
            if isinstance(result, StoreError):
                log.warning("events of a workflow have to wait: %s", result)
            elif isinstance(result, BaseException):
                raise result

    async def cancelling(self, workflow_id: str) -> None:
        """From now on it ends as cancelled, even over a restart. Raises StoreError."""
        await self._write(workflow_id, self._pages[workflow_id], state="cancelling")

    async def end(self, workflow_id: str, why: Why, *, calls: int) -> bool:
        """Store its end; False: another server had ended it before, and that stays. Raises StoreError."""
        page = self._pages[workflow_id]
        again, page.ending = page.ending, True
        stored = await self._write(
            workflow_id,
            page,
            encode(ProgramEnded(at_s=self._clock.now_s(), why=why, lost=page.lost)),
            state="cancelled" if why == "cancelled" else "finished",
            outcome=msgspec.json.encode({"calls": calls, "ended_by": why}),
        )
        del self._pages[workflow_id]
        return stored or again

    async def _write(
        self, workflow_id: str, page: _Page, *more: bytes, state: WorkflowState | None = None, outcome: Any = None
    ) -> bool:
        """False: it has ended."""
        async with page.writing:
            while True:
                taken = len(page.waiting)
                events = [*page.waiting, *more]
                stored = await self._store.append(
                    workflow_id,
                    events,
                    expected_seq=page.seq,
                    at_s=self._clock.now_s(),
                    state=state,
                    outcome=outcome,
                )
                if stored:
                    page.seq += len(events)
                    del page.waiting[:taken]
                    return True
                # An earlier write, reported as failed, was done after all: it had the oldest of those that wait.
                found = await self._store.workflow(workflow_id, tenant=None)
                if found is None or found.state in TERMINAL:
                    page.waiting.clear()
                    return False
                if found.seq == page.seq:
                    raise StoreError(f"the workflow {workflow_id} is {found.state} and cannot become {state}")
                del page.waiting[: found.seq - page.seq]
                page.seq = found.seq
