"""Where a server keeps what outlives it: its folder, and the database of its workflows."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from swarmx.replica_config import Section


class StateSection(Section):
    """Where SwarmX keeps what outlives it."""

    dir: Path = Field(Path(".swarmx"), description="Folder of the database, the keys and the journals (mode 0700).")
    database: str = Field(
        "",
        description="A PostgreSQL database, postgresql://user@host:port/name, that several servers may share; none: "
        "a SQLite file in the folder. Its password belongs into $PGPASSWORD or ~/.pgpass.",
    )
    lease_s: float = Field(
        10.0,
        ge=1.0,
        le=600.0,
        description="With a shared database: how long a server that is silent keeps its workflows.",
    )
    keep_days: int | None = Field(
        None,
        ge=1,
        le=36_500,
        description="Days that a workflow is kept after its end, with its events, calls, decisions and pictures; then "
        "it is deleted. Left out, all are kept.",
    )
    journal: bool = Field(True, description="Write every message of the agents to a journal, for `swarmx replay`.")
    journal_file_mb: int = Field(
        256, ge=1, le=1_000_000, description="MiB after which a journal goes on in another file."
    )
    journal_keep_mb: int = Field(
        4096, ge=1, le=1_000_000, description="MiB of journals that are kept, about: the oldest files are deleted."
    )
    audit_file_mb: int = Field(
        64, ge=1, le=1_000_000, description="MiB after which the audit log goes on in another file."
    )
    audit_keep_mb: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="MiB of full files of the audit log that are kept: the oldest are deleted, and a record says so. "
        "Left out, all are kept.",
    )

    @field_validator("database")
    @classmethod
    def _no_secret(cls, value: str) -> str:
        if not value:
            return value
        parts = urlsplit(value)
        if parts.scheme not in ("postgresql", "postgres"):
            raise ValueError("state.database: expected postgresql://user@host:port/name, or nothing for SQLite.")
        if parts.password is not None or "password=" in parts.query:
            raise ValueError("state.database: leave the password out; put it into $PGPASSWORD or ~/.pgpass.")
        return value
