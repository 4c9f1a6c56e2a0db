"""Workflows and their events in PostgreSQL: a step is one statement, and of two writers one waits for the other."""

# ruff: noqa: S608  # statements are put together from fixed columns and conditions; values are always bound

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import asyncpg
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

NOW_S = "extract(epoch FROM clock_timestamp())::float8"
_ARGUMENTS = ", ".join(f"${i}" for i in range(1, len(FIELDS) + 1))
_TENANT = "tenant = coalesce({}::text, tenant)"
_ACCEPT = (
    f"WITH accepted AS (INSERT INTO workflows ({COLUMNS}) VALUES ({_ARGUMENTS}) "
    "ON CONFLICT (workflow_id) DO NOTHING RETURNING workflow_id, tenant, created_at_s), "
    "written AS (INSERT INTO events SELECT workflow_id, place, tenant, created_at_s, body, "
    f"${len(FIELDS) + 1} FROM accepted, unnest(${len(FIELDS) + 2}::bytea[]) WITH ORDINALITY AS event (body, place)) "
    "SELECT count(*) FROM accepted"
)
# $1 id, $2 expected seq, $3 time, $4 events, $5 their version, $6 state, $7 time of the end, $8 outcome
_WRITE = (
    "WITH changed AS (UPDATE workflows SET seq = seq + cardinality($4::bytea[]), state = coalesce($6, state), "
    f"ended_at_s = $7, outcome = $8 WHERE workflow_id = $1 AND seq = $2 AND {OPEN} "
    "AND NOT (state = 'cancelling' AND coalesce($6, state) = 'running') AND {} RETURNING tenant), "
    "written AS (INSERT INTO events SELECT $1, $2 + place, tenant, $3, body, $5 FROM changed, "
    "unnest($4::bytea[]) WITH ORDINALITY AS event (body, place)) SELECT tenant FROM changed"
)
_COMMIT = _WRITE.format("owner = $9")
_APPEND = _WRITE.format("(mode = 'transparent' OR NOT EXISTS (SELECT FROM owners WHERE epoch = owner))")
_KEEP_KEY = (
    "INSERT INTO idempotency AS known VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (tenant, key) DO UPDATE SET "
    "fingerprint = excluded.fingerprint, workflow_id = excluded.workflow_id, expires_at_s = excluded.expires_at_s"
)
_FORGET_KEYS = (
    "DELETE FROM idempotency WHERE (tenant, key) IN (SELECT tenant, key FROM idempotency WHERE expires_at_s <= $1 "
    "LIMIT 100 FOR UPDATE SKIP LOCKED)"
)


async def accept(
    connection: asyncpg.Connection,
    workflow: WorkflowRecord,
    events: Sequence[bytes],
    idempotency: Idempotency | None,
) -> Accepted:
    """Insert a workflow with its first events, or find the one that the key has brought already."""
    if idempotency is not None:
        found = await _first_of_key(connection, workflow, idempotency)
        if found is not None:
            return Accepted(workflow_id=found, replayed=True)
    row = msgspec.structs.replace(workflow, seq=len(events))
    if not await connection.fetchval(_ACCEPT, *values_of(row), SCHEMA_VERSION, list(events)):
        raise rows.already_exists(workflow.workflow_id)
    if row.forked_from is not None:
        await _share_blobs(connection, row.forked_from, row.workflow_id)
    return Accepted(workflow_id=row.workflow_id)


async def _first_of_key(
    connection: asyncpg.Connection, workflow: WorkflowRecord, idempotency: Idempotency
) -> str | None:
    """None once the key is this workflow's; it waits for whoever is about to store the same key."""
    now_s, tenant = workflow.created_at_s, idempotency.tenant or workflow.tenant
    await connection.execute(_FORGET_KEYS, now_s)
    while True:
        row = _key_row(tenant, idempotency, workflow.workflow_id)
        if await connection.fetchval(f"{_KEEP_KEY} WHERE known.expires_at_s <= $7 RETURNING 1", *row, now_s):
            failpoints.hit("rows.key")
            return None
        found = await of_key(connection, tenant, idempotency, now_s)
        if found is not None:
            return found


