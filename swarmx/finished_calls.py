"""The finished calls that a server left, for commands that learn from them: in its folder, or in its database."""

from __future__ import annotations

import asyncio
from pathlib import Path

from swarmx.core.errors import ConfigError
from swarmx.core.ports import Store
from swarmx.core.records import CallRecord

# The drivers of databases are imported late, because most commands need none of them.

_DATABASE = "swarmx.db"


def finished_calls(state_dir: Path, config: Path | None, count: int, *, or_none: bool = False) -> list[CallRecord]:
    """The newest finished calls, oldest first, from where the server with these settings keeps them.

    Without a database in the folder there are none, if `or_none`. Raises ConfigError, StoreError.
    """
    from swarmx.config import load

    settings = load(config).state
    if settings.database:
        return asyncio.run(_newest(_shared(settings.database), count))
    path = (settings.dir if "dir" in settings.model_fields_set else state_dir) / _DATABASE  # as `swarmx up` has it
    if path.exists():
        from swarmx.memory.sqlite import SqliteStore

        return asyncio.run(_newest(SqliteStore(path), count))
    if or_none:
        return []
    raise ConfigError(
        f"there is no database in {path.parent}; name the server's folder with --state-dir, or its settings with "
        "--config if they name a database."
    )


def _shared(url: str) -> Store:
    try:
        from swarmx.memory.postgres.store import PostgresStore
    except ImportError as error:
        raise ConfigError(
            f"state.database needs the driver asyncpg ({error}); pip install 'swarmx[postgres]'."
        ) from error
    return PostgresStore(url)


async def _newest(store: Store, count: int) -> list[CallRecord]:
    await store.open()
    try:
        return await store.newest_finished(count)
    finally:
        await store.close()
