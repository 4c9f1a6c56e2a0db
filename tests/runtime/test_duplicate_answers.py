"""A call that is answered more than once, or too late, finishes its node once, with the answer that came first."""

from __future__ import annotations

import asyncio

from swarmx.core.records import ModelRequest, ModelResult
from swarmx.memory.sqlite import SqliteStore
from swarmx.workflows.events import NodeFinished, NodeRetried, decode_event
from swarmx.workflows.spec import parse_workflow
from tests.contract.test_store import call_record
from tests.runtime.runners import ONE, EchoModel, FixedClock, Start, chat, terminal_events


def answered(request: ModelRequest, call_id: str) -> ModelResult:
    record = call_record(call_id, workflow_id=request.workflow_id)
    return ModelResult(call_id=call_id, replica_id="r", attempts=1, answer=chat(call_id), record=record)


async def finished(store: SqliteStore, workflow_id: str) -> list[NodeFinished]:
    events = [decode_event(event.body) for event in await store.events(workflow_id)]
    return [event for event in events if isinstance(event, NodeFinished)]


async def test_of_two_owners_that_are_answered_at_once_one_stores_the_answer(store: SqliteStore, start: Start) -> None:
    told, begun = asyncio.Event(), [asyncio.Event(), asyncio.Event()]
    keys: list[str] = []

    async def answer(request: ModelRequest) -> ModelResult:
        number = len(keys)
        keys.append(request.idempotency_key)
        begun[number].set()
        await told.wait()
        return answered(request, f"call{number}")

    first, second = (start(EchoModel(answers={"only": answer})) for _ in range(2))
    workflow_id = await first.submit(parse_workflow(ONE), {}, "a")
    await begun[0].wait()
    await second.recover()
    await begun[1].wait()
    told.set()
    for runner in (first, second):
        assert (await runner.wait(workflow_id, "a")).state in ("running", "finished")
    while first.running or second.running:
        await asyncio.sleep(0)
    assert keys[0] == keys[1], "whoever is called can tell that it is the same call"
    assert [event.call_id for event in await finished(store, workflow_id)] == ["call1"]
    assert await terminal_events(store, workflow_id) == ["Finished"]
    while len(await store.calls(workflow_id, tenant="a")) < 2:
        await asyncio.sleep(0)  # both were made


async def test_an_answer_to_an_attempt_that_was_given_up_means_nothing(store: SqliteStore, start: Start) -> None:
    source = "{name: t, nodes: {only: {kind: llm, model: m, prompt: p, timeout_s: 60, retry: {backoff_s: 0}}}}"
    begun, given_up, may_end = asyncio.Event(), asyncio.Event(), asyncio.Event()
    asked: list[str] = []

    async def answer(request: ModelRequest) -> ModelResult:
        asked.append(request.request_id)
        if len(asked) == 1:
            begun.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                given_up.set()  # an engine that does not let go, and answers all the same
                return answered(request, "late")
        await may_end.wait()
        return answered(request, "in_time")

    clock = FixedClock()
    runner = start(EchoModel(answers={"only": answer}), clock)
    workflow_id = await runner.submit(parse_workflow(source), {}, "a")
    await begun.wait()
    clock.time_s += 61.0
    runner.posted(workflow_id)
    await given_up.wait()
    while len(asked) < 2:
        await asyncio.sleep(0)
    while await store.call("late", tenant="a") is None:
        await asyncio.sleep(0)
    assert await finished(store, workflow_id) == []
    may_end.set()
    assert (await runner.wait(workflow_id, "a")).state == "finished"
    assert [event.call_id for event in await finished(store, workflow_id)] == ["in_time"]
    kinds = [type(decode_event(event.body)) for event in await store.events(workflow_id)]
    assert kinds.count(NodeRetried) == 1
