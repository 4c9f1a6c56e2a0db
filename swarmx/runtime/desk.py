"""The one path of every change: understand, guard, show, decide, write down, apply, verify, keep or roll back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import msgspec
from pydantic import BaseModel

from swarmx.core.actions import Action
from swarmx.core.audit import MAX_TEXT, ModelUse
from swarmx.core.control import (
    Actor,
    ControlView,
    Diff,
    Evidence,
    Mode,
    Proposal,
    ProposalState,
    ToolCall,
    Verdict,
    Via,
)
from swarmx.core.errors import ConfigError, Forbidden, NotFound, Outdated, Refused, StoreError, SwarmXError
from swarmx.core.messages import Message
from swarmx.core.ports import AuditTrail, ControlStore
from swarmx.runtime.clock import Clock
from swarmx.runtime.proposal_book import SYSTEM, ProposalBook, new_id
from swarmx.tools.facts import in_force
from swarmx.tools.figures import figures_of
from swarmx.tools.guard import Guard
from swarmx.tools.ledger import WAITING
from swarmx.tools.registry import Registry, Rollback
from swarmx.tools.tool import ControlTool, ReadTool

log = logging.getLogger(__name__)

T = TypeVar("T")
_MOST_EVIDENCE = 16
_MOST_EPISODES = 8
_RETRY_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A change that was understood, and the world in which it is judged."""

    tool: ControlTool[Any]
    args: BaseModel
    view: ControlView