async def of_key(
    connection: asyncpg.Connection, tenant: str, idempotency: Idempotency, now_s: float | None
) -> str | None:
    """The workflow of the request that came with the key before. Raises KeyReused if that was another request.

    Without `now_s`, the clock is the database's.
    """
    row = await connection.fetchrow(
        "SELECT workflow_id, fingerprint FROM idempotency WHERE tenant = $1 AND key = $2 "
        f"AND expires_at_s > coalesce($3::float8, {NOW_S})",
        tenant,
        idempotency.key,
        now_s,
    )
    if row is None:
        return None
    if row[1] != idempotency.fingerprint:
        raise rows.key_reused(idempotency, row[0])
    return cast(str, row[0])


async def keep_key(connection: asyncpg.Connection, tenant: str, idempotency: Idempotency, workflow_id: str) -> None:
    """Remember what the key brought, unless it brought something else meanwhile; it may be there already, expired."""
    row = _key_row(tenant, idempotency, workflow_id)
    await connection.execute(f"{_KEEP_KEY} WHERE known.expires_at_s <= {NOW_S}", *row)


def _key_row(tenant: str, idempotency: Idempotency, workflow_id: str) -> tuple[object, ...]:
    return (
        tenant,
        idempotency.key,
        idempotency.fingerprint,
        workflow_id,
        idempotency.expires_at_s,
        SCHEMA_VERSION,
    )


async def commit(connection: asyncpg.Connection, change: Commit) -> Committed:
    """Everything in the change, if its epoch owns the workflow; raises NotFound."""
    tenant = await _write(connection, _COMMIT, change, change.epoch)
    if tenant is None:
        return await _why_not(connection, change.workflow_id)
    failpoints.hit("rows.commit")
    if change.taken and change.state not in TERMINAL:
        await connection.execute("UPDATE inbox SET taken = true WHERE number = ANY($1::bigint[])", list(change.taken))
    for call in change.calls:
        await insert_call(connection, call)
    for blob in change.blobs:
        await insert_blob(connection, tenant, blob, change.workflow_id)
    return "stored"


async def append(connection: asyncpg.Connection, change: Commit) -> bool:
    """The same for a transparent workflow, or one that nobody owns: events, state, outcome; raises NotFound."""
    if await _write(connection, _APPEND, change) is None:
        await _why_not(connection, change.workflow_id)
        return False
    return True


async def _write(connection: asyncpg.Connection, statement: str, change: Commit, *epoch: int) -> str | None:
    ends = change.state in TERMINAL
    tenant = await connection.fetchval(
        statement,
        change.workflow_id,
        change.expected_seq,
        change.at_s,
        list(change.events),
        SCHEMA_VERSION,
        change.state,
        change.at_s if ends else None,
        change.outcome if ends else None,
        *epoch,
    )
    if tenant is not None and ends:
        await connection.execute("DELETE FROM inbox WHERE workflow_id = $1", change.workflow_id)
    return cast("str | None", tenant)


async def _why_not(connection: asyncpg.Connection, workflow_id: str) -> Committed:
    state = await connection.fetchval("SELECT state FROM workflows WHERE workflow_id = $1", workflow_id)
    if state is None:
        raise rows.never_accepted(workflow_id)
    return "ended" if state in TERMINAL else "lost"


async def find(connection: asyncpg.Connection, workflow_id: str, tenant: str | None) -> WorkflowRecord | None:
    row = await connection.fetchrow(
        f"SELECT {COLUMNS} FROM workflows WHERE workflow_id = $1 AND {_TENANT.format('$2')}", workflow_id, tenant
    )
    return None if row is None else record_of(row)


