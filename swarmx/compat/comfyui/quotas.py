"""How many outputs a tenant may have, and how long files are kept.

ComfyUI has no way to delete a file: what is forgotten here cannot be asked for any more, and stays on the disk of its
server until somebody clears that.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable
from typing import NamedTuple

from swarmx.compat.comfyui.files import Files
from swarmx.compat.comfyui.server import ServerAway
from swarmx.compat.comfyui.servers import Servers
from swarmx.compat.comfyui.settings import FrontSettings
from swarmx.compat.comfyui.store import JobStore
from swarmx.compat.comfyui.validation import Error, error
from swarmx.core.errors import StoreError

log = logging.getLogger(__name__)

_LOOK_S = 2.0  # how old a count may be
_SWEEP_S = 3600.0
_AT_ONCE = 100  # outputs whose size is asked for between two looks
_GONE = -1  # the size of an output that its server has no more


class Used(NamedTuple):
    """What a tenant's files come to."""

    files: int = 0
    bytes: int = 0


class Quotas:
    """Counts outputs of jobs that have ended. Their sizes are asked for where a tenant has a bound on bytes."""

    def __init__(
        self, *, settings: FrontSettings, store: JobStore, files: Files, servers: Servers, clock: Callable[[], float]
    ) -> None:
        self._settings = settings
        self._store = store
        self._files = files
        self._servers = servers
        self._clock = clock
        self._used: dict[str, Used] = {}
        self._looked_s = float("-inf")

    async def outputs_full(self, tenant: str) -> Error | None:
        """Why the tenant may begin no further job now; None where it may. Raises StoreError."""
        now_s = self._clock()
        if not 0.0 <= now_s - self._looked_s < _LOOK_S:
            self._looked_s = now_s
            self._used = {row[0]: Used(*row[1:]) for row in await self._store.do(_used)}
        allowed, used = self._settings.tenant(tenant), self._used.get(tenant, Used())
        most_bytes = allowed.max_output_bytes
        if used.files < allowed.max_outputs and (most_bytes is None or used.bytes < most_bytes):
            return None
        details = f"{used.files} files, {allowed.max_outputs} may be kept"
        if most_bytes is not None:
            details += f"; {used.bytes} bytes, {most_bytes} may be kept"
        return error("output_quota", "the outputs of earlier jobs fill the quota; clear some of the history", details)

    async def run(self) -> None:
        """Ask for sizes, and forget what is old, for ever."""
        swept_s = float("-inf")
        while True:
            try:
                if self._clock() - swept_s >= _SWEEP_S:
                    swept_s = self._clock()
                    await self.sweep()
                await self._measure()
            except StoreError as problem:
                log.error("files could not be counted, which is tried again: %s", problem)
            except Exception:
                log.exception("files could not be counted")
            await asyncio.sleep(_LOOK_S)

    async def sweep(self) -> None:
        """Forget outputs that were made, and uploads that were used last, longer ago than files are kept."""
        before_s = self._clock() - self._settings.keep_files_s
        await self._store.do(lambda db: db.execute("DELETE FROM output WHERE made_s < ?", (before_s,)) and None)
        await self._files.forget(before_s)

    async def _measure(self) -> None:
        bounded = [self._settings.default_tenant, *self._settings.tenants.values()]
        if all(tenant.max_output_bytes is None for tenant in bounded):
            return
        for tenant, folder, subfolder, name in await self._store.do(_unmeasured):
            if self._settings.tenant(tenant).max_output_bytes is None:
                continue
            owner = self._files.owner_of(f"{subfolder}/{name}" if subfolder else name)
            if owner is None or not self._servers.is_up(owner[0]):
                continue
            query = {"filename": owner[1].rpartition("/")[2], "subfolder": subfolder, "type": folder}
            try:
                size = await self._servers[owner[0]].size(query)
            except ServerAway:
                continue
            row = (_GONE if size is None else size, tenant, folder, subfolder, name)
            await self._store.do(lambda db, row=row: db.execute(_MEASURED, row) and None)  # type: ignore[misc]


_MEASURED = "UPDATE output SET size = ? WHERE tenant = ? AND folder = ? AND subfolder = ? AND name = ?"


def _used(db: sqlite3.Connection) -> list[tuple[str, int, int]]:
    query = "SELECT tenant, count(*), coalesce(sum(max(size, 0)), 0) FROM output GROUP BY tenant"
    return db.execute(query).fetchall()


def _unmeasured(db: sqlite3.Connection) -> list[tuple[str, str, str, str]]:
    query = "SELECT tenant, folder, subfolder, name FROM output WHERE size IS NULL ORDER BY made_s DESC LIMIT ?"
    return db.execute(query, (_AT_ONCE,)).fetchall()
