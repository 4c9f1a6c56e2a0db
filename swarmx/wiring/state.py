"""The stores of a server, by its settings: a SQLite file of its own, or a database that several servers share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

from swarmx.core.errors import ConfigError
from swarmx.core.ports import ControlStore, WorkflowStore
from swarmx.memory.control import SqliteControl
from swarmx.memory.sqlite import SqliteStore
from swarmx.state_config import StateSection

DATABASE = "swarmx.db"
_SWITCH_S = 0.001  # after Python's 5 ms, each statement of the writing thread may wait that long for a busy loop


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Open stores. `exclusive`: no other process uses them.

    `listen` is given who hears of workflows to which another process posted something; it may miss some.
    """

    store: WorkflowStore
    control: ControlStore
    exclusive: bool
    listen: Callable[[Callable[[str], None]], None]


async def open_state(settings: StateSection, stack: AsyncExitStack, *, clock: Callable[[], float]) -> State:
    """The stores, to be closed by `stack`.

    Raises StoreError; ConfigError when there is no driver for the database.
    """
    if settings.database:
        return await _shared(settings.database, stack)
    sys.setswitchinterval(_SWITCH_S)
    store = SqliteStore(settings.dir / DATABASE, clock=clock)
    await store.open()
    stack.push_async_callback(store.close)
    return State(store=store, control=SqliteControl(store), exclusive=True, listen=lambda on_posted: None)


async def _shared(url: str, stack: AsyncExitStack) -> State:
    try:
        from swarmx.memory.postgres.control import PostgresControl
        from swarmx.memory.postgres.store import PostgresStore
    except ImportError as error:
        raise ConfigError(
            f"state.database needs the driver asyncpg ({error}); pip install 'swarmx[postgres]', or leave it out."
        ) from error
    store = PostgresStore(url)
    await store.open()
    stack.push_async_callback(store.close)
    return State(store=store, control=PostgresControl(store), exclusive=False, listen=store.listen)