async def newest_of(connection: asyncpg.Connection, workflow_id: str, tenant: str | None) -> WorkflowRecord | None:
    row = await connection.fetchrow(
        f"SELECT {COLUMNS} FROM workflows WHERE (workflow_id = $1 OR (workflow_id > $1 || '~' AND workflow_id < $1 || "
        f"'~:')) AND {_TENANT.format('$2')} ORDER BY length(workflow_id) DESC, workflow_id DESC LIMIT 1",
        workflow_id,
        tenant,
    )
    return None if row is None else record_of(row)


async def unfinished(connection: asyncpg.Connection) -> list[WorkflowRecord]:
    found = await connection.fetch(f"SELECT {COLUMNS} FROM workflows WHERE {OPEN} ORDER BY created_at_s, workflow_id")
    return [record_of(row) for row in found]


async def page(
    connection: asyncpg.Connection,
    *,
    tenant: str | None,
    state: WorkflowState | None,
    limit: int,
    cursor: str | None,
) -> WorkflowPage:
    """Newest first. Raises NotFound for a cursor of somebody else's, StoreError for a page of a size out of range."""
    conditions: list[str] = []
    values: list[object] = [rows.checked(limit, "workflows") + 1]
    for column, value in (("tenant", tenant), ("state", state)):
        if value is not None:
            values.append(value)
            conditions.append(f"{column} = ${len(values)}")
    if cursor is not None:
        values.extend(rows.read_cursor(cursor))
        conditions.append(f"(created_at_s, workflow_id) < (${len(values) - 1}, ${len(values)})")
    where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
    found = await connection.fetch(
        f"SELECT {COLUMNS} FROM workflows {where} ORDER BY created_at_s DESC, workflow_id DESC LIMIT $1", *values
    )
    return page_of([record_of(row) for row in found], limit)


async def events(connection: asyncpg.Connection, workflow_id: str, after: int, limit: int | None) -> list[StoredEvent]:
    found = await connection.fetch(
        "SELECT seq, at_s, body, schema_version FROM events WHERE workflow_id = $1 AND seq > $2 ORDER BY seq LIMIT $3",
        workflow_id,
        after,
        limit,
    )
    return [StoredEvent(seq=seq, at_s=at_s, body=body, schema_version=v) for seq, at_s, body, v in found]


async def insert_call(connection: asyncpg.Connection, record: CallRecord) -> None:
    """The first record of a call stands."""
    await connection.execute(
        "INSERT INTO calls (call_id, tenant, workflow_id, ready_at_s, body, schema_version) "
        "VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (call_id) DO NOTHING",
        record.call_id,
        record.tenant,
        record.workflow_id,
        record.ready_at_s,
        msgspec.json.encode(record),
        record.schema_version,
    )


async def insert_blob(connection: asyncpg.Connection, tenant: str, blob: Blob, workflow_id: str = "") -> None:
    """One that no workflow made stays for good. Whoever would delete it now waits, and sees that it is used."""
    await connection.execute(
        "INSERT INTO blobs VALUES ($1, $2, $3, $4, $5) ON CONFLICT (sha256, tenant) DO UPDATE SET "
        "schema_version = excluded.schema_version",
        tenant,
        blob.sha256,
        blob.media_type,
        blob.data,
        SCHEMA_VERSION,
    )
    await connection.execute(
        "INSERT INTO blob_uses VALUES ($1, $2, $3) ON CONFLICT DO NOTHING", workflow_id, blob.sha256, tenant
    )


async def _share_blobs(connection: asyncpg.Connection, source: str, workflow_id: str) -> None:
    """A fork refers to what its source had made. Raises NotFound when that is gone."""
    if await connection.fetchval("SELECT 1 FROM workflows WHERE workflow_id = $1 FOR KEY SHARE", source) is None:
        raise rows.unknown(source)
    await connection.execute(
        "INSERT INTO blob_uses SELECT $1, sha256, tenant FROM blob_uses WHERE workflow_id = $2", workflow_id, source
    )
