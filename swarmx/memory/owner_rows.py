"""Which process runs which workflow, and what was sent to a workflow from outside, as rows."""

# ruff: noqa: S608  # statements are put together from fixed columns and conditions; values are always bound

from __future__ import annotations

import sqlite3

from swarmx.core.records import SCHEMA_VERSION, TERMINAL, Input, WorkflowMode, WorkflowRecord
from swarmx.memory.rows import COLUMNS, OPEN, record_of, unknown


def enlist(connection: sqlite3.Connection, name: str, expires_at_s: float, *, exclusive: bool) -> int:
    """A new epoch; SQLite remembers the largest that it ever gave."""
    if exclusive:
        connection.execute("DELETE FROM owners")
    cursor = connection.execute("INSERT INTO owners (name, expires_at_s) VALUES (?, ?)", (name, expires_at_s))
    epoch = cursor.lastrowid
    assert epoch is not None  # noqa: S101  # an insert has a row
    return epoch


def heartbeat(connection: sqlite3.Connection, epoch: int, expires_at_s: float) -> bool:
    """One that is late is still in time as long as nobody has claimed."""
    cursor = connection.execute("UPDATE owners SET expires_at_s = ? WHERE epoch = ?", (expires_at_s, epoch))
    return cursor.rowcount == 1


def claim(
    connection: sqlite3.Connection, epoch: int, limit: int, now_s: float, mode: WorkflowMode
) -> list[WorkflowRecord]:
    """Workflows whose owner is gone, the oldest first; from now on they are of this epoch, if that still is one."""
    connection.execute("DELETE FROM owners WHERE expires_at_s <= ? AND epoch <> ?", (now_s, epoch))
    rows = connection.execute(
        f"UPDATE workflows SET owner = :epoch WHERE workflow_id IN (SELECT workflow_id FROM workflows WHERE {OPEN} "
        "AND mode = :mode AND owner NOT IN (SELECT epoch FROM owners) ORDER BY created_at_s, workflow_id "
        f"LIMIT :limit) AND :epoch IN (SELECT epoch FROM owners) RETURNING {COLUMNS}",
        {"epoch": epoch, "limit": limit, "mode": mode},
    ).fetchall()
    return sorted(map(record_of, rows), key=lambda record: (record.created_at_s, record.workflow_id))


def take(connection: sqlite3.Connection, workflow_id: str, epoch: int, mode: WorkflowMode) -> WorkflowRecord | None:
    """The workflow, from whoever has it; None for one that has ended or is of another mode."""
    row = connection.execute(
        f"UPDATE workflows SET owner = ? WHERE workflow_id = ? AND {OPEN} AND mode = ? RETURNING {COLUMNS}",
        (epoch, workflow_id, mode),
    ).fetchone()
    return None if row is None else record_of(row)


def owned(connection: sqlite3.Connection, epoch: int) -> list[str]:
    """The unfinished declared workflows of this epoch."""
    rows = connection.execute(
        f"SELECT workflow_id FROM workflows WHERE {OPEN} AND mode = 'declared' AND owner = ?", (epoch,)
    )
    return [workflow_id for (workflow_id,) in rows]


def waiting(connection: sqlite3.Connection, epoch: int) -> list[str]:
    """The workflows of this epoch that have inputs which no event has taken."""
    rows = connection.execute(
        "SELECT DISTINCT workflow_id FROM inbox JOIN workflows USING (workflow_id) WHERE taken = 0 AND owner = ?",
        (epoch,),
    )
    return [workflow_id for (workflow_id,) in rows]


def retire(connection: sqlite3.Connection, epoch: int) -> None:
    connection.execute("DELETE FROM owners WHERE epoch = ?", (epoch,))


def post(
    connection: sqlite3.Connection, workflow_id: str, body: bytes, *, dedup: str, tenant: str | None, at_s: float
) -> bool:
    """Leave an input; False when it came before or the workflow has ended. Raises NotFound."""
    found = connection.execute(
        "SELECT state FROM workflows WHERE workflow_id = ? AND tenant = ifnull(?, tenant)", (workflow_id, tenant)
    ).fetchone()
    if found is None:
        raise unknown(workflow_id)
    if found[0] in TERMINAL:
        return False
    cursor = connection.execute(
        "INSERT INTO inbox (workflow_id, dedup, body, at_s, schema_version) VALUES (?,?,?,?,?) "
        "ON CONFLICT (workflow_id, dedup) DO NOTHING",
        (workflow_id, dedup, body, at_s, SCHEMA_VERSION),
    )
    return cursor.rowcount == 1


def inputs(connection: sqlite3.Connection, workflow_id: str) -> list[Input]:
    """Those that no event has taken yet, in the order in which they came."""
    rows = connection.execute(
        "SELECT number, body, at_s FROM inbox WHERE workflow_id = ? AND taken = 0 ORDER BY number", (workflow_id,)
    )
    return [Input(number=number, body=body, at_s=at_s) for number, body, at_s in rows]
