"""The audit log's records: two for every control action, intent before effect, each chained to the one before."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from swarmx.core.control import Actor, Change, Effect, Evidence, Verdict, Via

GENESIS = "0" * 64

Outcome = Literal["applied", "failed", "refused", "denied", "expired", "stale", "kept", "rolled_back", "interrupted"]


class ModelUse(msgspec.Struct, frozen=True, kw_only=True):
    """The language model behind an action, with the SHA-256 of what it was asked and of what it said."""

    name: str
    prompt_sha256: str
    reply_sha256: str


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be recorded. An `intent` is written before anything happens; an `outcome` names it in `intent_seq`.

    A `note` stands alone: something worth keeping that changed nothing (a refusal, a start, a stop).
    """

    kind: Literal["intent", "outcome", "note"]
    actor: Actor
    via: Via
    tool: str
    arguments: dict[str, Any] = {}
    effect: Effect = "reversible"
    verdict: Verdict | None = None
    proposal_id: str | None = None
    changes: tuple[Change, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    model: ModelUse | None = None
    intent_seq: int | None = None
    outcome: Outcome | None = None
    detail: str = ""


class AuditRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the log: the `seq`-th entry (from 1), when (Unix seconds), and the chain.

    `hash` is the SHA-256, in hex, of the canonical JSON of the record without `hash`; `prev` is the hash of the record
    before, `GENESIS` for the first.
    """

    seq: int
    at_s: float
    entry: AuditEntry
    prev: str
    hash: str
