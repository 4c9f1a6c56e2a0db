"""The tables in which jobs and uploads are kept, and how those of older versions become these."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from swarmx.core.errors import StoreError

_VERSION = 3
_SCHEMA = """
CREATE TABLE job (
  prompt_id TEXT PRIMARY KEY, tenant TEXT NOT NULL, seq INTEGER NOT NULL UNIQUE, state TEXT NOT NULL,
  body BLOB NOT NULL, server TEXT, attempts INTEGER NOT NULL DEFAULT 0,
  created_s REAL NOT NULL, started_s REAL, ended_s REAL, history BLOB, parent TEXT
) STRICT;
CREATE INDEX job_part ON job (parent) WHERE parent IS NOT NULL;
CREATE INDEX job_open ON job (seq) WHERE state IN ('pending', 'in_progress');
CREATE INDEX job_done ON job (seq) WHERE ended_s IS NOT NULL;
CREATE INDEX job_ended ON job (tenant, ended_s) WHERE ended_s IS NOT NULL;
CREATE TABLE decision (prompt_id TEXT NOT NULL, attempt INTEGER NOT NULL, body BLOB NOT NULL,
  PRIMARY KEY (prompt_id, attempt)) STRICT;
CREATE TABLE output (
  tenant TEXT NOT NULL, folder TEXT NOT NULL, subfolder TEXT NOT NULL, name TEXT NOT NULL,
  prompt_id TEXT NOT NULL DEFAULT '', made_s REAL NOT NULL DEFAULT 0, size INTEGER,
  PRIMARY KEY (tenant, folder, subfolder, name)
) STRICT, WITHOUT ROWID;
CREATE INDEX output_name ON output (name);
CREATE TABLE upload (
  tenant TEXT NOT NULL, folder TEXT NOT NULL, subfolder TEXT NOT NULL, name TEXT NOT NULL, sha256 TEXT NOT NULL,
  PRIMARY KEY (tenant, folder, subfolder, name)
) STRICT;
"""

_FROM_1 = """
ALTER TABLE job ADD COLUMN parent TEXT;
CREATE INDEX job_part ON job (parent) WHERE parent IS NOT NULL;
ALTER TABLE output ADD COLUMN prompt_id TEXT NOT NULL DEFAULT '';
ALTER TABLE output ADD COLUMN made_s REAL NOT NULL DEFAULT 0;
ALTER TABLE output ADD COLUMN size INTEGER;
UPDATE output SET made_s = strftime('%s', 'now');
"""
_FROM_2 = """
CREATE INDEX output_name ON output (name);
DELETE FROM decision WHERE prompt_id NOT IN (SELECT prompt_id FROM job);
"""
_STEPS = (_SCHEMA, _FROM_1, _FROM_2)
"""From each version to the next; from nothing to the last."""


def connected(path: Path) -> sqlite3.Connection:
    """The database at the path, created or brought up to date. Raises StoreError, sqlite3.Error, OSError."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    db = sqlite3.connect(path, isolation_level=None, timeout=5.0)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA secure_delete = ON")  # what is gone is not in the file any more
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    if version > _VERSION:
        raise StoreError(f"{path} has schema {version}, this version knows {_VERSION}; use a newer SwarmX")
    while version < _VERSION:
        step, version = _STEPS[version], version + 1 if version else _VERSION
        db.executescript(f"BEGIN; {step} PRAGMA user_version = {version}; COMMIT;")
    return db
