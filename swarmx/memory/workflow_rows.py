"""Workflows and their events as rows: accepted, committed to by their owner, read back in pages."""

# ruff: noqa: S608  # statements are put together from fixed columns and conditions; values are always bound

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import cast

import msgspec

from swarmx.core import failpoints
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
from swarmx.memory import rows
from swarmx.memory.rows import COLUMNS, FIELDS, OPEN, page_of, record_of, values_of

_INSERT = f"INSERT INTO workflows ({COLUMNS}) VALUES ({', '.join('?' * len(FIELDS))})"
_WRITE = (
    "UPDATE workflows SET seq = seq + ?, state = ifnull(?, state), ended_at_s = ?, outcome = ? WHERE workflow_id = ? "
    f"AND seq = ? AND {OPEN} AND NOT (state = 'cancelling' AND ifnull(?, state) = 'running')"
)
_COMMIT = f"{_WRITE} AND owner = ?"
_APPEND = f"{_WRITE} AND (mode = 'transparent' OR owner NOT IN (SELECT epoch FROM owners))"
_STEP = f"UPDATE workflows SET seq = seq + ? WHERE workflow_id = ? AND seq = ? AND {OPEN} AND owner = ?"
_TENANT = "(SELECT tenant FROM workflows WHERE workflow_id = ?1)"
_EVENT = f"INSERT INTO events VALUES (?1, ?2, {_TENANT}, ?3, ?4, {SCHEMA_VERSION})"


def accept(
    connection: sqlite3.Connection,
    workflow: WorkflowRecord,
    events: Sequence[bytes],
    idempotency: Idempotency | None,
) -> Accepted:
    """Insert a workflow with its first events, or find the one that the key has brought already."""
    key_tenant = workflow.tenant if idempotency is None else idempotency.tenant or workflow.tenant
    if idempotency is not None:
        connection.execute("DELETE FROM idempotency WHERE expires_at_s <= ?", (workflow.created_at_s,))
        found = of_key(connection, key_tenant, idempotency, workflow.created_at_s)
        if found is not None:
            return Accepted(workflow_id=found, replayed=True)
    row = msgspec.structs.replace(workflow, seq=len(events))
    try:
        connection.execute(_INSERT, values_of(row))
    except sqlite3.IntegrityError as error:
        raise rows.already_exists(workflow.workflow_id) from error
    if row.forked_from is not None:
        _share_blobs(connection, row.forked_from, row.workflow_id)
    _insert_events(connection, row.workflow_id, 0, row.created_at_s, events)
    if idempotency is not None:
        failpoints.hit("rows.key")
        keep_key(connection, key_tenant, idempotency, row.workflow_id, workflow.created_at_s)
    return Accepted(workflow_id=row.workflow_id)


def of_key(connection: sqlite3.Connection, tenant: str, idempotency: Idempotency, now_s: float) -> str | None:
    """The workflow of the request that came with the key before. Raises KeyReused if that was another request."""
    row = connection.execute(
        "SELECT workflow_id, fingerprint FROM idempotency WHERE tenant = ? AND key = ? AND expires_at_s > ?",
        (tenant, idempotency.key, now_s),
    ).fetchone()
    if row is None:
        return None
    if row[1] != idempotency.fingerprint:
        raise rows.key_reused(idempotency, row[0])
    return cast(str, row[0])


def keep_key(
    connection: sqlite3.Connection, tenant: str, idempotency: Idempotency, workflow_id: str, now_s: float
) -> None:
    """Remember what the key brought, unless it brought something else meanwhile; it may be there already, expired."""
    connection.execute(
        "DELETE FROM idempotency WHERE tenant = ? AND key = ? AND expires_at_s <= ?", (tenant, idempotency.key, now_s)
    )
    connection.execute(
        "INSERT INTO idempotency VALUES (?,?,?,?,?,?) ON CONFLICT (tenant, key) DO NOTHING",
        (tenant, idempotency.key, idempotency.fingerprint, workflow_id, idempotency.expires_at_s, SCHEMA_VERSION),
    )


def commit(connection: sqlite3.Connection, change: Commit) -> Committed:
    """Everything in the change, if its epoch owns the workflow; raises NotFound."""
    if not (_step(connection, change) if change.state is None else _write(connection, _COMMIT, change, change.epoch)):
        return _why_not(connection, change.workflow_id)
    failpoints.hit("rows.commit")
    if change.taken:
        connection.executemany("UPDATE inbox SET taken = 1 WHERE number = ?", [(number,) for number in change.taken])
    for call in change.calls:
        insert_call(connection, call)
    if change.blobs:
        (tenant,) = connection.execute(
            "SELECT tenant FROM workflows WHERE workflow_id = ?", (change.workflow_id,)
        ).fetchone()
        for blob in change.blobs:
            insert_blob(connection, tenant, blob, change.workflow_id)
    return "stored"


def append(connection: sqlite3.Connection, change: Commit) -> bool:
    """The same for a transparent workflow, or one that nobody owns: events, state, outcome; raises NotFound."""
    if not _write(connection, _APPEND, change):
        _why_not(connection, change.workflow_id)
        return False
    return True


