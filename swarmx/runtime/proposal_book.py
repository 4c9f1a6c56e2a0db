"""The book of proposals: each new state is written to the audit log, stored, counted and told to who listens."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from typing import Literal, NoReturn

import msgspec

from swarmx.core.audit import AuditEntry, ModelUse, Outcome
from swarmx.core.control import Actor, Proposal, ProposalState, Verdict, Via
from swarmx.core.errors import Forbidden, Refused
from swarmx.core.ports import AuditTrail, ControlStore
from swarmx.runtime.clock import Clock
from swarmx.tools.ledger import WAITING, Ledger
from swarmx.tools.registry import Registry

log = logging.getLogger(__name__)

SYSTEM = Actor(type="system", name="swarmx", role="admin")

End = Literal["stale", "denied", "expired", "kept", "rolled_back"]
_WAS_APPLIED: tuple[ProposalState, ...] = ("applied", "kept", "rolled_back", "stale", "failed")
_PAGE = 1000


class ProposalBook:
    """`ledger` is what the guard remembers; `due` says when one that waits expires, or one that was applied is verified
    (Unix seconds, by id); `news` is set whenever that changes."""

    def __init__(
        self, *, registry: Registry, store: ControlStore, audit: AuditTrail, clock: Clock, verify_s: float
    ) -> None:
        self.ledger = Ledger()
        self.due: dict[str, float] = {}
        self.news = asyncio.Event()
        self.on_change: list[Callable[[Proposal], None]] = []
        self._registry = registry
        self._store = store
        self._audit = audit
        self._clock = clock
        self._verify_s = verify_s

    async def open(self) -> None:
        """Take up what an earlier life left: open proposals, changes to verify, budgets. Raises StoreError.

        Open ones about a replica end here: a start gives the same names anew.
        """
        now_s = self._clock.now_s()
        for proposal in await self._store.proposals(states=_WAS_APPLIED, limit=_PAGE):
            self.ledger.note(proposal, now_s)
            if proposal.state == "applied":
                self.due[proposal.proposal_id] = now_s + self._verify_s  # the figures of this life have to gather
        for proposal in await self._store.proposals(states=WAITING, limit=_PAGE):
            if any(change.what == "state" for change in proposal.diff.changes):
                # The name may belong to another replica by now, of which nobody said anything.
                detail = "SwarmX was started anew, so the replica may be another one of the same name"
                await self.end(proposal, "stale", SYSTEM, proposal.via, detail=detail)
                continue
            self.ledger.note(proposal, now_s)
            self.due[proposal.proposal_id] = proposal.expires_at_s

    async def refuse(
        self, proposal: Proposal, actor: Actor, via: Via, verdict: Verdict, model: ModelUse | None = None
    ) -> NoReturn:
        """Note the refusal, then raise Forbidden for the role, else Refused."""
        await self.write("note", proposal, actor, via, verdict=verdict, model=model, outcome="refused")
        if verdict.rule == "role":
            raise Forbidden(verdict.detail)
        raise Refused(verdict.detail, rule=verdict.rule)

    async def end(
        self,
        proposal: Proposal,
        state: End,
        actor: Actor,
        via: Via,
        *,
        detail: str = "",
        decided_by: Actor | None = None,
    ) -> Proposal:
        """Bring the proposal into a state that it does not leave, except by a roll back."""
        await self.write("note", proposal, actor, via, outcome=state, detail=detail)
        ended = msgspec.structs.replace(proposal, state=state, detail=detail)
        if decided_by is not None:
            ended = msgspec.structs.replace(ended, decided_by=decided_by, decided_at_s=self._clock.now_s())
        return await self.save(ended)

    async def take_back(self, proposal_id: str, by: Proposal, actor: Actor, via: Via) -> None:
        """End a proposal that another one has rolled back."""
        undone = await self._store.proposal(proposal_id)
        if undone is not None:
            detail = undone.detail or f"taken back by {by.proposal_id}"
            await self.end(undone, "rolled_back", actor, via, detail=detail)

    async def write(
        self,
        kind: Literal["intent", "outcome", "note"],
        proposal: Proposal,
        actor: Actor,
        via: Via,
        *,
        verdict: Verdict | None = None,
        model: ModelUse | None = None,
        intent_seq: int | None = None,
        outcome: Outcome | None = None,
        detail: str = "",
    ) -> int:
        """Add an entry about the proposal to the audit log; returns its number."""
        tool = self._registry.tools.get(proposal.call.tool)  # None: another version proposed it
        return await self._audit.write(
            AuditEntry(
                kind=kind,
                actor=actor,
                via=via,
                tool=proposal.call.tool,
                arguments=proposal.call.arguments,
                effect="reversible" if tool is None else tool.effect,
                verdict=verdict,
                proposal_id=proposal.proposal_id,
                changes=proposal.diff.changes,
                evidence=proposal.evidence if kind != "outcome" else (),
                model=model,
                intent_seq=intent_seq,
                outcome=outcome,
                detail=detail,
            )
        )

    async def save(self, proposal: Proposal) -> Proposal:
        """Store the proposal in its new state and tell who listens."""
        await self._store.save_proposal(proposal)
        self.ledger.note(proposal, self._clock.now_s())
        self.due.pop(proposal.proposal_id, None)
        if proposal.state in WAITING:
            self.due[proposal.proposal_id] = proposal.expires_at_s
        elif proposal.state == "applied":
            self.due[proposal.proposal_id] = self._clock.now_s() + self._verify_s
        self.news.set()
        for hear in self.on_change:
            try:
                hear(proposal)
            except Exception:  # a listener must not stop a change half way
                log.exception("a listener failed on %s", proposal.proposal_id)
        return proposal


def new_id() -> str:
    """The id of a proposal that is new."""
    return f"pr-{secrets.token_hex(6)}"
