"""The store in SQLite: one file, one writing thread with group commit, reads beside it."""

# ruff: noqa: S608  # statements are put together from fixed columns and conditions; values are always bound

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Awaitable, Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from swarmx.core.errors import StoreError
from swarmx.core.nouns import Decision
from swarmx.core.records import (
    SCHEMA_VERSION,
    Accepted,
    Blob,
    CallRecord,
    Commit,
    Committed,
    Forgotten,
    Idempotency,
    Input,
    StoredEvent,
    WorkflowMode,
    WorkflowPage,
    WorkflowRecord,
    WorkflowState,
)
from swarmx.memory import forgetting, owner_rows, workflow_rows
from swarmx.memory.lane import Lane, explained
from swarmx.memory.rows import decoded, finished
from swarmx.memory.schema import migrate

T = TypeVar("T")


class SqliteStore:
    """The Store port on one SQLite database (`path`, or ":memory:" for one that ends with the process).

    A write returns once it is on disk (WAL, synchronous=FULL); with `synchronous` NORMAL, which servers do not use, the
    last writes before a loss of power may be missing. The file is created readable by its owner only. `clock` (Unix
    seconds) tells which owners are gone. Also implements the Ownership port.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        busy_timeout_s: float = 5.0,
        clock: Callable[[], float] = time.time,
        synchronous: Literal["FULL", "NORMAL"] = "FULL",
    ) -> None:
        self._path = path
        self._in_memory = str(path) == ":memory:"
        self._busy_timeout_s = busy_timeout_s
        self._clock = clock
        self._synchronous = synchronous
        self._writer: Lane | None = None
        self._reader: Lane | None = None

    async def open(self) -> None:
        """Create or migrate the database. Raises StoreError: it cannot be opened, or a newer version wrote it."""
        if self._writer is not None:
            raise StoreError(f"the store {self._path} is already open")
        try:
            self._writer = self._reader = await Lane.open(self._connect_writer, name="store-writer", commits=True)
            if not self._in_memory:
                self._reader = await Lane.open(self._connect_reader, name="store-reader", commits=False)
        except (sqlite3.Error, OSError) as error:
            await self.close()
            raise StoreError(f"the database {self._path} cannot be opened: {explained(error)}") from error

    async def close(self) -> None:
        """Finish queued writes and close. Closing twice is fine."""
        for lane in (self._reader, self._writer):
            if lane is not None:
                await lane.close()
        self._writer = self._reader = None

    async def accept(
        self, workflow: WorkflowRecord, events: Sequence[bytes], *, idempotency: Idempotency | None = None
    ) -> Accepted:
        """Store a new workflow with its first events; `seq` becomes their number.

        A key that came before gives the workflow that it brought then. Raises StoreError if the id exists, KeyReused.
        """
        bodies = list(events)
        return await self.write(lambda connection: workflow_rows.accept(connection, workflow, bodies, idempotency))

    async def of_key(self, tenant: str, idempotency: Idempotency) -> str | None:
        """The workflow of the request that came with the key before, None for a new key. Raises KeyReused."""
        return await self.read(lambda connection: workflow_rows.of_key(connection, tenant, idempotency, self._clock()))

    async def keep_key(self, tenant: str, idempotency: Idempotency, workflow_id: str) -> None:
        """Remember that the request with this key was carried out, on this workflow; the first one stays."""
        await self.write(
            lambda connection: workflow_rows.keep_key(connection, tenant, idempotency, workflow_id, self._clock())
        )

    async def commit(self, change: Commit) -> Committed:
        """Write everything in the change, or say why nothing was. Raises NotFound."""
        return await self.write(lambda connection: workflow_rows.commit(connection, change))

    async def append(
        self,
        workflow_id: str,
        events: Sequence[bytes],
        *,
        expected_seq: int,
        at_s: float,
        state: WorkflowState | None = None,
        outcome: bytes | None = None,
    ) -> bool:
        """Add to a transparent workflow, or one that no process owns, and change the state if one is given.

        False, and nothing has changed: the workflow is terminal or run by somebody, has another number of events than
        `expected_seq`, or must not change to that state. Raises NotFound.
        """
        change = Commit(
            workflow_id=workflow_id,
            epoch=0,
            expected_seq=expected_seq,
            at_s=at_s,
            events=tuple(events),
            state=state,
            outcome=outcome,
        )
        return await self.write(lambda connection: workflow_rows.append(connection, change))

    async def workflow(self, workflow_id: str, *, tenant: str | None) -> WorkflowRecord | None:
        """One workflow, or None if it is unknown or another tenant's."""
        return await self.read(lambda connection: workflow_rows.find(connection, workflow_id, tenant))

    async def newest_of(self, workflow_id: str, *, tenant: str | None) -> WorkflowRecord | None:
        """The last of a workflow and those that came after it as `workflow_id~2`, `workflow_id~3`, ...; or None."""
        return await self.read(lambda connection: workflow_rows.newest_of(connection, workflow_id, tenant))

    async def workflows(
        self, *, tenant: str | None, state: WorkflowState | None, limit: int, cursor: str | None
    ) -> WorkflowPage:
        """A page, newest first; `limit` is 1 to 1000. Raises NotFound for a cursor that this store did not give out."""
        return await self.read(
            lambda connection: workflow_rows.page(connection, tenant=tenant, state=state, limit=limit, cursor=cursor)
        )

    async def events(self, workflow_id: str, *, after: int = 0, limit: int | None = None) -> list[StoredEvent]:
        """The events of a workflow behind the `after`-th, in their order; none if it is unknown."""
        return await self.read(lambda connection: workflow_rows.events(connection, workflow_id, after, limit))

    async def unfinished(self) -> list[WorkflowRecord]:
        """The workflows of all tenants that are not terminal, oldest first."""
        return await self.read(workflow_rows.unfinished)

    async def post(self, workflow_id: str, body: bytes, *, dedup: str, tenant: str | None) -> bool:
        """Leave something for the owner; False: that came before, or the workflow has ended. Raises NotFound."""
        return await self.write(
            lambda connection: owner_rows.post(
                connection, workflow_id, body, dedup=dedup, tenant=tenant, at_s=self._clock()
            )
        )

    async def inputs(self, workflow_id: str) -> list[Input]:
        """What was posted to the workflow and has not become an event yet, in its order."""
        return await self.read(lambda connection: owner_rows.inputs(connection, workflow_id))

    async def enlist(self, name: str, *, ttl_s: float, exclusive: bool) -> int:
        """An epoch, larger than any before, that others respect for `ttl_s`; an `exclusive` one ends all others."""
        return await self.write(
            lambda connection: owner_rows.enlist(connection, name, self._clock() + ttl_s, exclusive=exclusive)
        )

    async def heartbeat(self, epoch: int, *, ttl_s: float) -> bool:
        """Keep the epoch for another `ttl_s`; False: it is over."""
        return await self.write(lambda connection: owner_rows.heartbeat(connection, epoch, self._clock() + ttl_s))

    async def claim(self, epoch: int, *, limit: int, mode: WorkflowMode = "declared") -> list[WorkflowRecord]:
        """Take up to `limit` unfinished workflows of the mode whose owner is gone, the oldest first."""
        return await self.write(lambda connection: owner_rows.claim(connection, epoch, limit, self._clock(), mode))

    async def take(self, workflow_id: str, epoch: int, *, mode: WorkflowMode = "declared") -> WorkflowRecord | None:
        """Take one workflow from whoever has it; None if it is unknown, has ended, or is of another mode."""
        return await self.write(lambda connection: owner_rows.take(connection, workflow_id, epoch, mode))

    async def owned(self, epoch: int) -> list[str]:
        """The unfinished workflows that this epoch has to run."""
        return await self.read(lambda connection: owner_rows.owned(connection, epoch))

    async def waiting(self, epoch: int) -> list[str]:
        """The workflows of this epoch to which something was posted that has not become an event yet."""
        return await self.read(lambda connection: owner_rows.waiting(connection, epoch))

    async def retire(self, epoch: int) -> None:
        """End the epoch; its workflows are free."""
        await self.write(lambda connection: owner_rows.retire(connection, epoch))

    async def record_call(self, record: CallRecord) -> None:
        """Keep what became of a call. The first record of a call stands: a call is never counted twice."""
        await self.write(lambda connection: workflow_rows.insert_call(connection, record))

    async def call(self, call_id: str, *, tenant: str | None) -> CallRecord | None:
        """One call, or None if it is unknown or another tenant's."""
        found = await self._bodies("calls WHERE call_id = ? AND tenant = ifnull(?, tenant)", call_id, tenant)
        return decoded(found[0], CallRecord) if found else None

    async def calls(self, workflow_id: str, *, tenant: str | None) -> list[CallRecord]:
        """The calls of a workflow in the order in which they became ready."""
        found = await self._bodies(
            "calls WHERE workflow_id = ? AND tenant = ifnull(?, tenant) ORDER BY ready_at_s, call_id",
            workflow_id,
            tenant,
        )
        return [decoded(body, CallRecord) for body in found]

    async def newest_finished(self, limit: int) -> list[CallRecord]:
        """The finished ones among the last `limit` calls that were recorded, of all tenants, oldest first."""

        def read(connection: sqlite3.Connection) -> list[bytes]:
            return [
                row[0] for row in connection.execute("SELECT body FROM calls ORDER BY rowid DESC LIMIT ?", (limit,))
            ]

        return finished(await self.read(read))

    async def forget(self, *, older_than_s: float, kept_calls: int, limit: int) -> Forgotten:
        """Delete up to `limit` of what ended more than `older_than_s` ago; ask again until that is nothing."""
        return await self.write(
            lambda connection: forgetting.forget(
                connection, self._clock(), older_than_s=older_than_s, kept_calls=kept_calls, limit=limit
            )
        )

    async def record_decision(self, decision: Decision) -> None:
        """Add a decision to the log."""
        body = msgspec.json.encode(decision)
        call = decision.call

        def write(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT INTO decisions (call_id, tenant, at_s, body, schema_version) VALUES (?,?,?,?,?)",
                (call.call_id, call.tenant, decision.at_s, body, SCHEMA_VERSION),
            )

        await self.write(write)

    async def decisions(self, call_id: str, *, tenant: str | None) -> list[Decision]:
        """The decisions about a call, first to last."""
        found = await self._bodies(
            "decisions WHERE call_id = ? AND tenant = ifnull(?, tenant) ORDER BY decision_id", call_id, tenant
        )
        return [decoded(body, Decision) for body in found]

    async def put_blob(self, tenant: str, media_type: str, data: bytes) -> str:
        """Keep the bytes under their SHA-256, which is returned (64 hex digits)."""
        blob = Blob(sha256=sha256(data).hexdigest(), media_type=media_type, data=data)
        await self.write(lambda connection: workflow_rows.insert_blob(connection, tenant, blob))
        return blob.sha256

    async def blob(self, sha256: str, *, tenant: str | None) -> tuple[str, bytes] | None:
        """Media type and bytes, or None if unknown or another tenant's."""

        def read(connection: sqlite3.Connection) -> tuple[str, bytes] | None:
            row: tuple[str, bytes] | None = connection.execute(
                "SELECT media_type, data FROM blobs WHERE sha256 = ? AND tenant = ifnull(?, tenant) ORDER BY tenant",
                (sha256, tenant),
            ).fetchone()
            return row

        return await self.read(read)

    async def _bodies(self, tail: str, key: str, tenant: str | None) -> list[bytes]:
        def read(connection: sqlite3.Connection) -> list[bytes]:
            return [row[0] for row in connection.execute(f"SELECT body FROM {tail}", (key, tenant))]

        return await self.read(read)

    def write(self, work: Callable[[sqlite3.Connection], T]) -> Awaitable[T]:
        """Run the job in a transaction, alone or with others; its result comes once it is on disk."""
        return self._open_lane(self._writer).do(work)

    def read(self, work: Callable[[sqlite3.Connection], T]) -> Awaitable[T]:
        """Run the job beside the writer; it sees what was on disk when it began."""
        return self._open_lane(self._reader).do(work)

    def _open_lane(self, lane: Lane | None) -> Lane:
        if lane is None:
            raise StoreError(f"the store {self._path} is not open; call open() first")
        return lane

    def _connect_writer(self) -> sqlite3.Connection:
        if not self._in_memory:
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
        connection = self._connect()
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(f"PRAGMA synchronous = {self._synchronous}")
            migrate(connection, self._path)
        except BaseException:
            connection.close()
            raise
        return connection

    def _connect_reader(self) -> sqlite3.Connection:
        connection = self._connect()
        connection.execute("PRAGMA query_only = ON")
        return connection

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, isolation_level=None, timeout=self._busy_timeout_s)
        connection.execute("PRAGMA foreign_keys = ON")
        return connection
