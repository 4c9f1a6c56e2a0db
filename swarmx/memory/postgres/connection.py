"""Connections to PostgreSQL: how they are made, how one tells that one was lost, and errors in words."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import asyncpg
from asyncpg import exceptions as refused

from swarmx.core.errors import NotFound, StoreError

_LOST = (
    OSError,
    TimeoutError,
    refused.PostgresConnectionError,
    refused.AdminShutdownError,
    refused.CrashShutdownError,
    refused.CannotConnectNowError,
    refused.IdleInTransactionSessionTimeoutError,
    refused.InternalClientError,
)
_HINTS: tuple[tuple[type[BaseException], str], ...] = (
    (refused.DiskFullError, "its disk is full; free some space, nothing of this write was stored"),
    (refused.TooManyConnectionsError, "it has no connection to spare; raise its max_connections"),
    (refused.InvalidAuthorizationSpecificationError, "check the user, and the password in $PGPASSWORD or ~/.pgpass"),
    (refused.InvalidCatalogNameError, "there is no such database; create it, SwarmX makes its tables by itself"),
    (refused.InsufficientPrivilegeError, "its user may not do that; make it the owner of the database"),
    (
        refused.ReadOnlySQLTransactionError,
        "it is a standby; name the primary, or all of them with ?target_session_attrs=primary",
    ),
    (refused.QueryCanceledError, "it took too long; look at pg_stat_activity for who holds a lock"),
)


def place_of(url: str) -> str:
    """The database without what is secret about it."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


async def connect(url: str, *, name: str, timeout_s: float, **settings: str) -> asyncpg.Connection:
    """A connection that the server knows as `name`; no statement on it takes longer than `timeout_s`."""
    return await asyncpg.connect(
        url,
        timeout=timeout_s,
        command_timeout=timeout_s,
        server_settings={"application_name": name, **settings},
    )


def lost(connection: Any, error: BaseException) -> bool:
    """Whether the error means that the connection is gone, or cannot be told from one that is."""
    return isinstance(error, _LOST) or (connection is not None and connection.is_closed())


def explained(error: BaseException, where: str) -> BaseException:
    """PostgreSQL's errors as StoreError, with what to do; others as they are.

    It keeps no text with the character NUL: to ask for one is NotFound, as in a store that would keep it.
    """
    if isinstance(error, refused.CharacterNotInRepertoireError):
        return NotFound("there is nothing with such a name: it has the character NUL")
    if not isinstance(error, asyncpg.PostgresError | asyncpg.InterfaceError | asyncpg.InternalClientError | OSError):
        return error
    code = getattr(error, "sqlstate", None) or type(error).__name__
    hint = next((hint for kind, hint in _HINTS if isinstance(error, kind)), None)
    if hint is None and lost(None, error):
        hint = "it cannot be reached; look whether it runs, the write can be tried again"
    return StoreError(
        f"the database {where} refused ({code}: {error or type(error).__name__}): "
        f"{hint or 'nothing of this write was stored'}"
    )
