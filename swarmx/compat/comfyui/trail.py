"""What the front decided, and what its clients had stopped, in an audit log of its own."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swarmx.core.audit import AuditEntry
from swarmx.core.control import Actor
from swarmx.core.errors import StoreError
from swarmx.core.nouns import Decision
from swarmx.gateway.keys import Key
from swarmx.memory.audit import LOG_NAME, AuditLog
from swarmx.runtime.clock import WallClock

log = logging.getLogger(__name__)

_MOST_BEHIND = 10_000
_EVERY_S = 0.5
_ROUTER = Actor(type="agent", name="comfyui router", role="operator")


class Trail:
    """Notes in `audit.jsonl` of the front's folder, written together twice a second.

    Nobody waits for them: a job goes on before its note is written, and also where that fails, which is told once.
    Without a folder nothing is kept.
    """

    def __init__(self, folder: Path | None) -> None:
        self._log = None if folder is None else AuditLog(folder / LOG_NAME, clock=WallClock().now_s)
        self._behind: deque[AuditEntry] = deque()
        self._complained = False

    async def open(self) -> None:
        """Check what is there, and go on with it. Raises StoreError where it was changed, or another front has it."""
        if self._log is not None:
            await self._log.open()

    async def close(self) -> None:
        """Write what is left."""
        await self._flush()
        if self._log is not None:
            await self._log.close()

    async def run(self) -> None:
        """Write, for ever."""
        while True:
            await asyncio.sleep(_EVERY_S)
            await self._flush()

    def decided(self, job: str, decision: Decision) -> None:
        """A job, or a part of it, goes to a server. All that was weighed is in the store, under the job's id."""
        seen = decision.candidates
        self._note(
            _ROUTER,
            "comfyui.place",
            {
                "job": job,
                "tenant": decision.call.tenant,
                "attempt": decision.attempt,
                "server": decision.replica_id,
                "runner_up": decision.runner_up,
                "policy": decision.policy,
                "forecast_p50_s": None if decision.forecast is None else decision.forecast.quantile(0.5),
                "cost_s": None if seen.cost_s is None else dict(zip(seen.replica_ids, seen.cost_s, strict=True)),
                "waited_s": decision.waited_s,
                "ahead": decision.ahead,
            },
            decision.note,
        )

    def asked(self, key: Key, tool: str, arguments: Mapping[str, Any]) -> None:
        """A client had jobs stopped, or servers free their memory."""
        self._note(
            Actor(type="key", name=key.name, role=key.role), f"comfyui.{tool}", {**arguments, "tenant": key.tenant}
        )

    def _note(self, actor: Actor, tool: str, arguments: dict[str, Any], detail: str = "") -> None:
        if self._log is None:
            return
        if len(self._behind) >= _MOST_BEHIND:
            self._complain("it is too far behind")
            return
        self._behind.append(
            AuditEntry(kind="note", actor=actor, via="rest", tool=tool, arguments=arguments, detail=detail)
        )

    async def _flush(self) -> None:
        if self._log is None or not self._behind:
            return
        batch = [self._behind.popleft() for _ in range(len(self._behind))]
        try:
            await asyncio.gather(*map(self._log.write, batch))
            self._complained = False
        except StoreError as problem:
            self._complain(str(problem))

    def _complain(self, why: str) -> None:
        if not self._complained:
            self._complained = True
            log.error("the audit log misses what the front decides, jobs go on: %s", why)
