"""The tables in PostgreSQL, and the steps that bring an older database up to date."""

from __future__ import annotations

import asyncpg

from swarmx.core.errors import StoreError

_LOCK = 0x5377_6172_6D58  # "SwarmX": whoever migrates holds this advisory lock

# Ids are compared byte by byte, as SQLite does, whatever the language of the database. Events and keys have no foreign
# key: they are written by the statement that writes their workflow, and a check of each would double the work.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE workflows (
            workflow_id TEXT COLLATE "C" PRIMARY KEY, tenant TEXT NOT NULL, mode TEXT NOT NULL, kind TEXT NOT NULL,
            name TEXT NOT NULL, state TEXT NOT NULL, created_at_s DOUBLE PRECISION NOT NULL,
            deadline_at_s DOUBLE PRECISION, ended_at_s DOUBLE PRECISION, seq BIGINT NOT NULL, outcome BYTEA,
            schema_version INTEGER NOT NULL, parent_id TEXT, forked_from TEXT, spec_sha256 TEXT NOT NULL,
            owner BIGINT NOT NULL) WITH (fillfactor = 70)""",
        "CREATE INDEX workflows_newest ON workflows (created_at_s DESC, workflow_id DESC)",
        "CREATE INDEX workflows_of_tenant ON workflows (tenant, created_at_s DESC, workflow_id DESC)",
        """CREATE INDEX workflows_unfinished ON workflows (created_at_s, workflow_id)
            WHERE state IN ('running', 'cancelling')""",
        """CREATE TABLE events (
            workflow_id TEXT COLLATE "C" NOT NULL, seq BIGINT NOT NULL, tenant TEXT NOT NULL,
            at_s DOUBLE PRECISION NOT NULL, body BYTEA NOT NULL, schema_version INTEGER NOT NULL,
            PRIMARY KEY (workflow_id, seq))""",
        """CREATE TABLE calls (
            number BIGINT GENERATED ALWAYS AS IDENTITY UNIQUE, call_id TEXT COLLATE "C" PRIMARY KEY,
            tenant TEXT NOT NULL, workflow_id TEXT COLLATE "C" NOT NULL, ready_at_s DOUBLE PRECISION NOT NULL,
            body BYTEA NOT NULL, schema_version INTEGER NOT NULL)""",
        "CREATE INDEX calls_of_workflow ON calls (workflow_id, ready_at_s, call_id)",
        """CREATE TABLE decisions (
            decision_id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY, call_id TEXT COLLATE "C" NOT NULL,
            tenant TEXT NOT NULL, at_s DOUBLE PRECISION NOT NULL, body BYTEA NOT NULL,
            schema_version INTEGER NOT NULL)""",
        "CREATE INDEX decisions_of_call ON decisions (call_id, decision_id)",
        """CREATE TABLE blobs (
            tenant TEXT NOT NULL, sha256 TEXT COLLATE "C" NOT NULL, media_type TEXT NOT NULL, data BYTEA NOT NULL,
            schema_version INTEGER NOT NULL, PRIMARY KEY (sha256, tenant))""",
        """CREATE TABLE proposals (
            proposal_id TEXT COLLATE "C" PRIMARY KEY, at_s DOUBLE PRECISION NOT NULL, state TEXT NOT NULL,
            body BYTEA NOT NULL, schema_version INTEGER NOT NULL)""",
        "CREATE INDEX proposals_newest ON proposals (at_s DESC, proposal_id DESC)",
        "CREATE INDEX proposals_in_state ON proposals (state, at_s DESC, proposal_id DESC)",
        """CREATE TABLE episodes (
            episode_id TEXT COLLATE "C" PRIMARY KEY, at_s DOUBLE PRECISION NOT NULL, body BYTEA NOT NULL,
            schema_version INTEGER NOT NULL)""",
        "CREATE INDEX episodes_newest ON episodes (at_s DESC, episode_id DESC)",
        """CREATE TABLE startups (
            startup_id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY, group_id TEXT NOT NULL, device TEXT NOT NULL,
            seconds DOUBLE PRECISION NOT NULL, at_s DOUBLE PRECISION NOT NULL, schema_version INTEGER NOT NULL)""",
        "CREATE INDEX startups_of_group ON startups (group_id, startup_id)",
        """CREATE TABLE owners (
            epoch BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name TEXT NOT NULL,
            expires_at_s DOUBLE PRECISION NOT NULL)""",
        """CREATE TABLE inbox (
            number BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY, workflow_id TEXT COLLATE "C" NOT NULL,
            dedup TEXT NOT NULL, body BYTEA NOT NULL, at_s DOUBLE PRECISION NOT NULL,
            taken BOOLEAN NOT NULL DEFAULT false, schema_version INTEGER NOT NULL, UNIQUE (workflow_id, dedup))""",
        """CREATE TABLE idempotency (
            tenant TEXT NOT NULL, key TEXT NOT NULL, fingerprint TEXT NOT NULL, workflow_id TEXT NOT NULL,
            expires_at_s DOUBLE PRECISION NOT NULL, schema_version INTEGER NOT NULL, PRIMARY KEY (tenant, key))""",
        "CREATE INDEX idempotency_expiry ON idempotency (expires_at_s)",
        # The last batch of each writing connection, written with it: tells after a lost connection what was stored.
        """CREATE TABLE writers (
            writer TEXT PRIMARY KEY, batch BIGINT NOT NULL, at TIMESTAMPTZ NOT NULL DEFAULT now())
            WITH (fillfactor = 10)""",
    ),
    (
        """CREATE TABLE blob_uses (
            workflow_id TEXT COLLATE "C" NOT NULL, sha256 TEXT COLLATE "C" NOT NULL, tenant TEXT NOT NULL,
            PRIMARY KEY (workflow_id, sha256, tenant))""",
        "CREATE INDEX blob_uses_of_blob ON blob_uses (sha256, tenant)",
        # Whose the blobs are that there are already is not known: they stay.
        "INSERT INTO blob_uses SELECT '', sha256, tenant FROM blobs",
        "CREATE INDEX workflows_of_parent ON workflows (parent_id) WHERE parent_id IS NOT NULL",
        "CREATE INDEX idempotency_of_workflow ON idempotency (workflow_id)",
    ),
)


async def migrate(connection: asyncpg.Connection, where: str) -> None:
    """Create or update the tables, one process at a time. Raises StoreError for a database of a newer version."""
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
        await connection.execute("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER NOT NULL)")
        version = await connection.fetchval("SELECT max(version) FROM schema_version") or 0
        if version > len(MIGRATIONS):
            raise StoreError(
                f"the database {where} has schema {version}, this version of SwarmX knows up to {len(MIGRATIONS)}; "
                "use a newer SwarmX or another database"
            )
        if version < len(MIGRATIONS):
            for statements in MIGRATIONS[version:]:
                for statement in statements:
                    await connection.execute(statement)
            await connection.execute("DELETE FROM schema_version")
            await connection.execute("INSERT INTO schema_version VALUES ($1)", len(MIGRATIONS))
        await connection.execute("DELETE FROM writers WHERE at < now() - interval '30 days'")
