"""The coordinator's driver: wakes on an alert or by the clock, has one tool call chosen, and hands it to the desk."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Literal

import msgspec
from msgspec.structs import replace

from swarmx.core.audit import AuditEntry, ModelUse
from swarmx.core.control import Actor, ControlView, Episode, Evidence, Mode, Proposal, ToolCall
from swarmx.core.errors import Refused, StoreError, SwarmXError
from swarmx.core.messages import AlertKind, AlertRaised, Message
from swarmx.core.ports import AuditTrail, ControlStore, VectorMemory
from swarmx.llm_coordinator.situation import Trigger, embed, facts
from swarmx.runtime.chooser import Choice, Chooser
from swarmx.runtime.clock import Clock
from swarmx.runtime.desk import Desk

log = logging.getLogger(__name__)

COORDINATOR = Actor(type="coordinator", name="coordinator", role="operator")
NEAREST = 3
ROLLBACKS = 3  # own changes rolled back in a row, or
UNUSABLE = 5  # replies in a row that could not be used: then it only observes for a while
_LOOK_AT = 12  # nearest episodes that are looked at for `NEAREST` that differ
_FOLLOWED = 200  # episodes whose proposals are followed
_OPEN = frozenset({"suggested", "open", "applied"})
# The most urgent first; a breaker that closes is good news.
_WAKING: tuple[AlertKind, ...] = ("replica_failed", "breaker_opened", "policy_failed", "at_max")


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One turn, told in full. `fallback` says why the rules stood in for the model, empty when they did not.

    `outcome` is `no_op`, `observed` (the mode allows no more), `refused:RULE`, or the state of the proposal.
    """

    episode_id: str
    trigger: Trigger
    source: Literal["model", "rules"]
    fallback: str
    call: ToolCall
    reason: str
    evidence: tuple[Evidence, ...]
    episode_ids: tuple[str, ...]
    outcome: str
    proposal: Proposal | None
    replies: int
    prompt_tokens: int
    output_tokens: int
    model_s: float


