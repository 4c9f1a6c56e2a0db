"""Cancels and kills of workflows, whichever process runs them."""

from __future__ import annotations

import asyncio

from swarmx.core.records import (
    ModelRequest,
    ModelResult,
)
from swarmx.memory.sqlite import SqliteStore
from swarmx.workflows.events import CancelRequested
from swarmx.workflows.spec import parse_workflow
from tests.runtime.runners import ONE, EchoModel, Start, kinds_of, terminal_events


async def test_a_cancel_that_was_posted_before_a_crash_is_carried_out(store: SqliteStore, start: Start) -> None:
    model = EchoModel(hung=frozenset({"only"}))
    runner = start(model)
    workflow_id = await runner.submit(parse_workflow(ONE), {}, "a")
    await model.hanging.wait()
    await runner.close()
    assert await store.post(workflow_id, b'{"input":"cancel"}', dedup="cancel", tenant="a")
    again = start(EchoModel(hung=frozenset({"only"})))
    await again.recover()
    assert (await again.wait(workflow_id, "a")).state == "cancelled"
    assert (await kinds_of(store, workflow_id)).count(CancelRequested) == 1
    assert await store.inputs(workflow_id) == []


async def test_a_workflow_without_a_runner_can_be_cancelled(store: SqliteStore, start: Start) -> None:
    model = EchoModel(hung=frozenset({"only"}))
    runner = start(model)
    workflow_id = await runner.submit(parse_workflow(ONE), {}, "a")
    await model.hanging.wait()
    await runner.close()
    assert (await start(EchoModel()).cancel(workflow_id, "a")).state == "cancelled"


async def test_a_kill_ends_a_workflow_whose_calls_do_not_let_go(store: SqliteStore, start: Start) -> None:
    stubborn = asyncio.Event()
    release = asyncio.Event()

    async def hangs(request: ModelRequest) -> ModelResult:
        stubborn.set()
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue
        return EchoModel().result(request, "too late")

    runner = start(EchoModel(answers={"only": hangs}))
    workflow_id = await runner.submit(parse_workflow(ONE), {}, "a")
    await stubborn.wait()
    record = await runner.kill(workflow_id, "a")
    assert record.state == "cancelled"
    assert (await runner.kill(workflow_id, "a")).state == "cancelled", "killing twice is fine"
    release.set()
    await runner.wait(workflow_id, "a")
    assert await terminal_events(store, workflow_id) == ["Cancelled"]
    while runner.running:
        await asyncio.sleep(0)


async def test_a_kill_ends_a_workflow_that_another_process_runs(store: SqliteStore, start: Start) -> None:
    model = EchoModel(hung=frozenset({"only"}))
    owner = start(model, exclusive=False)
    workflow_id = await owner.submit(parse_workflow(ONE), {}, "a")
    await model.hanging.wait()
    other = start(EchoModel(), exclusive=False)
    assert (await other.kill(workflow_id, "a")).state == "cancelled"
    assert await terminal_events(store, workflow_id) == ["Cancelled"]


async def test_a_kill_by_another_process_lets_the_calls_of_the_owner_go(store: SqliteStore, start: Start) -> None:
    model = EchoModel(hung=frozenset({"only"}))
    owner = start(model, exclusive=False, lease_s=0.03)
    workflow_id = await owner.submit(parse_workflow(ONE), {}, "a")
    await model.hanging.wait()
    await start(EchoModel(), exclusive=False).kill(workflow_id, "a")
    async with asyncio.timeout(60.0):
        assert (await owner.wait(workflow_id, "a")).state == "cancelled"
        while not model.cancelled:
            await asyncio.sleep(0.001)
    assert owner.running == 0
    assert await terminal_events(store, workflow_id) == ["Cancelled"]


async def test_a_cancel_by_another_process_reaches_the_owner(store: SqliteStore, start: Start) -> None:
    model = EchoModel(hung=frozenset({"only"}))
    owner = start(model, exclusive=False, lease_s=3.0)
    workflow_id = await owner.submit(parse_workflow(ONE), {}, "a")
    await model.hanging.wait()
    other = start(EchoModel(), exclusive=False)
    assert (await other.cancel(workflow_id, "a")).state == "running", "wished for, not there yet"
    assert (await owner.wait(workflow_id, "a")).state == "cancelled"
    assert model.cancelled == ["only"]
