"""Which process runs which workflow, by the clock of the database; and what was sent to a workflow from outside."""

# ruff: noqa: S608  # statements are put together from fixed columns and conditions; values are always bound

from __future__ import annotations

import asyncpg

from swarmx.core.records import SCHEMA_VERSION, TERMINAL, Input, WorkflowMode, WorkflowRecord
from swarmx.memory.postgres.workflows import NOW_S
from swarmx.memory.rows import COLUMNS, OPEN, record_of, unknown

CHANNEL = "swarmx_inbox"
# Who claims must know all epochs that a workflow can have: nobody enlists meanwhile.
_OWNERS_LOCK = "SELECT pg_advisory_xact_lock(hashtext('swarmx owners'))"


async def enlist(connection: asyncpg.Connection, name: str, ttl_s: float, *, exclusive: bool) -> int:
    """A new epoch: numbers are given out once, also after a crash."""
    await connection.execute(_OWNERS_LOCK)
    if exclusive:
        await connection.execute("DELETE FROM owners")
    epoch: int = await connection.fetchval(
        f"INSERT INTO owners (name, expires_at_s) VALUES ($1, {NOW_S} + $2) RETURNING epoch", name, ttl_s
    )
    return epoch


async def heartbeat(connection: asyncpg.Connection, epoch: int, ttl_s: float) -> bool:
    """One that is late is still in time as long as nobody has claimed."""
    kept = await connection.fetchval(
        f"UPDATE owners SET expires_at_s = {NOW_S} + $2 WHERE epoch = $1 RETURNING 1", epoch, ttl_s
    )
    return kept is not None


async def claim(connection: asyncpg.Connection, epoch: int, limit: int, mode: WorkflowMode) -> list[WorkflowRecord]:
    """Workflows whose owner is gone, the oldest first; from now on they are of this epoch, if that still is one.

    Rows that somebody else is at work on are left for the next time.
    """
    await connection.execute(_OWNERS_LOCK)
    await connection.execute(
        "DELETE FROM owners WHERE epoch IN (SELECT epoch FROM owners "
        f"WHERE expires_at_s <= {NOW_S} AND epoch <> $1 FOR UPDATE SKIP LOCKED)",
        epoch,
    )
    found = await connection.fetch(
        f"UPDATE workflows SET owner = $1 WHERE workflow_id IN (SELECT workflow_id FROM workflows WHERE {OPEN} "
        "AND mode = $3 AND NOT EXISTS (SELECT FROM owners WHERE epoch = owner) "
        "ORDER BY created_at_s, workflow_id LIMIT $2 FOR UPDATE SKIP LOCKED) "
        f"AND EXISTS (SELECT FROM owners WHERE epoch = $1) RETURNING {COLUMNS}",
        epoch,
        limit,
        mode,
    )
    return sorted(map(record_of, found), key=lambda record: (record.created_at_s, record.workflow_id))


async def take(
    connection: asyncpg.Connection, workflow_id: str, epoch: int, mode: WorkflowMode
) -> WorkflowRecord | None:
    """The workflow, from whoever has it, who is told; None for one that has ended or is of another mode."""
    row = await connection.fetchrow(
        f"UPDATE workflows SET owner = $2 WHERE workflow_id = $1 AND {OPEN} AND mode = $3 RETURNING {COLUMNS}",
        workflow_id,
        epoch,
        mode,
    )
    if row is not None:
        await connection.execute("SELECT pg_notify($1, $2)", CHANNEL, workflow_id)
    return None if row is None else record_of(row)


async def owned(connection: asyncpg.Connection, epoch: int) -> list[str]:
    """The unfinished declared workflows of this epoch."""
    found = await connection.fetch(
        f"SELECT workflow_id FROM workflows WHERE {OPEN} AND mode = 'declared' AND owner = $1", epoch
    )
    return [row[0] for row in found]


async def waiting(connection: asyncpg.Connection, epoch: int) -> list[str]:
    """The workflows of this epoch that have inputs which no event has taken."""
    found = await connection.fetch(
        "SELECT DISTINCT workflow_id FROM inbox JOIN workflows USING (workflow_id) WHERE NOT taken AND owner = $1",
        epoch,
    )
    return [row[0] for row in found]


async def retire(connection: asyncpg.Connection, epoch: int) -> None:
    await connection.execute("DELETE FROM owners WHERE epoch = $1", epoch)


async def post(
    connection: asyncpg.Connection, workflow_id: str, body: bytes, *, dedup: str, tenant: str | None
) -> bool:
    """Leave an input and wake the owner; False when it came before or the workflow has ended. Raises NotFound.

    The workflow cannot end between the look at it and the write.
    """
    state = await connection.fetchval(
        "SELECT state FROM workflows WHERE workflow_id = $1 AND tenant = coalesce($2::text, tenant) FOR NO KEY UPDATE",
        workflow_id,
        tenant,
    )
    if state is None:
        raise unknown(workflow_id)
    if state in TERMINAL:
        return False
    left = await connection.fetchval(
        f"INSERT INTO inbox (workflow_id, dedup, body, at_s, schema_version) VALUES ($1, $2, $3, {NOW_S}, $4) "
        "ON CONFLICT (workflow_id, dedup) DO NOTHING RETURNING number",
        workflow_id,
        dedup,
        body,
        SCHEMA_VERSION,
    )
    if left is not None:
        await connection.execute("SELECT pg_notify($1, $2)", CHANNEL, workflow_id)
    return left is not None


async def inputs(connection: asyncpg.Connection, workflow_id: str) -> list[Input]:
    """Those that no event has taken yet, in the order in which they came."""
    found = await connection.fetch(
        "SELECT number, body, at_s FROM inbox WHERE workflow_id = $1 AND NOT taken ORDER BY number", workflow_id
    )
    return [Input(number=number, body=body, at_s=at_s) for number, body, at_s in found]
