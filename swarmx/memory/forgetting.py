"""What a store forgets: workflows that ended long ago with all that is theirs, then what is left of calls."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from swarmx.core import failpoints
from swarmx.core.records import Forgotten
from swarmx.memory.rows import ENDED, few_events

# A child is there longer than its parent, unless it came first: clients may name each other.
_OLD = f"""SELECT workflow_id, seq FROM workflows AS old WHERE created_at_s < :before_s AND ended_at_s < :before_s
    AND {ENDED} AND workflow_id NOT IN (SELECT workflow_id FROM idempotency WHERE expires_at_s > :now_s)
    AND NOT EXISTS (SELECT 1 FROM workflows AS child WHERE child.parent_id = old.workflow_id
        AND (child.created_at_s, child.workflow_id) > (old.created_at_s, old.workflow_id))
    ORDER BY created_at_s, workflow_id LIMIT :limit"""  # noqa: S608  # fixed columns
_OLD_CALLS = """SELECT rowid, call_id FROM calls WHERE rowid <= (SELECT max(rowid) FROM calls) - :kept
    AND rowid < ifnull((SELECT rowid FROM calls WHERE ready_at_s >= :before_s ORDER BY rowid LIMIT 1), 1 << 62)
    AND NOT EXISTS (SELECT 1 FROM workflows WHERE workflows.workflow_id = calls.workflow_id)
    ORDER BY rowid LIMIT :limit"""
_OLD_DECISIONS = """DELETE FROM decisions WHERE decision_id IN (SELECT decision_id FROM decisions AS old WHERE
    decision_id < ifnull(
        (SELECT decision_id FROM decisions WHERE at_s >= :before_s ORDER BY decision_id LIMIT 1), 1 << 62)
    AND NOT EXISTS (SELECT 1 FROM calls WHERE calls.call_id = old.call_id) ORDER BY decision_id LIMIT :limit)"""


def forget(
    connection: sqlite3.Connection, now_s: float, *, older_than_s: float, kept_calls: int, limit: int
) -> Forgotten:
    """One small part of what is to be forgotten."""
    values = {"now_s": now_s, "before_s": now_s - older_than_s, "kept": kept_calls, "limit": limit}
    old = few_events(connection.execute(_OLD, values).fetchall())
    if old:
        for workflow_id in old:
            _forget_workflow(connection, workflow_id)
        return Forgotten(workflows=len(old))
    calls = connection.execute(_OLD_CALLS, values).fetchall()
    if calls:
        _forget_calls(connection, calls)
        return Forgotten(calls=len(calls))
    return Forgotten(decisions=connection.execute(_OLD_DECISIONS, values).rowcount)


def _forget_workflow(connection: sqlite3.Connection, workflow_id: str) -> None:
    """Its calls stay for a while, without it: predictors have to learn from them, and its id may come again."""
    used = connection.execute("SELECT sha256, tenant FROM blob_uses WHERE workflow_id = ?", (workflow_id,)).fetchall()
    for table in ("blob_uses", "events", "inbox", "idempotency"):
        connection.execute(f"DELETE FROM {table} WHERE workflow_id = ?", (workflow_id,))  # noqa: S608  # fixed names
        failpoints.hit("rows.forget")
    connection.execute("UPDATE calls SET workflow_id = '' WHERE workflow_id = ?", (workflow_id,))
    connection.executemany(
        "DELETE FROM blobs WHERE sha256 = ?1 AND tenant = ?2 "
        "AND NOT EXISTS (SELECT 1 FROM blob_uses WHERE sha256 = ?1 AND tenant = ?2)",
        used,
    )
    connection.execute("DELETE FROM workflows WHERE workflow_id = ?", (workflow_id,))


def _forget_calls(connection: sqlite3.Connection, calls: Sequence[tuple[int, str]]) -> None:
    connection.executemany("DELETE FROM decisions WHERE call_id = ?", [(call_id,) for _, call_id in calls])
    failpoints.hit("rows.forget")
    connection.executemany("DELETE FROM calls WHERE rowid = ?", [(rowid,) for rowid, _ in calls])
