"""One effect between its two audit records: what is not announced in the log does not happen."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from swarmx.core.audit import AuditEntry, Outcome
from swarmx.core.control import Actor, Change, Effect, Via
from swarmx.core.errors import ReplicaError, StoreError
from swarmx.core.ports import AuditTrail

log = logging.getLogger(__name__)

Ending = tuple[Outcome, str]  # what became of an errand, and what there is to say about it

_INTERRUPTED: Ending = "interrupted", "It was called off."


@dataclass(frozen=True, slots=True, kw_only=True)
class Errand:
    """Something to be done, as the audit log tells it; with `intent_seq` the log has its intent already."""

    tool: str
    arguments: dict[str, Any]
    effect: Effect
    change: Change
    actor: Actor
    via: Via
    intent_seq: int | None = None

    def intent(self) -> AuditEntry:
        return AuditEntry(
            kind="intent",
            actor=self.actor,
            via=self.via,
            tool=self.tool,
            arguments=self.arguments,
            effect=self.effect,
            changes=(self.change,),
        )

    def outcome(self, intent_seq: int, done: Ending) -> AuditEntry:
        outcome, detail = done
        return AuditEntry(
            kind="outcome",
            actor=self.actor,
            via=self.via,
            tool=self.tool,
            arguments=self.arguments,
            effect=self.effect,
            intent_seq=intent_seq,
            outcome=outcome,
            detail=detail,
        )


async def carry_out(audit: AuditTrail, errand: Errand, effect: Callable[[], Awaitable[Ending]]) -> bool:
    """Write the intent, have the effect, write what became of it; returns whether it was applied.

    An effect that raises has failed; one that is cancelled was interrupted. Both are written down as well.
    """
    try:
        seq = await _intent(audit, errand) if errand.intent_seq is None else errand.intent_seq
    except StoreError as error:
        log.error("%s %s is not done, the audit log cannot be written: %s", errand.tool, errand.change.subject, error)
        return False
    done = _INTERRUPTED
    try:
        done = await effect()
    except ReplicaError as error:
        done = "failed", str(error)
        log.warning("%s %s failed: %s", errand.tool, errand.change.subject, error)
    except Exception as error:
        done = "failed", f"{type(error).__name__}: {error}"
        log.exception("%s %s failed", errand.tool, errand.change.subject)
    finally:
        await _write_outcome(audit, errand, seq, done)
    return done[0] == "applied"


async def _intent(audit: AuditTrail, errand: Errand) -> int:
    """The number of the intent. To be cancelled meanwhile leaves no intent without its outcome. Raises StoreError."""
    writing = asyncio.ensure_future(audit.write(errand.intent()))
    try:
        return await asyncio.shield(writing)
    except asyncio.CancelledError:
        await _write_outcome(audit, errand, await writing, _INTERRUPTED)
        raise


async def _write_outcome(audit: AuditTrail, errand: Errand, seq: int, done: Ending) -> None:
    try:
        await audit.write(errand.outcome(seq, done))
    except StoreError as error:
        log.error("%s %s: its outcome %s is not in the audit log: %s", errand.tool, errand.change.subject, done, error)
