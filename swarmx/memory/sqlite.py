"""The store in SQLite: one file, one writing thread with group commit, reads beside it."""

# ruff: noqa: S608  # statements are put together from fixed columns and conditions; values are always bound

from __future__ import annotations

import base64
import binascii
import os
import sqlite3
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

import msgspec

from swarmx.core.errors import NotFound, StoreError
from swarmx.core.nouns import Decision
from swarmx.core.records import (
    SCHEMA_VERSION,
    TERMINAL,
    CallRecord,
    StoredEvent,
    WorkflowPage,
    WorkflowRecord,
    WorkflowState,
)
from swarmx.memory.lane import Lane, explained
from swarmx.memory.schema import migrate

T = TypeVar("T")

_FIELDS = WorkflowRecord.__struct_fields__
_COLUMNS = ", ".join(_FIELDS)
_ALLOWED: dict[str, frozenset[WorkflowState]] = {
    "running": TERMINAL | {"running", "cancelling"},
    "cancelling": TERMINAL | {"cancelling"},
}
_MAX_PAGE = 1000


class SqliteStore:
    """The Store port on one SQLite database (`path`, or ":memory:" for one that ends with the process).

    A write returns once it is on disk (WAL, synchronous=FULL). The file is created readable by its owner only.
    """

    def __init__(self, path: str | Path, *, busy_timeout_s: float = 5.0) -> None:
        self._path = path
        self._in_memory = str(path) == ":memory:"
        self._busy_timeout_s = busy_timeout_s
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

    async def accept(self, workflow: WorkflowRecord, events: Sequence[bytes]) -> None:
        """Store a new workflow with its first events; `seq` becomes their number. Raises StoreError if it exists."""
        bodies = list(events)

        def write(connection: sqlite3.Connection) -> None:
            row = msgspec.structs.replace(workflow, seq=len(bodies))
            try:
                connection.execute(f"INSERT INTO workflows ({_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?,?,?)", _row(row))
            except sqlite3.IntegrityError as error:
                raise StoreError(f"the workflow {workflow.workflow_id!r} already exists; use a new id") from error
            _insert_events(connection, workflow.workflow_id, workflow.tenant, 0, workflow.created_at_s, bodies)

        await self.write(write)

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
        """Add events, and change the state if one is given (running, then cancelling, then terminal; never back).

        False, and nothing has changed: the workflow is terminal, has another number of events than `expected_seq`, or
        must not change to that state. `outcome` is stored with a terminal state. Raises NotFound.
        """
        bodies = list(events)

        def write(connection: sqlite3.Connection) -> bool:
            found = connection.execute(
                "SELECT tenant, state, seq FROM workflows WHERE workflow_id = ?", (workflow_id,)
            ).fetchone()
            if found is None:
                raise NotFound(f"there is no workflow {workflow_id!r}; accept it before its events are appended")
            tenant, old, seq = found
            if old in TERMINAL or seq != expected_seq or (state is not None and state not in _ALLOWED[old]):
                return False
            _insert_events(connection, workflow_id, tenant, seq, at_s, bodies)
            ends = state in TERMINAL
            connection.execute(
                "UPDATE workflows SET seq = ?, state = ?, ended_at_s = ?, outcome = ? WHERE workflow_id = ?",
                (seq + len(bodies), state or old, at_s if ends else None, outcome if ends else None, workflow_id),
            )
            return True

        return await self.write(write)

    async def workflow(self, workflow_id: str, *, tenant: str | None) -> WorkflowRecord | None:
        """One workflow, or None if it is unknown or another tenant's."""

        def read(connection: sqlite3.Connection) -> WorkflowRecord | None:
            row = connection.execute(
                f"SELECT {_COLUMNS} FROM workflows WHERE workflow_id = ? AND tenant = ifnull(?, tenant)",
                (workflow_id, tenant),
            ).fetchone()
            return None if row is None else _record(row)

        return await self.read(read)

    async def workflows(
        self, *, tenant: str | None, state: WorkflowState | None, limit: int, cursor: str | None
    ) -> WorkflowPage:
        """A page, newest first; `limit` is 1 to 1000. Raises NotFound for a cursor that this store did not give out."""
        if not 1 <= limit <= _MAX_PAGE:
            raise StoreError(f"a page of {limit} workflows was asked for, 1 to {_MAX_PAGE} can be had")
        conditions: list[str] = []
        values: list[object] = []
        for column, value in (("tenant", tenant), ("state", state)):
            if value is not None:
                conditions.append(f"{column} = ?")
                values.append(value)
        if cursor is not None:
            conditions.append("(created_at_s, workflow_id) < (?, ?)")
            values.extend(_read_cursor(cursor))
        where = f"WHERE {' AND '.join(conditions)}" if conditions else ""

        def read(connection: sqlite3.Connection) -> WorkflowPage:
            rows = connection.execute(
                f"SELECT {_COLUMNS} FROM workflows {where} ORDER BY created_at_s DESC, workflow_id DESC LIMIT ?",
                (*values, limit + 1),
            ).fetchall()
            records = [_record(row) for row in rows[:limit]]
            return WorkflowPage(workflows=records, next_cursor=_cursor(records[-1]) if len(rows) > limit else None)

        return await self.read(read)

    async def events(self, workflow_id: str) -> list[StoredEvent]:
        """All events of a workflow in their order; none if it is unknown."""

        def read(connection: sqlite3.Connection) -> list[StoredEvent]:
            rows = connection.execute(
                "SELECT seq, at_s, body, schema_version FROM events WHERE workflow_id = ? ORDER BY seq", (workflow_id,)
            )
            return [StoredEvent(seq=seq, at_s=at_s, body=body, schema_version=v) for seq, at_s, body, v in rows]

        return await self.read(read)

    async def unfinished(self) -> list[WorkflowRecord]:
        """The workflows of all tenants that are not terminal, oldest first."""

        def read(connection: sqlite3.Connection) -> list[WorkflowRecord]:
            rows = connection.execute(
                f"SELECT {_COLUMNS} FROM workflows WHERE state IN ('running', 'cancelling') "
                "ORDER BY created_at_s, workflow_id"
            )
            return [_record(row) for row in rows]

        return await self.read(read)

    async def record_call(self, record: CallRecord) -> None:
        """Keep what became of a call. The first record of a call stands: a call is never counted twice."""
        body = msgspec.json.encode(record)

        def write(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT INTO calls VALUES (?,?,?,?,?,?) ON CONFLICT (call_id) DO NOTHING",
                (record.call_id, record.tenant, record.workflow_id, record.ready_at_s, body, record.schema_version),
            )

        await self.write(write)

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
        digest = sha256(data).hexdigest()

        def write(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT INTO blobs VALUES (?,?,?,?,?) ON CONFLICT (sha256, tenant) DO NOTHING",
                (tenant, digest, media_type, data, SCHEMA_VERSION),
            )

        await self.write(write)
        return digest

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

    async def write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run the job in a transaction, alone or with others; returns once it is on disk."""
        return await self._open_lane(self._writer).do(work)

    async def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run the job beside the writer; it sees what was on disk when it began."""
        return await self._open_lane(self._reader).do(work)

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
            connection.execute("PRAGMA synchronous = FULL")
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


