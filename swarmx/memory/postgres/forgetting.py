"""What a PostgreSQL store forgets, like the one in SQLite; servers that do it at once pass each other's rows over."""

from __future__ import annotations

import asyncpg

from swarmx.core import failpoints
from swarmx.core.records import Forgotten
from swarmx.memory.postgres.workflows import NOW_S
from swarmx.memory.rows import ENDED, few_events

# ruff: noqa: S608  # statements are put together from fixed columns and conditions; values are always bound

_BEFORE_S = f"({NOW_S} - $1::float8)"
_OLD = f"""SELECT workflow_id, seq FROM workflows AS old WHERE created_at_s < {_BEFORE_S} AND ended_at_s < {_BEFORE_S}
    AND {ENDED} AND NOT EXISTS (SELECT FROM idempotency AS known
        WHERE known.workflow_id = old.workflow_id AND expires_at_s > {NOW_S})
    AND NOT EXISTS (SELECT FROM workflows AS child WHERE child.parent_id = old.workflow_id
        AND (child.created_at_s, child.workflow_id) > (old.created_at_s, old.workflow_id))
    ORDER BY created_at_s, workflow_id LIMIT $2 FOR UPDATE OF old SKIP LOCKED"""
_OLD_CALLS = f"""SELECT call_id FROM calls WHERE number <= (SELECT max(number) FROM calls) - $3
    AND number < coalesce(
        (SELECT number FROM calls WHERE ready_at_s >= {_BEFORE_S} ORDER BY number LIMIT 1), 1::bigint << 62)
    AND NOT EXISTS (SELECT FROM workflows WHERE workflows.workflow_id = calls.workflow_id)
    ORDER BY number LIMIT $2 FOR UPDATE SKIP LOCKED"""
_OLD_DECISIONS = f"""DELETE FROM decisions WHERE decision_id IN (SELECT decision_id FROM decisions AS old WHERE
    decision_id < coalesce(
        (SELECT decision_id FROM decisions WHERE at_s >= {_BEFORE_S} ORDER BY decision_id LIMIT 1), 1::bigint << 62)
    AND NOT EXISTS (SELECT FROM calls WHERE calls.call_id = old.call_id)
    ORDER BY decision_id LIMIT $2 FOR UPDATE SKIP LOCKED)"""
_LOCK_BLOBS = """SELECT FROM blobs JOIN unnest($1::text[], $2::text[]) AS was (sha256, tenant) USING (sha256, tenant)
    ORDER BY sha256, tenant FOR UPDATE OF blobs"""
_UNUSED = """DELETE FROM blobs USING unnest($1::text[], $2::text[]) AS was (sha256, tenant)
    WHERE blobs.sha256 = was.sha256 AND blobs.tenant = was.tenant AND NOT EXISTS (SELECT FROM blob_uses AS other
        WHERE other.sha256 = was.sha256 AND other.tenant = was.tenant)"""


async def forget(connection: asyncpg.Connection, *, older_than_s: float, kept_calls: int, limit: int) -> Forgotten:
    """One small part of what is to be forgotten."""
    old = few_events(await connection.fetch(_OLD, older_than_s, limit))
    if old:
        await _forget_workflows(connection, old)
        return Forgotten(workflows=len(old))
    calls = [call_id for (call_id,) in await connection.fetch(_OLD_CALLS, older_than_s, limit, kept_calls)]
    if calls:
        await connection.execute("DELETE FROM decisions WHERE call_id = ANY($1::text[])", calls)
        failpoints.hit("rows.forget")
        await connection.execute("DELETE FROM calls WHERE call_id = ANY($1::text[])", calls)
        return Forgotten(calls=len(calls))
    done = await connection.execute(_OLD_DECISIONS, older_than_s, limit)
    return Forgotten(decisions=int(done.rpartition(" ")[2]))


async def _forget_workflows(connection: asyncpg.Connection, old: list[str]) -> None:
    """Their calls stay for a while, without them: predictors have to learn from them, and their ids may come again."""
    used = await connection.fetch("SELECT sha256, tenant FROM blob_uses WHERE workflow_id = ANY($1::text[])", old)
    for table in ("blob_uses", "events", "inbox", "idempotency"):
        await connection.execute(f"DELETE FROM {table} WHERE workflow_id = ANY($1::text[])", old)
        failpoints.hit("rows.forget")
    await connection.execute("UPDATE calls SET workflow_id = '' WHERE workflow_id = ANY($1::text[])", old)
    if used:
        blobs = ([row[0] for row in used], [row[1] for row in used])
        await connection.execute(_LOCK_BLOBS, *blobs)  # whoever is about to use one has said so by the next statement
        await connection.execute(_UNUSED, *blobs)
    await connection.execute("DELETE FROM workflows WHERE workflow_id = ANY($1::text[])", old)
