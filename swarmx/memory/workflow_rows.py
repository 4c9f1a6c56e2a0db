"""Workflows and their events as rows: accepted, committed to by their owner, read back in pages."""

# ruff: noqa: S608  # statements are put together from fixed columns and conditions; values are always bound

from __future__ import annotations

import base64
import binascii
import sqlite3
from collections.abc import Sequence
from typing import cast

import msgspec

from swarmx.core.errors import KeyReused, NotFound, StoreError
from swarmx.core.records import (
    SCHEMA_VERSION,
    TERMINAL,
    Accepted,
    Blob,
    CallRecord,
    Commit,
    Committed,
    Idempotency,
    StoredEvent,
    WorkflowPage,
    WorkflowRecord,
    WorkflowState,
)

_FIELDS = WorkflowRecord.__struct_fields__
COLUMNS = ", ".join(_FIELDS)
OPEN = "state IN ('running', 'cancelling')"
_INSERT = f"INSERT INTO workflows ({COLUMNS}) VALUES ({', '.join('?' * len(_FIELDS))})"
_WRITE = (
    "UPDATE workflows SET seq = seq + ?, state = ifnull(?, state), ended_at_s = ?, outcome = ? WHERE workflow_id = ? "
    f"AND seq = ? AND {OPEN} AND NOT (state = 'cancelling' AND ifnull(?, state) = 'running')"
)
_COMMIT = f"{_WRITE} AND owner = ? RETURNING tenant"
_APPEND = f"{_WRITE} AND owner NOT IN (SELECT epoch FROM owners) RETURNING tenant"
_MAX_PAGE = 1000


def accept(
    connection: sqlite3.Connection,
    workflow: WorkflowRecord,
    events: Sequence[bytes],
    idempotency: Idempotency | None,
) -> Accepted:
    """Insert a workflow with its first events, or find the one that the key has brought already."""
    if idempotency is not None:
        connection.execute("DELETE FROM idempotency WHERE expires_at_s <= ?", (workflow.created_at_s,))
        found = connection.execute(
            "SELECT workflow_id, fingerprint FROM idempotency WHERE tenant = ? AND key = ?",
            (workflow.tenant, idempotency.key),
        ).fetchone()
        if found is not None:
            if found[1] != idempotency.fingerprint:
                raise KeyReused(
                    f"the idempotency key {idempotency.key[:80]!r} came with another request before, "
                    f"which became {found[0]}; use a new key for a new request"
                )
            return Accepted(workflow_id=found[0], replayed=True)
    row = msgspec.structs.replace(workflow, seq=len(events))
    try:
        connection.execute(_INSERT, tuple(getattr(row, column) for column in _FIELDS))
    except sqlite3.IntegrityError as error:
        raise StoreError(f"the workflow {workflow.workflow_id!r} already exists; use a new id") from error
    _insert_events(connection, row.workflow_id, row.tenant, 0, row.created_at_s, events)
    if idempotency is not None:
        connection.execute(
            "INSERT INTO idempotency VALUES (?,?,?,?,?,?)",
            (
                row.tenant,
                idempotency.key,
                idempotency.fingerprint,
                row.workflow_id,
                idempotency.expires_at_s,
                SCHEMA_VERSION,
            ),
        )
    return Accepted(workflow_id=row.workflow_id)


def commit(connection: sqlite3.Connection, change: Commit) -> Committed:
    """Everything in the change, if its epoch owns the workflow; raises NotFound."""
    tenant = _write(connection, _COMMIT, change, change.epoch)
    if tenant is None:
        return _why_not(connection, change.workflow_id)
    if change.taken:
        connection.executemany("UPDATE inbox SET taken = 1 WHERE number = ?", [(number,) for number in change.taken])
    for call in change.calls:
        insert_call(connection, call)
    for blob in change.blobs:
        insert_blob(connection, tenant, blob)
    return "stored"


def append(connection: sqlite3.Connection, change: Commit) -> bool:
    """The same for a workflow that nobody owns: its events, state and outcome; raises NotFound."""
    if _write(connection, _APPEND, change) is None:
        _why_not(connection, change.workflow_id)
        return False
    return True


def _write(connection: sqlite3.Connection, statement: str, change: Commit, *epoch: int) -> str | None:
    ends = change.state in TERMINAL
    row = connection.execute(
        statement,
        (
            len(change.events),
            change.state,
            change.at_s if ends else None,
            change.outcome if ends else None,
            change.workflow_id,
            change.expected_seq,
            change.state,
            *epoch,
        ),
    ).fetchone()
    if row is None:
        return None
    _insert_events(connection, change.workflow_id, row[0], change.expected_seq, change.at_s, change.events)
    if ends:
        connection.execute("DELETE FROM inbox WHERE workflow_id = ?", (change.workflow_id,))
    return cast(str, row[0])


