"""A coordinator at a real desk over the small world of the tools, with everything kept in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import msgspec

from swarmx.core.actions import Action
from swarmx.core.audit import AuditEntry
from swarmx.core.control import Actor, AlertSeen, ControlView, Episode, Mode, Proposal, ProposalState, Via
from swarmx.core.errors import StoreError
from swarmx.core.ports import LanguageModel, VectorMemory
from swarmx.llm_coordinator.prompt import Prompts, templates_folder
from swarmx.llm_coordinator.situation import DIMENSION
from swarmx.memory.vectors import ArrayVectors
from swarmx.runtime.chooser import Chooser
from swarmx.runtime.coordinator import Coordinator, Turn
from swarmx.runtime.desk import Desk
from swarmx.tools.guard import Guard, GuardSettings
from swarmx.tools.registry import make_registry
from tests.runtime.audits import MemoryAudit
from tests.tools.worlds import CATALOGUE, World

REGISTRY = make_registry(CATALOGUE)
PROMPTS = Prompts(templates_folder())
# Without the rests between changes, which would only make tests longer.
HASTY = GuardSettings(
    cooldown_s=dict.fromkeys(REGISTRY.tools, 0.0),
    per_hour=dict.fromkeys(REGISTRY.tools, 100),
    coordinator_changes_per_hour=100,
)


class MemoryControl:
    """Implements `core.ports.ControlStore`. A test may break it."""

    def __init__(self) -> None:
        self.kept: dict[str, Proposal] = {}
        self.turns: dict[str, Episode] = {}
        self.broken = False

    def _check(self) -> None:
        if self.broken:
            raise StoreError("the disk is full")

    async def save_proposal(self, proposal: Proposal) -> None:
        self._check()
        self.kept[proposal.proposal_id] = proposal

    async def proposal(self, proposal_id: str) -> Proposal | None:
        self._check()
        return self.kept.get(proposal_id)

    async def proposals(
        self, *, states: Sequence[ProposalState] | None, limit: int, before: tuple[float, str] | None = None
    ) -> list[Proposal]:
        self._check()
        rows = (p for p in reversed(self.kept.values()) if states is None or p.state in states)
        return list(islice((p for p in rows if before is None or (p.at_s, p.proposal_id) < before), limit))

    async def save_episode(self, episode: Episode) -> None:
        self._check()
        self.turns[episode.episode_id] = episode

    async def episode(self, episode_id: str) -> Episode | None:
        self._check()
        return self.turns.get(episode_id)

    async def episodes(self, *, limit: int, before: tuple[float, str] | None = None) -> list[Episode]:
        self._check()
        rows = reversed(self.turns.values())
        return list(islice((e for e in rows if before is None or (e.at_s, e.episode_id) < before), limit))


class Office:
    """The world, the desk and the coordinator; `alerts` are what the view shows."""

    def __init__(
        self,
        model: LanguageModel | None,
        *,
        mode: Mode = "review",
        modes: Mapping[str, Mode] | None = None,
        guard: GuardSettings = HASTY,
        store: MemoryControl | None = None,
        deadline_s: float = 5.0,
        every_s: float = 3600.0,
        min_gap_s: float = 0.0,
        breaker_s: float = 900.0,
        world: World | None = None,
        vectors: VectorMemory | None = None,
    ) -> None:
        self.world = world or World()
        self.audit = MemoryAudit()
        self.store = store or MemoryControl()
        self.vectors: VectorMemory = vectors or ArrayVectors(None, DIMENSION)
        self.alerts: tuple[AlertSeen, ...] = ()
        self.blind = False
        self.stumbled = 0
        self.turns: list[Turn] = []
        self.turned = asyncio.Event()
        self._writing: list[asyncio.Future[int]] = []
        self.desk = Desk(
            registry=REGISTRY,
            guard=Guard(guard),
            store=self.store,
            audit=self.audit,
            view=self.view,
            post=self.world.do,
            act=self.act,
            clock=self.world,
            verify_s=60.0,
        )
        self.coordinator = Coordinator(
            desk=self.desk,
            overview=self.view,
            chooser=Chooser(
                model=model,
                prompts=PROMPTS,
                tools=REGISTRY.tools,
                catalogue=CATALOGUE,
                step=guard.bounds_step,
                deadline_s=deadline_s,
            ),
            vectors=self.vectors,
            store=self.store,
            audit=self.audit,
            modes=modes or {},
            mode=mode,
            clock=self.world,
            every_s=every_s,
            min_gap_s=min_gap_s,
            breaker_s=breaker_s,
            on_turn=self._turn_ended,
        )
        self.desk.on_change.append(self.coordinator.changed)

    async def view(self, call_ids: Sequence[str] = ()) -> ControlView:
        if self.blind:
            self.stumbled += 1
            raise StoreError("the view is gone")
        proposals = () if self.store.broken else tuple(reversed(await self.store.proposals(states=None, limit=20)))
        return msgspec.structs.replace(self.world.view(proposals), alerts=self.alerts)

    def act(self, action: Action, actor: Actor, via: Via, intent_seq: int) -> None:
        """As the fleet does it: the effect, and then its outcome."""
        self.world.do(action)
        entry = AuditEntry(kind="outcome", actor=actor, via=via, tool="", intent_seq=intent_seq, outcome="applied")
        self._writing.append(asyncio.ensure_future(self.audit.write(entry)))

    async def later(self, seconds: float) -> None:
        """Time passes; what is due at the desk is settled, and what the coordinator heard is written down."""
        self.world.at_s += seconds
        await self.desk.settle()
        await self.coordinator.close()
        await asyncio.gather(*self._writing)
        self._writing.clear()

    async def told(self, turns: int) -> None:
        """Wait for that many turns."""
        async with asyncio.timeout(30.0):
            while len(self.turns) < turns:
                self.turned.clear()
                await self.turned.wait()

    def notes(self) -> list[AuditEntry]:
        return [r.entry for r in self.audit.records if r.entry.kind == "note" and r.entry.proposal_id is None]

    def episode(self, turn: Turn) -> Episode:
        return self.store.turns[turn.episode_id]

    def _turn_ended(self, turn: Turn) -> None:
        self.turns.append(turn)
        self.turned.set()


async def an_office(model: LanguageModel | None, **about: Any) -> Office:
    """With its memory open."""
    office = Office(model, **about)
    await office.vectors.open()
    await office.desk.open()
    return office
