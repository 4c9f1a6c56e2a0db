"""A small audit trail in memory, for tests of what writes to one."""

from __future__ import annotations

import asyncio

from swarmx.core.audit import GENESIS, AuditEntry, AuditRecord, Outcome
from swarmx.core.errors import StoreError


class MemoryAudit:
    """Implements `core.ports.AuditTrail`, without the chain. A test may break it, or make its writers wait."""

    def __init__(self) -> None:
        self.records: list[AuditRecord] = []
        self.broken = False
        self.open = asyncio.Event()
        self.open.set()

    async def write(self, entry: AuditEntry) -> int:
        await self.open.wait()
        if self.broken:
            raise StoreError("the disk is full")
        seq = len(self.records) + 1
        self.records.append(AuditRecord(seq=seq, at_s=0.0, entry=entry, prev=GENESIS, hash=GENESIS))
        return seq

    async def tail(self, *, limit: int, before: int | None = None) -> list[AuditRecord]:
        rows = [record for record in self.records if before is None or record.seq < before]
        return rows[-limit:]

    def intents(self) -> list[str]:
        """What was announced, by tool."""
        return [record.entry.tool for record in self.records if record.entry.kind == "intent"]

    def outcomes(self) -> list[tuple[str, Outcome | None]]:
        """What became of it, in order."""
        return [(r.entry.tool, r.entry.outcome) for r in self.records if r.entry.kind == "outcome"]

    def last(self) -> AuditEntry:
        return self.records[-1].entry

    def check(self) -> None:
        """Every intent has exactly one outcome, after it. Raises AssertionError."""
        named = [r.entry.intent_seq for r in self.records if r.entry.kind == "outcome"]
        intents = [r.seq for r in self.records if r.entry.kind == "intent"]
        assert sorted(seq for seq in named if seq in intents) == intents
        for record in self.records:
            if record.entry.intent_seq in intents:
                assert record.entry.intent_seq is not None
                assert record.entry.intent_seq < record.seq