def _why_not(connection: sqlite3.Connection, workflow_id: str) -> Committed:
    found = connection.execute("SELECT state FROM workflows WHERE workflow_id = ?", (workflow_id,)).fetchone()
    if found is None:
        raise NotFound(f"there is no workflow {workflow_id!r}; accept it before its events are written")
    return "ended" if found[0] in TERMINAL else "lost"


def find(connection: sqlite3.Connection, workflow_id: str, tenant: str | None) -> WorkflowRecord | None:
    row = connection.execute(
        f"SELECT {COLUMNS} FROM workflows WHERE workflow_id = ? AND tenant = ifnull(?, tenant)", (workflow_id, tenant)
    ).fetchone()
    return None if row is None else record_of(row)


def unfinished(connection: sqlite3.Connection) -> list[WorkflowRecord]:
    rows = connection.execute(f"SELECT {COLUMNS} FROM workflows WHERE {OPEN} ORDER BY created_at_s, workflow_id")
    return [record_of(row) for row in rows]


def page(
    connection: sqlite3.Connection,
    *,
    tenant: str | None,
    state: WorkflowState | None,
    limit: int,
    cursor: str | None,
) -> WorkflowPage:
    """Newest first. Raises NotFound for a cursor of somebody else's, StoreError for a page of a size out of range."""
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
    rows = connection.execute(
        f"SELECT {COLUMNS} FROM workflows {where} ORDER BY created_at_s DESC, workflow_id DESC LIMIT ?",
        (*values, limit + 1),
    ).fetchall()
    records = [record_of(row) for row in rows[:limit]]
    return WorkflowPage(workflows=records, next_cursor=_cursor(records[-1]) if len(rows) > limit else None)


def events(connection: sqlite3.Connection, workflow_id: str, after: int, limit: int | None) -> list[StoredEvent]:
    rows = connection.execute(
        "SELECT seq, at_s, body, schema_version FROM events WHERE workflow_id = ? AND seq > ? ORDER BY seq LIMIT ?",
        (workflow_id, after, -1 if limit is None else limit),
    )
    return [StoredEvent(seq=seq, at_s=at_s, body=body, schema_version=v) for seq, at_s, body, v in rows]


def insert_call(connection: sqlite3.Connection, record: CallRecord) -> None:
    """The first record of a call stands."""
    connection.execute(
        "INSERT INTO calls VALUES (?,?,?,?,?,?) ON CONFLICT (call_id) DO NOTHING",
        (
            record.call_id,
            record.tenant,
            record.workflow_id,
            record.ready_at_s,
            msgspec.json.encode(record),
            record.schema_version,
        ),
    )


def insert_blob(connection: sqlite3.Connection, tenant: str, blob: Blob) -> None:
    connection.execute(
        "INSERT INTO blobs VALUES (?,?,?,?,?) ON CONFLICT (sha256, tenant) DO NOTHING",
        (tenant, blob.sha256, blob.media_type, blob.data, SCHEMA_VERSION),
    )


def record_of(row: Sequence[object]) -> WorkflowRecord:
    """A row in the order of `COLUMNS`."""
    return msgspec.convert(dict(zip(_FIELDS, row, strict=True)), WorkflowRecord)


def _insert_events(
    connection: sqlite3.Connection, workflow_id: str, tenant: str, seq: int, at_s: float, bodies: Sequence[bytes]
) -> None:
    connection.executemany(
        "INSERT INTO events VALUES (?,?,?,?,?,?)",
        [(workflow_id, seq + i, tenant, at_s, body, SCHEMA_VERSION) for i, body in enumerate(bodies, start=1)],
    )


def _cursor(record: WorkflowRecord) -> str:
    key = msgspec.json.encode([record.created_at_s, record.workflow_id])
    return base64.urlsafe_b64encode(key).decode()


def _read_cursor(cursor: str) -> tuple[float, str]:
    try:
        return msgspec.json.decode(base64.urlsafe_b64decode(cursor), type=tuple[float, str])
    except (binascii.Error, ValueError, msgspec.DecodeError) as error:
        raise NotFound(f"the cursor {cursor[:40]!r} is not of this server; start from the first page") from error