class Desk:
    """One change at a time. `view(call_ids)` takes a snapshot; messages go out by `post`, actions by
    `act(action, actor, via, intent_seq)`, which writes their outcome when the effect is complete.

    A caller that is cancelled does not stop a change half way.
    """

    def __init__(
        self,
        *,
        registry: Registry,
        guard: Guard,
        store: ControlStore,
        audit: AuditTrail,
        view: Callable[[Sequence[str]], Awaitable[ControlView]],
        post: Callable[[Message], None],
        act: Callable[[Action, Actor, Via, int], None],
        clock: Clock,
        approval_s: float = 900.0,
        verify_s: float = 60.0,
    ) -> None:
        self.registry = registry
        self._guard = guard
        self._store = store
        self._view = view
        self._post = post
        self._act = act
        self._clock = clock
        self._approval_s = approval_s
        self._book = ProposalBook(registry=registry, store=store, audit=audit, clock=clock, verify_s=verify_s)
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def on_change(self) -> list[Callable[[Proposal], None]]:
        """Called with every proposal in each new state; must not block."""
        return self._book.on_change

    async def open(self) -> None:
        """Take up what an earlier life left: open proposals, changes to verify, budgets. Raises StoreError."""
        await self._book.open()

    async def run(self) -> None:
        """Let proposals expire and verify changes when their time has come, until cancelled."""
        while True:
            self._book.news.clear()
            await self.settle()
            next_s = min(self._book.due.values(), default=None)
            wait_s = None if next_s is None else max(0.0, next_s - self._clock.now_s())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._book.news.wait(), wait_s)

    async def close(self) -> None:
        """Finish the changes that were begun."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def read(self, call: ToolCall, actor: Actor) -> dict[str, Any]:
        """What a reading tool sees. Raises ConfigError, Forbidden, NotFound."""
        asked = self.registry.understand(call)
        if not isinstance(asked.tool, ReadTool):
            raise ConfigError(f"{call.tool} changes something; propose or order it")
        verdict = self._guard.may_use(asked.tool, actor)
        if not verdict.allowed:
            raise Forbidden(verdict.detail)
        return asked.tool.read(asked.args, await self._view(asked.tool.calls(asked.args)))

    async def dry_run(self, call: ToolCall, *, actor: Actor) -> tuple[Verdict, Diff]:
        """The verdict on such an order, and what it would change; nothing is written. Raises ConfigError, Refused."""
        asked = await self._asked(call)
        verdict = self._judge(asked, actor, "auto")
        try:
            asked.tool.check(asked.args, asked.view)
        except Refused:
            return verdict, Diff(changes=())
        return verdict, asked.tool.diff(asked.args, asked.view)

    async def proposals(self, *, states: Sequence[ProposalState] | None = None, limit: int = 50) -> list[Proposal]:
        """Newest first."""
        return await self._store.proposals(states=states, limit=limit)

    async def proposal(self, proposal_id: str) -> Proposal:
        """Raises NotFound."""
        found = await self._store.proposal(proposal_id)
        if found is None:
            raise NotFound(f"there is no proposal {proposal_id!r}; list them and check the id")
        return found

    async def propose(
        self,
        call: ToolCall,
        *,
        actor: Actor,
        via: Via,
        reason: str = "",
        evidence: Sequence[Evidence] = (),
        episode_ids: Sequence[str] = (),
        mode: Mode = "review",
        model: ModelUse | None = None,
        seen: Diff | None = None,
    ) -> Proposal:
        """Bring a change forward: it waits for a decision, or, with mode auto, is applied at once.

        Raises ConfigError (not understood), Forbidden (the role), Refused (a rule), StoreError (nothing was changed);
        Outdated when it would change something else than was `seen`.
        """
        understood = self.registry.understand(call)
        now_s = self._clock.now_s()
        draft = Proposal(
            proposal_id=new_id(),
            at_s=now_s,
            expires_at_s=now_s + self._approval_s,
            actor=actor,
            via=via,
            call=understood.call,
            diff=seen or Diff(changes=()),
            state="suggested" if mode == "suggest" else "open",
            reason=(reason or understood.reason)[:MAX_TEXT],
            evidence=tuple(evidence[:_MOST_EVIDENCE]),
            episode_ids=tuple(episode_ids[:_MOST_EPISODES]),
            rollback_of=understood.args.proposal_id if isinstance(understood.args, Rollback) else None,
        )
        return await self._alone(partial(self._propose, draft, mode, model))

    async def order(
        self, call: ToolCall, *, actor: Actor, via: Via, reason: str = "", seen: Diff | None = None
    ) -> Proposal:
        """A person's own change, applied at once. Raises as `propose` does."""
        if actor.type != "key":
            raise Forbidden(f"{actor.name!r} is not a person; it may propose, not order")
        return await self.propose(call, actor=actor, via=via, reason=reason, mode="auto", seen=seen)

    async def approve(self, proposal_id: str, *, actor: Actor, via: Via) -> Proposal:
        """Apply an open proposal, if it still means what it meant. Raises NotFound, Forbidden, Refused, StoreError.

        A refusal by a rule that time can lift (a cooldown, a budget) leaves the proposal open.
        """
        return await self._alone(partial(self._approve, proposal_id, actor, via))

    async def deny(self, proposal_id: str, *, actor: Actor, via: Via, reason: str = "") -> Proposal:
        """Close an open proposal. Raises NotFound, Forbidden, Refused, StoreError."""
        return await self._alone(partial(self._deny, proposal_id, actor, via, reason))

    async def settle(self) -> None:
        """Let expire, and verify, whatever is due now. What fails is logged and due again a little later."""
        for proposal_id, due_s in sorted(self._book.due.items(), key=lambda item: item[1]):
            if due_s > self._clock.now_s():
                continue
            try:
                await self._alone(partial(self._settle, proposal_id))
            except Exception:  # one bad proposal must not hold up the others
                log.exception("%s cannot be settled, trying again in %g s", proposal_id, _RETRY_S)
                if proposal_id in self._book.due:
                    self._book.due[proposal_id] = self._clock.now_s() + _RETRY_S

    # Everything below runs alone, under the lock.

    async def _propose(self, draft: Proposal, mode: Mode, model: ModelUse | None) -> Proposal:
        asked = await self._asked(draft.call)
        mode = self._guard.granted(asked.tool, draft.actor, mode)
        verdict = self._judge(asked, draft.actor, mode)
        if verdict.allowed and mode != "auto":
            verdict = self._guard.may_wait(draft.call, draft.actor, self._book.ledger)
        if not verdict.allowed:
            await self._book.refuse(draft, draft.actor, draft.via, verdict, model)
        proposal = msgspec.structs.replace(draft, diff=asked.tool.diff(asked.args, asked.view))
        if draft.diff.changes not in ((), proposal.diff.changes):
            raise Outdated("what it would change is not as you saw it; look again, then ask anew")
        if mode == "auto":
            decided_by = draft.actor if draft.actor.type == "key" else None
            return await self._apply(proposal, asked, draft.via, verdict, decided_by=decided_by, model=model)
        said = f"{proposal.state}: {proposal.reason}"
        await self._book.write("note", proposal, draft.actor, draft.via, verdict=verdict, model=model, detail=said)
        return await self._book.save(proposal)

    async def _approve(self, proposal_id: str, actor: Actor, via: Via) -> Proposal:
        proposal = await self._decidable(proposal_id, actor, via)
        try:
            asked = await self._asked(proposal.call)
            asked.tool.check(asked.args, asked.view)
            changes = asked.tool.diff(asked.args, asked.view).changes
            change = "" if changes == proposal.diff.changes else "what it would change is not as it was"
        except (Refused, ConfigError) as error:
            change = str(error)
        if change:
            await self._book.end(proposal, "stale", actor, via, detail=change, decided_by=actor)
            raise Refused(f"{proposal_id!r} does not apply any more: {change}", rule="stale")
        verdict = self._judge(asked, proposal.actor, "review")
        if not verdict.allowed:
            await self._book.refuse(proposal, actor, via, verdict)
        return await self._apply(proposal, asked, via, verdict, decided_by=actor)

    async def _deny(self, proposal_id: str, actor: Actor, via: Via, reason: str) -> Proposal:
        proposal = await self._decidable(proposal_id, actor, via)
        return await self._book.end(proposal, "denied", actor, via, detail=reason[:MAX_TEXT], decided_by=actor)

    async def _decidable(self, proposal_id: str, actor: Actor, via: Via) -> Proposal:
        """The open proposal, if this actor may decide on it."""
        proposal = await self.proposal(proposal_id)
        verdict = self._guard.may_decide(actor)
        if not verdict.allowed:
            await self._book.refuse(proposal, actor, via, verdict)
        if proposal.state == "open" and proposal.expires_at_s <= self._clock.now_s():
            proposal = await self._book.end(proposal, "expired", SYSTEM, proposal.via)
        if proposal.state != "open":
            detail = f"{proposal_id!r} is {proposal.state}; only an open proposal can be approved or denied"
            await self._book.refuse(proposal, actor, via, Verdict(allowed=False, rule="decided", detail=detail))
        return proposal

    async def _apply(
        self,
        proposal: Proposal,
        asked: _Asked,
        via: Via,
        verdict: Verdict,
        *,
        decided_by: Actor | None = None,
        model: ModelUse | None = None,
    ) -> Proposal:
        """Write down the intent, store the proposal as applied, then do it. Raises StoreError before anything is done.

        A crash between the last two leaves a change that counts though it was not made: the safe side of the two.
        """
        now_s = self._clock.now_s()
        actor = decided_by or proposal.actor
        outputs = asked.tool.apply(asked.args, asked.view, now_s)
        figures = figures_of(proposal.diff, asked.view)
        proposal = msgspec.structs.replace(
            proposal,
            state="applied",
            evidence=proposal.evidence + figures,
            decided_by=decided_by,
            decided_at_s=None if decided_by is None else now_s,
            applied_at_s=now_s,
            objective_before=asked.tool.verify(proposal.diff, figures, figures).before,
        )
        intent_seq = await self._book.write(
            "intent", proposal, actor, via, verdict=verdict, model=model, detail=proposal.reason
        )
        outcome = partial(self._book.write, "outcome", proposal, actor, via, intent_seq=intent_seq)
        try:
            await self._book.save(proposal)
        except StoreError as error:
            await outcome(outcome="failed", detail=str(error))
            raise
        try:
            self._do(outputs, actor, via, intent_seq)
        except Exception as error:  # whatever it is, the outcome has to be written down
            log.exception("%s of %s could not be applied", proposal.call.tool, proposal.proposal_id)
            detail = f"{type(error).__name__}: {error}"[:MAX_TEXT]
            await self._told(proposal, outcome(outcome="failed", detail=detail))
            return await self._book.save(msgspec.structs.replace(proposal, state="failed", detail=detail))
        if not any(isinstance(output, Action) for output in outputs):
            await self._told(proposal, outcome(outcome="applied"))
        if proposal.rollback_of is not None:
            await self._told(proposal, self._book.take_back(proposal.rollback_of, proposal, actor, via))
        return proposal

    async def _told(self, proposal: Proposal, writing: Awaitable[object]) -> None:
        """Write down what has happened. The change is made: that this fails must not look as if it was not."""
        try:
            await writing
        except SwarmXError as error:
            log.error("not all that became of %s could be written down: %s", proposal.proposal_id, error)

    def _do(self, outputs: Sequence[Message | Action], actor: Actor, via: Via, intent_seq: int) -> None:
        for output in outputs:
            if isinstance(output, Action):
                self._act(output, actor, via, intent_seq)
            else:
                self._post(output)

    async def _settle(self, proposal_id: str) -> None:
        if self._book.due.get(proposal_id, float("inf")) > self._clock.now_s():
            return  # decided while this waited for its turn
        proposal = await self._store.proposal(proposal_id)
        if proposal is None:  # somebody emptied the store
            del self._book.due[proposal_id]
        elif proposal.state in WAITING:
            await self._book.end(proposal, "expired", SYSTEM, proposal.via)
        else:
            await self._verify(proposal)

    async def _verify(self, proposal: Proposal) -> None:
        end = partial(self._book.end, actor=SYSTEM, via=proposal.via)
        try:
            asked = await self._asked(proposal.call)
        except ConfigError as error:  # another version applied it
            await end(proposal, "stale", detail=str(error))
            return
        if not in_force(proposal.diff.changes, asked.view):
            await end(proposal, "stale", detail="something else changed it before it could be verified")
            return
        found = asked.tool.verify(proposal.diff, proposal.evidence, figures_of(proposal.diff, asked.view))
        measured = msgspec.structs.replace(
            proposal,
            verified_at_s=self._clock.now_s(),
            objective_before=found.before,
            objective_after=found.after,
            detail=found.detail,
        )
        if found.kept:
            await end(measured, "kept", detail=found.detail)
        elif proposal.actor.type == "key" or asked.tool.effect == "irreversible":
            await end(measured, "kept", detail=f"worse, left as it is: {found.detail}")
        else:
            await self._roll_back(measured)

    async def _roll_back(self, worse: Proposal) -> None:
        await self._store.save_proposal(worse)
        now_s = self._clock.now_s()
        call = ToolCall(tool="rollback", arguments={"proposal_id": worse.proposal_id})
        asked = await self._asked(call)
        verdict = self._judge(asked, SYSTEM, "auto")
        failure = verdict.detail
        if verdict.allowed:
            undo = Proposal(
                proposal_id=new_id(),
                at_s=now_s,
                expires_at_s=now_s,
                actor=SYSTEM,
                via=worse.via,
                call=call,
                diff=asked.tool.diff(asked.args, asked.view),
                state="open",
                reason=worse.detail,
                rollback_of=worse.proposal_id,
            )
            failure = (await self._apply(undo, asked, worse.via, verdict)).detail
        if failure:
            detail = f"worse, and not rolled back: {worse.detail}; {failure}"
            await self._book.end(worse, "kept", SYSTEM, worse.via, detail=detail)

    async def _asked(self, call: ToolCall) -> _Asked:
        """Raises ConfigError for a call that is not understood, Refused for one that changes nothing."""
        understood = self.registry.understand(call)
        if not isinstance(understood.tool, ControlTool):
            raise Refused(f"{call.tool} changes nothing, so there is nothing to decide", rule="no_effect")
        view = await self._view(())
        if isinstance(understood.args, Rollback):
            named = await self._store.proposal(understood.args.proposal_id)
            view = msgspec.structs.replace(view, proposals=() if named is None else (named,))
        return _Asked(tool=understood.tool, args=understood.args, view=view)

    def _judge(self, asked: _Asked, actor: Actor, mode: Mode) -> Verdict:
        return self._guard.check(
            asked.tool,
            asked.args,
            actor=actor,
            view=asked.view,
            ledger=self._book.ledger,
            now_s=self._clock.now_s(),
            mode=mode,
        )

    async def _alone(self, work: Callable[[], Awaitable[T]]) -> T:
        async def alone() -> T:
            async with self._lock:
                return await work()

        task = asyncio.create_task(alone(), name="desk")
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return await asyncio.shield(task)

    def _finished(self, task: asyncio.Task[Any]) -> None:
        """Also takes note of the error, in case that who waited for it is gone."""
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()
