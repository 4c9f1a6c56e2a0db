"""The console over the real desk, guard, tools, audit log and database: answers, proposals, refusals, the model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from msgspec.structs import replace

from swarmx.core.actions import Action
from swarmx.core.audit import AuditEntry
from swarmx.core.control import Actor, ControlView, Reply, Via
from swarmx.core.errors import ConfigError, StoreError
from swarmx.core.messages import Message
from swarmx.core.ports import LanguageModel
from swarmx.llm_coordinator.prompt import templates_folder
from swarmx.memory.audit import AuditLog, verify_files
from swarmx.memory.control import SqliteControl
from swarmx.memory.sqlite import SqliteStore
from swarmx.runtime.console import Console, ConsoleEvent, Done, Failed, Proposed, Shown, Told
from swarmx.runtime.desk import Desk
from swarmx.runtime.sentence_reader import SentenceReader
from swarmx.tools.guard import Guard
from tests.llm_coordinator.scripted import ScriptedModel, says
from tests.llm_coordinator.views import CATALOGUE, REGISTRY, a_model, a_view

OPERATOR = Actor(type="key", name="ada", role="operator")
VIEWER = Actor(type="key", name="vic", role="viewer")
CALM = a_model("coder", failed=0, wait_p95_s=0.0, max_replicas=4)


@dataclass(slots=True)
class Stopped:
    now: float = 10_000.0

    def now_s(self) -> float:
        return self.now


@dataclass(slots=True, kw_only=True)
class World:
    """A console, and what reaches the fleet from it."""

    console: Console
    desk: Desk
    audit: AuditLog
    folder: Path
    view: ControlView
    posted: list[Message] = field(default_factory=list)
    asked_for: list[tuple[str, ...]] = field(default_factory=list)
    broken: bool = False

    async def look(self, call_ids: Sequence[str]) -> ControlView:
        if self.broken:
            raise StoreError("the disk is full")
        self.asked_for.append(tuple(call_ids))
        return replace(self.view, proposals=tuple(await self.desk.proposals()))

    async def ask(self, text: str, actor: Actor = OPERATOR) -> list[ConsoleEvent]:
        return [event async for event in self.console.answer(text, actor=actor, via="console")]

    async def said(self, text: str, actor: Actor = OPERATOR) -> str:
        return "\n".join(event.text for event in await self.ask(text, actor) if isinstance(event, Told))

    def with_model(self, model: LanguageModel) -> None:
        reader = SentenceReader(
            model=model, registry=REGISTRY, catalogue=CATALOGUE, templates=templates_folder(), deadline_s=5.0
        )
        self.console = a_console(self, reader)


def a_console(world: World, reader: SentenceReader | None) -> Console:
    return Console(
        overview=world.look,
        desk=world.desk,
        audit=world.audit,
        check=partial(asyncio.to_thread, verify_files, world.folder),
        policies=CATALOGUE.policies,
        reader=reader,
    )


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    clock = Stopped()
    store = SqliteStore(tmp_path / "swarmx.db")
    audit = AuditLog(tmp_path / "audit.jsonl", clock=clock.now_s)
    await store.open()
    await audit.open()

    def no_action(action: Action, actor: Actor, via: Via, intent_seq: int) -> None:
        raise AssertionError(action)

    found: World
    posted: list[Message] = []
    desk = Desk(
        registry=REGISTRY,
        guard=Guard(),
        store=SqliteControl(store),
        audit=audit,
        view=lambda call_ids: found.look(call_ids),
        post=posted.append,
        act=no_action,
        clock=clock,
    )
    await desk.open()
    unset: Console = None  # type: ignore[assignment]  # set in the next statements
    found = World(console=unset, desk=desk, audit=audit, folder=tmp_path, view=a_view(CALM), posted=posted)
    found.console = a_console(found, None)
    yield found
    await desk.close()
    await audit.close()
    await store.close()


async def test_a_question_is_answered_with_evidence_and_an_end(world: World) -> None:
    events = await world.ask("why is coder slow?")
    assert isinstance(events[0], Told)
    assert "coder is not slow" in events[0].text
    assert any(isinstance(e, Shown) and e.evidence.metric == "p95_s" for e in events)
    assert events[-1] == Done()
    assert sum(isinstance(e, Done) for e in events) == 1


async def test_an_order_becomes_a_proposal_and_changes_nothing(world: World) -> None:
    events = await world.ask("set bounds of coder to 1..3")
    (proposed,) = [e.proposal for e in events if isinstance(e, Proposed)]
    assert proposed.state == "open"
    assert (proposed.actor, proposed.via, proposed.reason) == (OPERATOR, "console", "set bounds of coder to 1..3")
    assert [(c.subject, c.before, c.after) for c in proposed.diff.changes]
    assert world.posted == []
    assert await world.desk.proposal(proposed.proposal_id) == proposed
    assert f"swarmx proposals approve {proposed.proposal_id}" in text_of(events)
    assert proposed.proposal_id in await world.said("show proposals")


def text_of(events: list[ConsoleEvent]) -> str:
    return "\n".join(event.text for event in events if isinstance(event, Told))


async def test_an_approved_proposal_can_be_undone_by_a_sentence(world: World) -> None:
    (proposed,) = [e.proposal for e in await world.ask("set bounds of coder to 1..3") if isinstance(e, Proposed)]
    await world.desk.approve(proposed.proposal_id, actor=OPERATOR, via="web")
    assert len(world.posted) == 1
    status = replace(CALM, min_replicas=1, max_replicas=3)
    world.view = replace(world.view, models={"coder": status})
    (undo,) = [e.proposal for e in await world.ask("undo the last change") if isinstance(e, Proposed)]
    assert undo.call.arguments == {"proposal_id": proposed.proposal_id}
    assert len(world.posted) == 1


async def test_a_viewer_may_ask_and_not_order(world: World) -> None:
    assert "coder is not slow" in await world.said("why is coder slow?", VIEWER)
    events = await world.ask("set bounds of coder to 1..3", VIEWER)
    assert any(isinstance(e, Failed) for e in events)
    assert not any(isinstance(e, Proposed) for e in events)
    assert await world.desk.proposals() == []


async def test_an_order_out_of_bounds_is_refused_with_the_reason(world: World) -> None:
    events = await world.ask("scale coder to -1")
    (failed,) = [e for e in events if isinstance(e, Failed)]
    assert "replicas" in failed.detail
    events = await world.ask("set bounds of coder to 1..100")
    (failed,) = [e for e in events if isinstance(e, Failed)]
    assert failed.rule
    assert await world.desk.proposals(states=("open",)) == []


async def test_what_changed_reads_the_audit_log_page_by_page(world: World) -> None:
    note = AuditEntry(kind="note", actor=OPERATOR, via="rest", tool="early", outcome="refused")
    await world.audit.write(note)
    filler = replace(note, tool="late")
    await asyncio.gather(*(world.audit.write(filler) for _ in range(1100)))
    events = await world.ask("what changed in the last ten minutes?")
    counted = [e.evidence.value for e in events if isinstance(e, Shown) and e.evidence.metric == "control_actions"]
    assert counted == [1101]


async def test_who_scaled_reads_the_audit_log(world: World) -> None:
    (proposed,) = [e.proposal for e in await world.ask("set bounds of coder to 1..3") if isinstance(e, Proposed)]
    await world.desk.approve(proposed.proposal_id, actor=OPERATOR, via="web")
    assert "ada (operator, by web) set_replica_bounds" in await world.said("who scaled coder?")


async def test_the_audit_log_is_checked_on_demand(world: World) -> None:
    await world.audit.write(AuditEntry(kind="note", actor=OPERATOR, via="rest", tool="no_op"))
    assert "The audit log is intact: 1 records" in await world.said("is the audit intact?")
    path = world.folder / "audit.jsonl"
    path.write_bytes(path.read_bytes().replace(b"ada", b"eve"))
    assert "NOT as it was written" in await world.said("is the audit intact?")


async def test_a_question_about_a_call_asks_for_its_decisions(world: World) -> None:
    assert "No decision about a call call-1" in await world.said("why call-1?")
    assert world.asked_for[-1] == ("call-1",)


async def test_a_text_that_is_too_long_is_refused_before_anything_is_looked_at(world: World) -> None:
    events = await world.ask("x" * 2001)
    assert [type(e) for e in events] == [Failed, Done]
    assert world.asked_for == []


async def test_a_failing_store_is_an_event_and_not_an_exception(world: World) -> None:
    world.broken = True
    assert await world.ask("status") == [Failed(detail="the disk is full"), Done()]


async def test_without_a_model_what_is_unknown_is_answered_with_examples(world: World) -> None:
    assert "I do not understand that" in await world.said("write a poem about bees")


async def test_with_a_model_its_tool_call_is_treated_like_an_order(world: World) -> None:
    with ScriptedModel(says("set_replica_bounds", model="coder", min_replicas=1, max_replicas=3, reason="x")) as model:
        world.with_model(model)
        events = await world.ask("I'd rather see no more than three of those coder machines, and one at least")
    (proposed,) = [e.proposal for e in events if isinstance(e, Proposed)]
    assert proposed.call.arguments == {"model": "coder", "min_replicas": 1, "max_replicas": 3}
    assert proposed.state == "open"
    assert world.posted == []
    (record,) = await world.audit.tail(limit=1)
    assert record.entry.model is not None
    assert record.entry.model.name == "scripted"


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (says("inspect_model", model="coder", reason="x"), "coder: 2 ready"),
        (says("inspect_cluster", reason="x"), "replicas of 1 models are ready"),
        (says("why_decision", call_id="call-1", reason="x"), "No decision about a call call-1"),
        (says("no_op", reason="x"), "I do not understand that"),
        (says("delete_everything", reason="x"), "I do not understand that"),
        (says("drain_replica", replica_id="nobody-0", reason="x"), "I do not understand that"),
        (says("rollback", proposal_id="pr-1", reason="x"), "I do not understand that"),
        (Reply(text="Sure! Here is a poem."), "I do not understand that"),
        (Reply(error="too_long"), "I do not understand that"),
        (RuntimeError("broken client"), "I do not understand that"),
    ],
)
async def test_what_a_model_says_is_a_question_of_ours_or_nothing(
    world: World, reply: Reply | Exception, words: str
) -> None:
    with ScriptedModel(reply) as model:
        world.with_model(model)
        assert words in await world.said("blah blah blah")
    assert await world.desk.proposals() == []


async def test_the_model_is_not_asked_what_the_patterns_know(world: World) -> None:
    with ScriptedModel() as model:
        world.with_model(model)
        await world.ask("why is coder slow?")
        await world.ask("set bounds of coder to 1..3")
        await world.ask("drain nothing")
        await world.ask("  ")


async def test_the_models_prompt_has_the_sentence_and_names_and_nothing_else(world: World) -> None:
    with ScriptedModel(says("no_op", reason="x")) as model:
        world.with_model(model)
        await world.ask("a sentence of mine")
    (prompt,) = model.asked
    assert prompt.user == "a sentence of mine"
    assert "Models: coder.\nReplicas: coder-0, coder-1.\nChanges in force: none." in prompt.system
    assert {t["function"]["name"] for t in prompt.tools} == set(REGISTRY.tools) - {"rollback"}  # nothing to roll back


def test_a_folder_without_the_prompt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="console"):
        SentenceReader(
            model=ScriptedModel(), registry=REGISTRY, catalogue=CATALOGUE, templates=tmp_path, deadline_s=1.0
        )