def _insert_events(
    connection: sqlite3.Connection, workflow_id: str, tenant: str, seq: int, at_s: float, bodies: list[bytes]
) -> None:
    connection.executemany(
        "INSERT INTO events VALUES (?,?,?,?,?,?)",
        [(workflow_id, seq + i, tenant, at_s, body, SCHEMA_VERSION) for i, body in enumerate(bodies, start=1)],
    )


def _row(record: WorkflowRecord) -> tuple[object, ...]:
    return tuple(getattr(record, column) for column in _FIELDS)


def _record(row: tuple[object, ...]) -> WorkflowRecord:
    return msgspec.convert(dict(zip(_FIELDS, row, strict=True)), WorkflowRecord)


def decoded(body: bytes, kind: type[T]) -> T:
    """A stored value. Raises StoreError."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise StoreError(
            f"a stored {kind.__name__} cannot be read: {error}; was it written by another version?"
        ) from error


def _cursor(record: WorkflowRecord) -> str:
    key = msgspec.json.encode([record.created_at_s, record.workflow_id])
    return base64.urlsafe_b64encode(key).decode()


def _read_cursor(cursor: str) -> tuple[float, str]:
    try:
        return msgspec.json.decode(base64.urlsafe_b64decode(cursor), type=tuple[float, str])
    except (binascii.Error, ValueError, msgspec.DecodeError) as error:
        raise NotFound(f"the cursor {cursor[:40]!r} is not of this server; start from the first page") from error