def _step(connection: sqlite3.Connection, change: Commit) -> bool:
    """Write what nearly every commit is, events only: no index has to be looked at, as the state stays."""
    values = (len(change.events), change.workflow_id, change.expected_seq, change.epoch)
    if connection.execute(_STEP, values).rowcount == 0:
        return False
    _insert_events(connection, change.workflow_id, change.expected_seq, change.at_s, change.events)
    return True


def _write(connection: sqlite3.Connection, statement: str, change: Commit, *epoch: int) -> bool:
    ends = change.state in TERMINAL
    values = (
        len(change.events),
        change.state,
        change.at_s if ends else None,
        change.outcome if ends else None,
        change.workflow_id,
        change.expected_seq,
        change.state,
        *epoch,
    )
    if connection.execute(statement, values).rowcount == 0:
        return False
    _insert_events(connection, change.workflow_id, change.expected_seq, change.at_s, change.events)
    if ends:
        connection.execute("DELETE FROM inbox WHERE workflow_id = ?", (change.workflow_id,))
    return True


def _why_not(connection: sqlite3.Connection, workflow_id: str) -> Committed:
    found = connection.execute("SELECT state FROM workflows WHERE workflow_id = ?", (workflow_id,)).fetchone()
    if found is None:
        raise rows.never_accepted(workflow_id)
    return "ended" if found[0] in TERMINAL else "lost"


def find(connection: sqlite3.Connection, workflow_id: str, tenant: str | None) -> WorkflowRecord | None:
    row = connection.execute(
        f"SELECT {COLUMNS} FROM workflows WHERE workflow_id = ? AND tenant = ifnull(?, tenant)", (workflow_id, tenant)
    ).fetchone()
    return None if row is None else record_of(row)


def newest_of(connection: sqlite3.Connection, workflow_id: str, tenant: str | None) -> WorkflowRecord | None:
    row = connection.execute(
        f"SELECT {COLUMNS} FROM workflows WHERE (workflow_id = ?1 OR (workflow_id > ?1 || '~' AND workflow_id < ?1 || "
        "'~:')) AND tenant = ifnull(?2, tenant) ORDER BY length(workflow_id) DESC, workflow_id DESC LIMIT 1",
        (workflow_id, tenant),
    ).fetchone()
    return None if row is None else record_of(row)


def unfinished(connection: sqlite3.Connection) -> list[WorkflowRecord]:
    found = connection.execute(f"SELECT {COLUMNS} FROM workflows WHERE {OPEN} ORDER BY created_at_s, workflow_id")
    return [record_of(row) for row in found]


def page(
    connection: sqlite3.Connection,
    *,
    tenant: str | None,
    state: WorkflowState | None,
    limit: int,
    cursor: str | None,
) -> WorkflowPage:
    """Newest first. Raises NotFound for a cursor of somebody else's, StoreError for a page of a size out of range."""
    conditions: list[str] = []
    values: list[object] = []
    for column, value in (("tenant", tenant), ("state", state)):
        if value is not None:
            conditions.append(f"{column} = ?")
            values.append(value)
    if cursor is not None:
        conditions.append("(created_at_s, workflow_id) < (?, ?)")
        values.extend(rows.read_cursor(cursor))
    where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
    found = connection.execute(
        f"SELECT {COLUMNS} FROM workflows {where} ORDER BY created_at_s DESC, workflow_id DESC LIMIT ?",
        (*values, rows.checked(limit, "workflows") + 1),
    ).fetchall()
    return page_of([record_of(row) for row in found], limit)


def events(connection: sqlite3.Connection, workflow_id: str, after: int, limit: int | None) -> list[StoredEvent]:
    found = connection.execute(
        "SELECT seq, at_s, body, schema_version FROM events WHERE workflow_id = ? AND seq > ? ORDER BY seq LIMIT ?",
        (workflow_id, after, -1 if limit is None else limit),
    )
    return [StoredEvent(seq=seq, at_s=at_s, body=body, schema_version=v) for seq, at_s, body, v in found]


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


def insert_blob(connection: sqlite3.Connection, tenant: str, blob: Blob, workflow_id: str = "") -> None:
    """One that no workflow made stays for good."""
    connection.execute(
        "INSERT INTO blobs VALUES (?,?,?,?,?) ON CONFLICT (sha256, tenant) DO NOTHING",
        (tenant, blob.sha256, blob.media_type, blob.data, SCHEMA_VERSION),
    )
    connection.execute("INSERT OR IGNORE INTO blob_uses VALUES (?,?,?)", (workflow_id, blob.sha256, tenant))


def _share_blobs(connection: sqlite3.Connection, source: str, workflow_id: str) -> None:
    """A fork refers to what its source had made. Raises NotFound when that is gone."""
    if find(connection, source, None) is None:
        raise rows.unknown(source)
    connection.execute(
        "INSERT INTO blob_uses SELECT ?, sha256, tenant FROM blob_uses WHERE workflow_id = ?", (workflow_id, source)
    )


def _insert_events(
    connection: sqlite3.Connection, workflow_id: str, seq: int, at_s: float, bodies: Sequence[bytes]
) -> None:
    connection.executemany(_EVENT, [(workflow_id, number, at_s, body) for number, body in enumerate(bodies, seq + 1)])
