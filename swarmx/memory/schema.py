"""The tables, and the steps that bring an older database up to date."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from swarmx.core.errors import StoreError

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE workflows (
            workflow_id TEXT PRIMARY KEY, tenant TEXT NOT NULL, mode TEXT NOT NULL, kind TEXT NOT NULL,
            name TEXT NOT NULL, state TEXT NOT NULL, created_at_s REAL NOT NULL, deadline_at_s REAL, ended_at_s REAL,
            seq INTEGER NOT NULL, outcome BLOB, schema_version INTEGER NOT NULL)""",
        "CREATE INDEX workflows_newest ON workflows (created_at_s DESC, workflow_id DESC)",
        "CREATE INDEX workflows_of_tenant ON workflows (tenant, created_at_s DESC, workflow_id DESC)",
        "CREATE INDEX workflows_unfinished ON workflows (created_at_s) WHERE state IN ('running', 'cancelling')",
        """CREATE TABLE events (
            workflow_id TEXT NOT NULL REFERENCES workflows, seq INTEGER NOT NULL, tenant TEXT NOT NULL,
            at_s REAL NOT NULL, body BLOB NOT NULL, schema_version INTEGER NOT NULL,
            PRIMARY KEY (workflow_id, seq))""",
        """CREATE TABLE calls (
            call_id TEXT PRIMARY KEY, tenant TEXT NOT NULL, workflow_id TEXT NOT NULL, ready_at_s REAL NOT NULL,
            body BLOB NOT NULL, schema_version INTEGER NOT NULL)""",
        "CREATE INDEX calls_of_workflow ON calls (workflow_id, ready_at_s, call_id)",
        """CREATE TABLE decisions (
            decision_id INTEGER PRIMARY KEY, call_id TEXT NOT NULL, tenant TEXT NOT NULL, at_s REAL NOT NULL,
            body BLOB NOT NULL, schema_version INTEGER NOT NULL)""",
        "CREATE INDEX decisions_of_call ON decisions (call_id, decision_id)",
        """CREATE TABLE blobs (
            tenant TEXT NOT NULL, sha256 TEXT NOT NULL, media_type TEXT NOT NULL, data BLOB NOT NULL,
            schema_version INTEGER NOT NULL, PRIMARY KEY (sha256, tenant))""",
    ),
    (
        """CREATE TABLE proposals (
            proposal_id TEXT PRIMARY KEY, at_s REAL NOT NULL, state TEXT NOT NULL, body BLOB NOT NULL,
            schema_version INTEGER NOT NULL)""",
        "CREATE INDEX proposals_newest ON proposals (at_s DESC, proposal_id DESC)",
        "CREATE INDEX proposals_in_state ON proposals (state, at_s DESC, proposal_id DESC)",
        """CREATE TABLE episodes (
            episode_id TEXT PRIMARY KEY, at_s REAL NOT NULL, body BLOB NOT NULL, schema_version INTEGER NOT NULL)""",
        "CREATE INDEX episodes_newest ON episodes (at_s DESC, episode_id DESC)",
        """CREATE TABLE startups (
            startup_id INTEGER PRIMARY KEY, group_id TEXT NOT NULL, device TEXT NOT NULL, seconds REAL NOT NULL,
            at_s REAL NOT NULL, schema_version INTEGER NOT NULL)""",
        "CREATE INDEX startups_of_group ON startups (group_id, startup_id)",
    ),
    (
        "ALTER TABLE workflows ADD COLUMN parent_id TEXT",
        "ALTER TABLE workflows ADD COLUMN forked_from TEXT",
        "ALTER TABLE workflows ADD COLUMN spec_sha256 TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE workflows ADD COLUMN owner INTEGER NOT NULL DEFAULT 0",
        """CREATE TABLE owners (
            epoch INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, expires_at_s REAL NOT NULL)""",
        """CREATE TABLE inbox (
            number INTEGER PRIMARY KEY AUTOINCREMENT, workflow_id TEXT NOT NULL REFERENCES workflows,
            dedup TEXT NOT NULL, body BLOB NOT NULL, at_s REAL NOT NULL, taken INTEGER NOT NULL DEFAULT 0,
            schema_version INTEGER NOT NULL, UNIQUE (workflow_id, dedup))""",
        """CREATE TABLE idempotency (
            tenant TEXT NOT NULL, key TEXT NOT NULL, fingerprint TEXT NOT NULL,
            workflow_id TEXT NOT NULL REFERENCES workflows, expires_at_s REAL NOT NULL,
            schema_version INTEGER NOT NULL, PRIMARY KEY (tenant, key))""",
        "CREATE INDEX idempotency_expiry ON idempotency (expires_at_s)",
    ),
    (
        """CREATE TABLE blob_uses (
            workflow_id TEXT NOT NULL, sha256 TEXT NOT NULL, tenant TEXT NOT NULL,
            PRIMARY KEY (workflow_id, sha256, tenant)) WITHOUT ROWID""",
        "CREATE INDEX blob_uses_of_blob ON blob_uses (sha256, tenant)",
        # Whose the blobs are that there are already is not known: they stay.
        "INSERT INTO blob_uses SELECT '', sha256, tenant FROM blobs",
        "CREATE INDEX workflows_of_parent ON workflows (parent_id) WHERE parent_id IS NOT NULL",
        "CREATE INDEX idempotency_of_workflow ON idempotency (workflow_id)",
    ),
)


def migrate(connection: sqlite3.Connection, path: str | Path) -> None:
    """Create or update the tables. Raises StoreError for a database that a newer version wrote."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.execute("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER NOT NULL)")
        row = connection.execute("SELECT version FROM schema_version").fetchone()
        version = 0 if row is None else int(row[0])
        if version > len(MIGRATIONS):
            raise StoreError(
                f"the database {path} has schema {version}, this version of SwarmX knows up to {len(MIGRATIONS)}; "
                "use a newer SwarmX or another database"
            )
        for statements in MIGRATIONS[version:]:
            for statement in statements:
                connection.execute(statement)
        connection.execute("DELETE FROM schema_version")
        connection.execute("INSERT INTO schema_version VALUES (?)", (len(MIGRATIONS),))
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
