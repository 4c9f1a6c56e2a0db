"""Whoever runs a workflow no longer tells its agents; what a store reported as failed and did counts as done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from swarmx.agents.router import RouterAgent
from swarmx.core.actions import StartTimer
from swarmx.core.errors import StoreError
from swarmx.core.messages import Message, TimerFired, WorkflowEnded, WorkflowSubmitted
from swarmx.core.records import Accepted, Commit, Committed, Idempotency, WorkflowRecord
from swarmx.memory.sqlite import SqliteStore
from swarmx.runtime.workflows import WorkflowRunner
from swarmx.workflows.spec import parse_workflow
from tests.runtime.runners import ONE, EchoModel, FixedClock, Start, terminal_events

HANGS = frozenset({"only"})


async def begun(runner: WorkflowRunner, model: EchoModel) -> str:
    workflow_id = await runner.submit(parse_workflow(ONE), {}, "a")
    await model.hanging.wait()
    return workflow_id


def left(workflow_id: str) -> WorkflowEnded:
    return WorkflowEnded(workflow_id=workflow_id, state="left")


async def until_told(heard: Sequence[Message], count: int) -> None:
    while len(heard) < count:
        await asyncio.sleep(0.001)


async def test_agents_hear_that_a_workflow_left_with_the_lease(store: SqliteStore, start: Start) -> None:
    heard: list[Message] = []
    changes: list[str] = []
    model = EchoModel(hung=HANGS)
    runner = start(model, post=heard.append, on_change=changes.append, lease_s=0.3)
    workflow_id = await begun(runner, model)
    changes.clear()
    await store.enlist("successor", ttl_s=60.0, exclusive=True)
    await until_told(heard, 2)
    assert heard[1:] == [left(workflow_id)]
    assert changes == [workflow_id], "whoever waits for it here looks again"
    await runner.close()
    assert heard[1:] == [left(workflow_id)], "once"


async def test_a_workflow_that_is_taken_up_again_left_and_came_back(store: SqliteStore, start: Start) -> None:
    heard: list[Message] = []
    model = EchoModel(hung=HANGS)
    runner = start(model, post=heard.append, exclusive=False, lease_s=3.0)
    workflow_id = await begun(runner, model)
    await store.enlist("alone", ttl_s=0.0, exclusive=True)
    await until_told(heard, 3)
    assert heard[1] == left(workflow_id)
    assert isinstance(heard[2], WorkflowSubmitted)
    assert heard[2].submitted_at_s is not None
    await runner.cancel(workflow_id, "a")
    assert heard[3:] == [WorkflowEnded(workflow_id=workflow_id, state="cancelled")], "its first life says nothing more"


@pytest.mark.parametrize("way", ["taken", "killed"])
async def test_a_workflow_that_another_server_took_leaves_the_demand_of_this_one(
    store: SqliteStore, start: Start, way: str
) -> None:
    agent, clock = RouterAgent(), FixedClock()
    timers: list[str] = []

    def post(message: Message) -> None:
        timers.extend(output.key for output in agent.handle(message, clock.now_s()) if isinstance(output, StartTimer))

    model = EchoModel(hung=HANGS)
    runner = start(model, post=post, exclusive=False)
    workflow_id = await begun(runner, model)
    other = start(EchoModel(hung=HANGS), exclusive=False)
    if way == "killed":
        await other.kill(workflow_id, "a")
    else:
        await store.take(workflow_id, await store.enlist("other", ttl_s=60.0, exclusive=False))
    runner.posted(workflow_id)
    await runner.wait(workflow_id, "a")
    assert runner.running == 0
    assert timers, "demand is reported as long as something runs"
    again: list[StartTimer] = []
    for _ in range(3):  # the last report is the one that says that there is nothing
        clock.time_s += 60.0
        outputs = agent.handle(TimerFired(key=timers[-1]), clock.now_s())
        again = [output for output in outputs if isinstance(output, StartTimer)]
    assert again == [], "no ghost keeps the reports going"


class Doubtful(SqliteStore):
    """A store that does what it is asked and says that it failed, as often as it is told to."""

    lies = 0
    refuses = 0

    async def commit(self, change: Commit) -> Committed:
        if self.refuses:
            self.refuses -= 1
            raise StoreError("disk full")
        done = await super().commit(change)
        self._maybe_lie()
        return done

    async def post(self, workflow_id: str, body: bytes, *, dedup: str, tenant: str | None) -> bool:
        new = await super().post(workflow_id, body, dedup=dedup, tenant=tenant)
        self._maybe_lie()
        return new

    async def accept(
        self, workflow: WorkflowRecord, events: Sequence[bytes], *, idempotency: Idempotency | None = None
    ) -> Accepted:
        accepted = await super().accept(workflow, events, idempotency=idempotency)
        self._maybe_lie()
        return accepted

    def _maybe_lie(self) -> None:
        if self.lies:
            self.lies -= 1
            raise StoreError("answer lost")


@pytest.fixture
async def doubtful(store: SqliteStore, tmp_path: Path) -> AsyncIterator[Doubtful]:
    opened = Doubtful(tmp_path / "swarmx.db")
    await opened.open()
    yield opened
    await opened.close()


async def test_a_kill_that_was_stored_and_reported_as_failed_is_told_once(start: Start, doubtful: Doubtful) -> None:
    heard: list[Message] = []
    changes: list[str] = []
    model = EchoModel(hung=HANGS)
    runner = start(model, store=doubtful, post=heard.append, on_change=changes.append)
    workflow_id = await begun(runner, model)
    changes.clear()
    doubtful.lies = 1
    with pytest.raises(StoreError, match="answer lost"):
        await runner.kill(workflow_id, "a")
    assert (await runner.wait(workflow_id, "a")).state == "cancelled"
    await until_told(heard, 2)
    assert (await runner.kill(workflow_id, "a")).state == "cancelled"
    await runner.close()
    assert heard[1:] == [WorkflowEnded(workflow_id=workflow_id, state="cancelled")]
    assert changes == [workflow_id]
    assert model.cancelled == ["only"]


async def test_a_kill_that_was_not_stored_is_not_told(start: Start, doubtful: Doubtful) -> None:
    heard: list[Message] = []
    model = EchoModel(hung=HANGS)
    runner = start(model, store=doubtful, post=heard.append)
    workflow_id = await begun(runner, model)
    doubtful.refuses = 1
    with pytest.raises(StoreError, match="disk full"):
        await runner.kill(workflow_id, "a")
    assert (await runner.kill(workflow_id, "a")).state == "cancelled"
    await runner.close()
    assert heard[1:] == [WorkflowEnded(workflow_id=workflow_id, state="cancelled")]
    assert await terminal_events(doubtful, workflow_id) == ["Cancelled"]


async def test_a_cancel_that_was_stored_and_reported_as_failed_is_carried_out(start: Start, doubtful: Doubtful) -> None:
    heard: list[Message] = []
    model = EchoModel(hung=HANGS)
    runner = start(model, store=doubtful, post=heard.append)
    workflow_id = await begun(runner, model)
    doubtful.lies = 1
    with pytest.raises(StoreError, match="answer lost"):
        await runner.cancel(workflow_id, "a")
    assert (await runner.wait(workflow_id, "a")).state == "cancelled"
    assert heard[1:] == [WorkflowEnded(workflow_id=workflow_id, state="cancelled")]


async def test_a_workflow_that_was_stored_and_reported_as_failed_runs(start: Start, doubtful: Doubtful) -> None:
    heard: list[Message] = []
    runner = start(EchoModel(), store=doubtful, post=heard.append)
    doubtful.lies = 1
    with pytest.raises(StoreError, match="answer lost"):
        await runner.submit(parse_workflow(ONE), {}, "a")
    await until_told(heard, 2)
    (record,) = (await doubtful.workflows(tenant="a", state=None, limit=9, cursor=None)).workflows
    assert (record.state, heard[1]) == (
        "finished", WorkflowEnded(workflow_id=record.workflow_id, state="finished")
    )  # fmt: skip
