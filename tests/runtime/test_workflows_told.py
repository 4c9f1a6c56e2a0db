"""What agents hear of workflows: each begins once in each life of the server, and ends once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from swarmx.core.errors import StoreError
from swarmx.core.messages import Message, WorkflowEnded, WorkflowSubmitted
from swarmx.core.records import Commit, Committed, ModelRequest, ModelResult, WorkflowRecord
from swarmx.memory.sqlite import SqliteStore
from swarmx.workflows.spec import parse_workflow
from tests.runtime.runners import CHAIN, ONE, TWO, EchoModel, FixedClock, Start, refusal


class ForgetfulStore(SqliteStore):
    """The store behind `path`, whose answers to `commit` are lost, or never come, as often as it is told to."""

    unanswered = 0
    defects = 0
    full = False

    async def commit(self, change: Commit) -> Committed:
        if self.defects:
            self.defects -= 1
            raise RuntimeError("a defect")
        if self.full:
            raise StoreError("disk full")
        done = await super().commit(change)
        if change.state is not None and self.unanswered:
            self.unanswered -= 1
            raise StoreError("answer lost")
        return done


@pytest.fixture
async def forgetful(store: SqliteStore, tmp_path: Path) -> AsyncIterator[ForgetfulStore]:
    opened = ForgetfulStore(tmp_path / "swarmx.db")
    await opened.open()
    yield opened
    await opened.close()


async def test_agents_hear_of_a_workflow_before_its_first_call_and_once_of_its_end(start: Start) -> None:
    heard: list[Message] = []
    clock = FixedClock()

    def answer(request: ModelRequest) -> ModelResult:
        assert heard == [WorkflowSubmitted(workflow_id=request.workflow_id, kind="test")]
        clock.time_s += 2.0
        return EchoModel().result(request, "c")

    latencies_s: list[float] = []
    model = EchoModel(answers={"plan": answer})
    runner = start(model, clock, post=heard.append, on_latency=latencies_s.append)
    workflow_id = await runner.submit(parse_workflow(CHAIN), {"topic": "bees"}, "a")
    assert (await runner.wait(workflow_id, "a")).state == "finished"
    assert heard[1:] == [WorkflowEnded(workflow_id=workflow_id, state="finished")]
    assert latencies_s == [2.0]


async def test_agents_hear_once_of_a_cancelled_workflow_and_its_time_says_nothing(start: Start) -> None:
    heard: list[Message] = []
    latencies_s: list[float] = []
    model = EchoModel(hung=frozenset({"a", "b"}))
    runner = start(model, post=heard.append, on_latency=latencies_s.append)
    workflow_id = await runner.submit(parse_workflow(TWO), {}, "a")
    await model.hanging.wait()
    await asyncio.gather(runner.cancel(workflow_id, "a"), runner.cancel(workflow_id, "a"))
    assert heard[1:] == [WorkflowEnded(workflow_id=workflow_id, state="cancelled")]
    assert latencies_s == []


async def test_agents_hear_once_of_a_failed_workflow(start: Start) -> None:
    heard: list[Message] = []
    latencies_s: list[float] = []
    model = EchoModel(answers={"a": refusal("no_replica")}, hung=frozenset({"b"}))
    runner = start(model, post=heard.append, on_latency=latencies_s.append)
    workflow_id = await runner.submit(parse_workflow(TWO), {}, "a")
    await runner.wait(workflow_id, "a")
    assert heard[1:] == [WorkflowEnded(workflow_id=workflow_id, state="failed")]
    assert len(latencies_s) == 1


async def test_agents_hear_of_a_workflow_in_each_life_of_the_server_but_once_of_its_end(start: Start) -> None:
    lives: list[list[Message]] = [[], []]
    model = EchoModel(hung=frozenset({"only"}))
    runner = start(model, post=lives[0].append)
    workflow_id = await runner.submit(parse_workflow(ONE), {}, "a")
    await model.hanging.wait()
    await runner.close()
    again = start(EchoModel(), post=lives[1].append)
    await again.recover()
    await again.wait(workflow_id, "a")
    assert await again.recover() == 0
    submitted = WorkflowSubmitted(workflow_id=workflow_id, kind="default")
    resumed = WorkflowSubmitted(workflow_id=workflow_id, kind="default", submitted_at_s=FixedClock().time_s)
    left, ended = (WorkflowEnded(workflow_id=workflow_id, state=state) for state in ("left", "finished"))
    assert lives == [[submitted, left], [resumed, ended]]


async def test_an_end_whose_answer_was_lost_is_told_once(start: Start, forgetful: ForgetfulStore) -> None:
    heard: list[Message] = []
    forgetful.unanswered = 1
    runner = start(EchoModel(), store=forgetful, post=heard.append)
    workflow_id = await runner.submit(parse_workflow(ONE), {}, "a")
    assert (await runner.wait(workflow_id, "a")).state == "finished"
    assert heard[1:] == [WorkflowEnded(workflow_id=workflow_id, state="finished")]


async def test_a_workflow_that_ran_into_a_defect_is_told_to_have_failed(
    start: Start, forgetful: ForgetfulStore
) -> None:
    heard: list[Message] = []
    forgetful.defects = 1
    runner = start(EchoModel(), store=forgetful, post=heard.append)
    workflow_id = await runner.submit(parse_workflow(ONE), {}, "a")
    assert (await runner.wait(workflow_id, "a")).state == "failed"
    assert heard[1:] == [WorkflowEnded(workflow_id=workflow_id, state="failed")]


async def test_an_end_that_is_not_stored_is_not_told(start: Start, forgetful: ForgetfulStore) -> None:
    heard: list[Message] = []
    forgetful.defects, forgetful.full = 1, True
    runner = start(EchoModel(), store=forgetful, post=heard.append)
    workflow_id = await runner.submit(parse_workflow(ONE), {}, "a")
    assert (await runner.wait(workflow_id, "a")).state == "running"
    assert heard[1:] == [WorkflowEnded(workflow_id=workflow_id, state="left")]


async def test_an_unreadable_workflow_is_told_to_have_failed(store: SqliteStore, start: Start) -> None:
    heard: list[Message] = []
    record = WorkflowRecord(
        workflow_id="bad", tenant="a", mode="declared", kind="k", name="n", state="running", created_at_s=0.0
    )
    await store.accept(record, [b'{"v": 1, "event": {"type": "FromNowhere"}}'])
    assert await start(EchoModel(), post=heard.append).recover() == 0
    assert heard == [WorkflowEnded(workflow_id="bad", state="failed")]


async def test_of_two_runners_with_one_workflow_only_the_one_that_ends_it_says_so(
    store: SqliteStore, start: Start
) -> None:
    hold = asyncio.Event()

    async def late(request: ModelRequest) -> ModelResult:
        await hold.wait()
        return EchoModel().result(request, "late")

    heard: list[Message] = []
    slow = start(EchoModel(answers={"only": late}), post=heard.append)
    workflow_id = await slow.submit(parse_workflow(ONE), {}, "a")
    while len(await store.events(workflow_id)) < 2:
        await asyncio.sleep(0)
    other = start(EchoModel(), post=heard.append)
    await other.recover()
    await other.wait(workflow_id, "a")
    hold.set()
    await slow.wait(workflow_id, "a")
    while slow.running:
        await asyncio.sleep(0)
    ended, left = (WorkflowEnded(workflow_id=workflow_id, state=state) for state in ("finished", "left"))
    assert heard[2:] == [ended, left]


async def test_a_defect_after_the_workflow_ended_elsewhere_is_no_second_end(
    store: SqliteStore, start: Start, forgetful: ForgetfulStore
) -> None:
    hold = asyncio.Event()

    async def late(request: ModelRequest) -> ModelResult:
        await hold.wait()
        return EchoModel().result(request, "late")

    heard: list[Message] = []
    slow = start(EchoModel(answers={"only": late}), store=forgetful, post=heard.append)
    workflow_id = await slow.submit(parse_workflow(ONE), {}, "a")
    while len(await store.events(workflow_id)) < 2:
        await asyncio.sleep(0)
    other = start(EchoModel())
    await other.recover()
    await other.wait(workflow_id, "a")
    forgetful.defects = 1
    hold.set()
    await slow.wait(workflow_id, "a")
    assert heard[1:] == [WorkflowEnded(workflow_id=workflow_id, state="left")]


async def test_agents_that_raise_do_not_hurt_a_workflow(start: Start) -> None:
    def raises(heard: object) -> None:
        raise RuntimeError("listener")

    runner = start(EchoModel(), post=raises, on_latency=raises)
    workflow_id = await runner.submit(parse_workflow(ONE), {}, "a")
    assert (await runner.wait(workflow_id, "a")).state == "finished"


async def test_each_of_many_workflows_is_told_to_begin_once_and_to_end_once(start: Start) -> None:
    heard: list[Message] = []
    runner = start(EchoModel(), post=heard.append)
    spec = parse_workflow(CHAIN)
    ids = await asyncio.gather(*(runner.submit(spec, {"topic": str(i)}, "a") for i in range(20)))
    await asyncio.gather(*(runner.wait(id, "a") for id in ids))
    for kind in (WorkflowSubmitted, WorkflowEnded):
        assert sorted(message.workflow_id for message in heard if isinstance(message, kind)) == sorted(ids)