class Coordinator:
    """Never in the way of a call: it reads a snapshot, and all that it can do is hand the desk a tool call.

    Turns come one at a time, `min_gap_s` apart at least and `every_s` at most; alerts during one are taken together
    into the next. `mode` is for the tools that `modes` does not name. `observe` is to be registered with the
    switchboard, `changed` with the desk.
    """

    def __init__(
        self,
        *,
        desk: Desk,
        overview: Callable[[Sequence[str]], Awaitable[ControlView]],
        chooser: Chooser,
        vectors: VectorMemory,
        store: ControlStore,
        audit: AuditTrail,
        modes: Mapping[str, Mode],
        mode: Mode,
        clock: Clock,
        every_s: float,
        min_gap_s: float,
        breaker_s: float,
        on_turn: Callable[[Turn], None] | None = None,
    ) -> None:
        self._desk = desk
        self._overview = overview
        self._chooser = chooser
        self._vectors = vectors
        self._store = store
        self._audit = audit
        self._modes = dict(modes)
        self._mode = mode
        self._clock = clock
        self._every_s = every_s
        self._min_gap_s = min_gap_s
        self._breaker_s = breaker_s
        self._on_turn = on_turn
        self._wake = asyncio.Event()
        self._alerts: set[AlertKind] = set()
        self._turning = asyncio.Lock()
        self._saving = asyncio.Lock()
        self._followed: dict[str, Episode] = {}  # by proposal
        self._heard: dict[str, Proposal] = {}  # what the desk said during the turn that is on
        self._tasks: set[asyncio.Task[None]] = set()
        self._rollbacks = 0
        self._unusable = 0
        self._observes_until_s: float | None = None

    def observe(self, message: Message, now_s: float) -> None:
        """Be woken by an alert."""
        if isinstance(message, AlertRaised) and message.kind in _WAKING:
            self._alerts.add(message.kind)
            self._wake.set()

    def changed(self, proposal: Proposal) -> None:
        """Remember what became of an own proposal; three that were rolled back in a row trip the breaker."""
        if self._turning.locked():
            self._heard[proposal.proposal_id] = proposal
        episode = self._followed.get(proposal.proposal_id)
        if episode is None or episode.outcome == proposal.state:
            return
        self._follow(_updated(episode, proposal))
        self._background(self._remember(self._followed[proposal.proposal_id]))
        match proposal.state:
            case "rolled_back":
                self._rollbacks += 1
                if self._rollbacks >= ROLLBACKS:
                    self._trip(f"{self._rollbacks} changes in a row were rolled back")
            case "kept":
                self._rollbacks = 0
            case _:
                pass

    def mode_of(self, tool: str) -> Mode:
        """What it may do now with this tool."""
        return "observe" if self.observes_until_s is not None else self._modes.get(tool, self._mode)

    @property
    def observes_until_s(self) -> float | None:
        """How long the breaker makes it only observe (Unix seconds); None while it does not."""
        until_s = self._observes_until_s
        return until_s if until_s is not None and self._clock.now_s() < until_s else None

    async def run(self) -> None:
        """Turn after turn; a turn that fails is logged, and the next one comes."""
        await self._resume()
        while True:
            trigger = await self._next()
            try:
                await self.turn(trigger)
            except Exception:
                log.exception("a turn of the coordinator failed (woken by %s)", trigger)
            await asyncio.sleep(self._min_gap_s)

    async def close(self) -> None:
        """Finish what is being written down."""
        await asyncio.gather(*self._tasks)

    async def turn(self, trigger: Trigger) -> Turn:
        """One turn now. Raises StoreError when the state of things cannot be read."""
        async with self._turning:
            turn = await self._turn(trigger)
        stood_in = f" ({turn.fallback})" if turn.fallback else ""
        tokens = f"{turn.prompt_tokens} + {turn.output_tokens} tokens"
        asked = f" after {turn.replies} replies, {tokens}, {turn.model_s:.3g} s" if turn.replies else ""
        done = f"{turn.call.tool} by {turn.source}{stood_in}{asked}"
        log.info("coordinator, woken by %s: %s: %s", turn.trigger, done, turn.outcome)
        if self._on_turn is not None:
            self._on_turn(turn)
        return turn

    async def _turn(self, trigger: Trigger) -> Turn:
        view = await self._overview(())
        situation, aliases = self._chooser.situation(view, trigger)
        vector = embed(situation)
        nearest = await self._nearest(vector)
        chosen = await self._chooser.choose(view, situation, aliases, nearest)
        self._count(chosen)
        likeness = tuple(
            Evidence(metric=f"like_before:{e.call.tool}:{e.outcome}", subject=e.episode_id, value=round(similarity, 3))
            for e, similarity in nearest
        )
        episode = Episode(
            episode_id=uuid.uuid4().hex,
            at_s=view.at_s,
            trigger=trigger,
            source=chosen.source,
            facts=facts(situation),
            vector=vector,
            call=chosen.call,
            reason=chosen.reason,
            proposal_id=None,
        )
        await self._remember(episode, new=True)
        turn = Turn(
            episode_id=episode.episode_id,
            trigger=trigger,
            source=chosen.source,
            fallback=chosen.fallback,
            call=chosen.call,
            reason=chosen.reason,
            evidence=chosen.evidence + likeness,
            episode_ids=tuple(e.episode_id for e, _ in nearest),
            outcome="pending",
            proposal=None,
            replies=len(chosen.replies),
            prompt_tokens=sum(reply.prompt_tokens for reply in chosen.replies),
            output_tokens=sum(reply.output_tokens for reply in chosen.replies),
            model_s=sum(reply.seconds for reply in chosen.replies),
        )
        outcome, proposal = await self._propose(turn, chosen.model)
        episode = replace(episode, outcome=outcome)
        if proposal is not None:
            episode = _updated(replace(episode, proposal_id=proposal.proposal_id), proposal)
            self._follow(episode)
        await self._remember(episode)
        return replace(turn, outcome=outcome, proposal=proposal)

    async def _propose(self, turn: Turn, model: ModelUse | None) -> tuple[str, Proposal | None]:
        if turn.call.tool == "no_op":
            return "no_op", None
        mode = self.mode_of(turn.call.tool)
        if mode == "observe":
            return "observed", None
        self._heard.clear()
        try:
            proposal = await self._desk.propose(
                turn.call,
                actor=COORDINATOR,
                via="coordinator",
                reason=turn.reason,
                evidence=turn.evidence,
                episode_ids=turn.episode_ids,
                mode=mode,
                model=model,
            )
        except Refused as error:
            return f"refused:{error.rule}", None
        except SwarmXError as error:
            log.warning("the desk does not take %s of the coordinator: %s", turn.call.tool, error)
            return f"refused:{type(error).__name__}", None
        proposal = self._heard.get(proposal.proposal_id, proposal)  # somebody may have decided already
        return proposal.state, proposal

    async def _nearest(self, vector: Sequence[float]) -> list[tuple[Episode, float]]:
        """The nearest episodes that differ in what was done and how it ended; none when memory fails."""
        found: dict[tuple[str, str], tuple[Episode, float]] = {}
        try:
            for key, similarity, _ in await self._vectors.nearest(vector, _LOOK_AT):
                episode = await self._store.episode(key)
                if episode is not None and episode.outcome != "pending":
                    found.setdefault((episode.call.tool, episode.outcome), (episode, similarity))
        except StoreError as error:
            log.warning("the coordinator goes on without its memory: %s", error)
        return list(found.values())[:NEAREST]

    async def _remember(self, episode: Episode, *, new: bool = False) -> None:
        try:
            async with self._saving:
                await self._store.save_episode(episode)
                if new:
                    await self._vectors.add(episode.episode_id, episode.vector, episode.facts)
        except StoreError as error:
            log.warning("an episode of the coordinator is lost: %s", error)

    async def _resume(self) -> None:
        """Follow the proposals of an earlier life."""
        try:
            for episode in reversed(await self._store.episodes(limit=_FOLLOWED)):
                if episode.proposal_id is not None and episode.outcome in _OPEN:
                    self._follow(episode)
                    proposal = await self._store.proposal(episode.proposal_id)
                    if proposal is not None:  # it may have ended while nobody followed it
                        self.changed(proposal)
        except StoreError as error:
            log.warning("the coordinator goes on without its memory: %s", error)

    async def _next(self) -> Trigger:
        try:
            async with asyncio.timeout(self._every_s):
                await self._wake.wait()
        except TimeoutError:
            return "timer"
        self._wake.clear()
        alerts, self._alerts = self._alerts, set()
        return next(kind for kind in _WAKING if kind in alerts)

    def _count(self, chosen: Choice) -> None:
        """Replies that came and could not be used, in a row, trip the breaker."""
        self._unusable += chosen.unusable
        if self._unusable >= UNUSABLE:
            self._trip(f"{self._unusable} replies in a row could not be used")
        if chosen.source == "model":
            self._unusable = 0

    def _follow(self, episode: Episode) -> None:
        if episode.proposal_id is not None:
            self._followed[episode.proposal_id] = episode
            while len(self._followed) > _FOLLOWED:
                self._followed.pop(next(iter(self._followed)))

    def _trip(self, why: str) -> None:
        self._rollbacks = self._unusable = 0
        self._observes_until_s = self._clock.now_s() + self._breaker_s
        note = f"{why}: the coordinator only observes for {self._breaker_s:g} s."
        log.warning("%s", note)
        self._background(self._note(note))

    async def _note(self, detail: str) -> None:
        entry = AuditEntry(
            kind="note", actor=COORDINATOR, via="coordinator", tool="no_op", effect="read", detail=detail
        )
        try:
            await self._audit.write(entry)
        except StoreError as error:
            log.error("the audit log does not take a note of the coordinator: %s", error)

    def _background(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _updated(episode: Episode, proposal: Proposal) -> Episode:
    return replace(
        episode,
        outcome=proposal.state,
        objective_before=proposal.objective_before,
        objective_after=proposal.objective_after,
    )
