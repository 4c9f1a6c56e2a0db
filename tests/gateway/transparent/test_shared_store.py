"""Several servers over one store: a workflow is left to the one that its client goes on with, and ended once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from swarmx.core.messages import Message, WorkflowEnded, WorkflowSubmitted
from swarmx.gateway.program_events import ProgramEnded
from swarmx.gateway.transparent import TransparentWorkflows
from tests.agents.worlds import a_call
from tests.gateway.transparent.programs import Clock, ShakyStore, a, among, events_of, state, until, visit


@asynccontextmanager
async def running(workflows: TransparentWorkflows) -> AsyncIterator[None]:
    task = asyncio.create_task(workflows.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


async def test_what_its_client_goes_on_with_at_another_server_is_left_to_that_one(
    store: ShakyStore, clock: Clock
) -> None:
    told: list[list[Message]] = [[], []]
    there, here = (
        TransparentWorkflows(store, clock, epoch=among(store), idle_s=0.1, post=told[i].append) for i in range(2)
    )
    await visit(there, a("moved"))
    await visit(there, a("stayed"))
    moved = await here.touch(a("moved"), "red")
    clock.at_s += 60.0
    async with running(there):
        await until(lambda: state(store, "red:stayed"), "finished")
        async with asyncio.timeout(20.0):
            while len(told[0]) < 4:
                await asyncio.sleep(0.005)
        assert await state(store, "red:moved") == "running"
    ends = {m.workflow_id: m.state for m in told[0] if isinstance(m, WorkflowEnded)}
    assert ends == {"red:moved": "left", "red:stayed": "finished"}
    await here.release(moved)
    clock.at_s += 60.0
    async with running(here):
        await until(lambda: state(store, "red:moved"), "finished")
    assert told[1][1:] == [WorkflowEnded(workflow_id="red:moved", state="finished")]
    assert await visit(there, a("moved")) == "red:moved~2"


async def test_what_a_client_does_at_a_server_that_does_not_own_it_counts_as_heard_of(
    store: ShakyStore, clock: Clock
) -> None:
    there, here = (TransparentWorkflows(store, clock, epoch=among(store), idle_s=0.1) for _ in range(2))
    busy = await there.touch(a("busy"), "red")
    await visit(here, a("busy"))
    await visit(here, a("quiet"))
    there.seen(busy, msgspec.structs.replace(a_call("c1"), workflow_id="red:busy"), tools_offered=0)
    await there.outline("red:busy")  # writes it down
    clock.at_s += 60.0
    async with running(here):
        await until(lambda: state(store, "red:quiet"), "finished")
        assert await state(store, "red:busy") == "running"
        clock.at_s += 60.0
        await until(lambda: state(store, "red:busy"), "finished")


async def test_the_workflows_of_a_server_that_is_gone_are_ended_once_by_one_of_the_others(
    store: ShakyStore, clock: Clock
) -> None:
    gone = TransparentWorkflows(store, clock, epoch=(died := among(store)), idle_s=60.0)
    await gone.touch(a(), "red")  # and its call never comes back
    told: list[list[Message]] = [[], [], []]
    others = [
        TransparentWorkflows(store, clock, epoch=among(store), idle_s=0.1, others_every_s=0.01, post=told[i].append)
        for i in range(3)
    ]
    async with running(others[0]), running(others[1]), running(others[2]):
        for other, name in zip(others, "xyz", strict=True):
            await visit(other, a(name))
        clock.at_s += 1000.0
        for name in "xyz":
            await until(lambda name=name: state(store, f"red:{name}"), "finished")  # type: ignore[misc]
        assert await state(store) == "running", "while its server may still hear of it"
        await store.retire(await died())
        async with asyncio.timeout(20.0):
            while not any(isinstance(m, WorkflowSubmitted) and m.workflow_id == "red:w" for t in told for m in t):
                await asyncio.sleep(0.005)
        assert await state(store) == "running", "silence counts from then on"
        clock.at_s += 1000.0
        await until(lambda: state(store), "finished")
    heard = [m for t in told for m in t if m.workflow_id == "red:w"]  # type: ignore[union-attr]
    assert [type(m) for m in heard] == [WorkflowSubmitted, WorkflowEnded]
    ends = [event for event in await events_of(store) if isinstance(event, ProgramEnded)]
    assert [end.why for end in ends] == ["silence"]
