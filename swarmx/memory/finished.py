"""The newest finished calls, for training: read in one go, beside the writer."""

from __future__ import annotations

import sqlite3

from swarmx.core.records import CallRecord
from swarmx.memory.sqlite import SqliteStore, decoded


async def newest_finished(store: SqliteStore, limit: int) -> list[CallRecord]:
    """The finished ones among the last `limit` calls that were recorded, of all tenants, oldest first.

    Raises StoreError.
    """

    def read(connection: sqlite3.Connection) -> list[CallRecord]:
        rows = connection.execute("SELECT body FROM calls ORDER BY rowid DESC LIMIT ?", (limit,)).fetchall()
        records = [decoded(body, CallRecord) for (body,) in reversed(rows)]
        return [record for record in records if record.state == "finished"]

    return await store.read(read)
