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

Done = tuple[Outcome, str]  # what became of an order, and what there is to say about it

_INTERRUPTED: Done = "interrupted", "It was called off."
_DETAIL_CHARS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
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

    def outcome(self, intent_seq: int, done: Done) -> AuditEntry:
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
            detail=detail[:_DETAIL_CHARS],
        )


async def carry_out(audit: AuditTrail, order: Order, effect: Callable[[], Awaitable[Done]]) -> bool:
    """Write the intent, have the effect, write what became of it; returns whether it was applied.

    An effect that raises has failed; one that is cancelled was interrupted. Both are written down as well.
    """
    try:
        seq = await _intent(audit, order) if order.intent_seq is None else order.intent_seq
    except StoreError as error:
        log.error("%s %s is not done, the audit log cannot be written: %s", order.tool, order.change.subject, error)
        return False
    done = _INTERRUPTED
    try:
        done = await effect()
    except ReplicaError as error:
        done = "failed", str(error)
        log.warning("%s %s failed: %s", order.tool, order.change.subject, error)
    except Exception as error:
        done = "failed", f"{type(error).__name__}: {error}"
        log.exception("%s %s failed", order.tool, order.change.subject)
    finally:
        await _write_outcome(audit, order, seq, done)
    return done[0] == "applied"


async def _intent(audit: AuditTrail, order: Order) -> int:
    """The number of the intent. To be cancelled meanwhile leaves no intent without its outcome. Raises StoreError."""
    writing = asyncio.ensure_future(audit.write(order.intent()))
    try:
        return await asyncio.shield(writing)
    except asyncio.CancelledError:
        await _write_outcome(audit, order, await writing, _INTERRUPTED)
        raise


async def _write_outcome(audit: AuditTrail, order: Order, seq: int, done: Done) -> None:
    try:
        await audit.write(order.outcome(seq, done))
    except StoreError as error:
        log.error("%s %s: its outcome %s is not in the audit log: %s", order.tool, order.change.subject, done, error)
