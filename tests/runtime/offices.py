"""A desk with its store, its audit log and a small world, for tests of what comes over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from swarmx.core.actions import Action
from swarmx.core.control import Actor, ControlView, Proposal, ToolCall, Via
from swarmx.core.errors import Refused
from swarmx.core.messages import Message
from swarmx.memory.control import SqliteControl
from swarmx.memory.sqlite import SqliteStore
from swarmx.runtime.desk import Desk
from swarmx.tools.guard import Guard, GuardSettings
from swarmx.tools.registry import make_registry
from tests.runtime.audits import MemoryAudit
from tests.tools.worlds import (
    CATALOGUE,
    COORDINATOR,
    OPERATOR,
    World,
    call,
    decision_about,
)

SCALE = call("scale_model", model="coder", replicas=3)
SHRINK = call("scale_model", model="coder", replicas=1)
DRAIN = call("drain_replica", replica_id="coder-1")
ROUTE = call("set_routing_policy", policy="sticky")


async def refused(work: Any) -> str:
    """The rule that the work is refused by."""
    with pytest.raises(Refused) as error:
        await work
    return error.value.rule


@dataclass(kw_only=True)
class Office:
    """A desk with a real store in a small world. `done` holds what was applied, with the actor behind each action."""

    store: SqliteStore
    world: World = field(default_factory=World)
    audit: MemoryAudit = field(default_factory=MemoryAudit)
    guard: GuardSettings = field(default_factory=GuardSettings)
    done: list[Message | Action] = field(default_factory=list)
    acted: list[tuple[Actor, Via, int]] = field(default_factory=list)
    heard: list[tuple[str, str]] = field(default_factory=list)
    asked_for: list[tuple[str, ...]] = field(default_factory=list)
    jammed: bool = False

    def __post_init__(self) -> None:
        self.control = SqliteControl(self.store)
        self.desk = self.another_desk()

    def another_desk(self, clock: Any = None) -> Desk:
        desk = Desk(
            registry=make_registry(CATALOGUE),
            guard=Guard(self.guard),
            store=self.control,
            audit=self.audit,
            view=self.view,
            post=self.post,
            act=self.act,
            clock=clock or self.world,
            verify_s=60.0 if clock is None else 0.05,
        )
        desk.on_change.append(lambda proposal: self.heard.append((proposal.proposal_id, proposal.state)))
        return desk

    async def view(self, call_ids: Sequence[str]) -> ControlView:
        self.asked_for.append(tuple(call_ids))
        return self.world.view(decisions={name: (decision_about(name),) for name in call_ids})

    def post(self, message: Message) -> None:
        if self.jammed:
            raise ValueError("the policy broke")
        self.done.append(message)
        self.world.do(message)

    def act(self, action: Action, actor: Actor, via: Via, intent_seq: int) -> None:
        """As the fleet does: acts, and writes the outcome of the intent itself."""
        self.done.append(action)
        self.acted.append((actor, via, intent_seq))
        self.world.do(action)
        intent = self.audit.records[intent_seq - 1].entry
        outcome = msgspec.structs.replace(intent, kind="outcome", intent_seq=intent_seq, outcome="applied")
        self.audit.records.append(msgspec.structs.replace(self.audit.records[-1], seq=self.audit_seq, entry=outcome))

    @property
    def audit_seq(self) -> int:
        return len(self.audit.records) + 1

    async def pass_time(self, seconds: float) -> None:
        self.world.at_s += seconds
        await self.desk.settle()

    def become_ready(self) -> None:
        for name, (_, state) in list(self.world.replicas.items()):
            if state == "starting":
                self.world.put(name, "ready")

    def trail(self) -> list[tuple[str, str | None]]:
        return [(record.entry.kind, record.entry.outcome) for record in self.audit.records]

    async def propose(self, asked: ToolCall, **more: Any) -> Proposal:
        return await self.desk.propose(asked, actor=COORDINATOR, via="coordinator", **more)

    async def order(self, asked: ToolCall, actor: Actor = OPERATOR) -> Proposal:
        return await self.desk.order(asked, actor=actor, via="cli", reason="because")

    async def approve(self, proposal: Proposal, actor: Actor = OPERATOR) -> Proposal:
        return await self.desk.approve(proposal.proposal_id, actor=actor, via="web")

    async def state(self, proposal: Proposal) -> str:
        return (await self.desk.proposal(proposal.proposal_id)).state
