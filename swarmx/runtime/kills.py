"""Kills: a workflow ends at once, whoever runs it and whether or not that still answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

from swarmx.core import failpoints
from swarmx.core.errors import StoreError
from swarmx.core.ports import WorkflowStore
from swarmx.core.records import Commit, WorkflowRecord
from swarmx.runtime.clock import Clock
from swarmx.runtime.doubtful import once_readable
from swarmx.workflows.events import Cancelled, encode_event


class Kills:
    """`killed` hears once of each kill that is stored, with its time; also of one that the store reported as failed."""

    def __init__(
        self,
        store: WorkflowStore,
        clock: Clock,
        *,
        epoch: Callable[[], Awaitable[int]],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        killed: Callable[[WorkflowRecord, float], None],
    ) -> None:
        self._store = store
        self._clock = clock
        self._epoch = epoch
        self._spawn = spawn
        self._killed = killed

    async def kill(self, workflow_id: str) -> None:
        """Returns once it has ended, by this or otherwise. Raises StoreError: it may have ended all the same."""
        while (taken := await self._store.take(workflow_id, epoch := await self._epoch())) is not None:
            failpoints.hit("runner.taken")
            change = Commit(
                workflow_id=workflow_id,
                epoch=epoch,
                expected_seq=taken.seq,
                at_s=self._clock.now_s(),
                events=(encode_event(Cancelled(killed=True)),),
                state="cancelled",
            )
            try:
                done = await self._store.commit(change)
            except StoreError:
                self._spawn(once_readable(partial(self._look, taken, change)))
                raise
            if done == "stored":  # else it took another step meanwhile
                self._killed(taken, change.at_s)

    async def _look(self, taken: WorkflowRecord, kill: Commit) -> None:
        found = await self._store.events(kill.workflow_id, after=kill.expected_seq, limit=1)
        now = await self._store.workflow(kill.workflow_id, tenant=None)
        if tuple(event.body for event in found) == kill.events and now is not None and now.owner == kill.epoch:
            self._killed(taken, kill.at_s)
