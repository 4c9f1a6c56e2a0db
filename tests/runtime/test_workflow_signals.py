"""Signals reach a running workflow once, whenever they come, and survive what happens to the server."""

from __future__ import annotations

import asyncio

import pytest

from swarmx.core.errors import NotFound, Refused, WorkflowError
from swarmx.memory.sqlite import SqliteStore
from swarmx.runtime.workflows import WorkflowRunner
from swarmx.workflows.events import SignalAwaited, SignalReceived, decode_event
from swarmx.workflows.spec import parse_workflow
from tests.runtime.runners import ONE, EchoModel, FixedClock, Start, terminal_events

GATE = """
name: gate
signals: {approve: {schema: {type: boolean}}, note: {timeout_s: 60, default: none given}}
nodes:
  draft: {kind: llm, model: m, prompt: write}
  send: {kind: llm, model: m, prompt: "{{ draft.text }} {{ signals.approve }}"}
outputs: {sent: "{{ send.text }}"}
"""
NOTED = GATE.replace("{{ signals.approve }}", "{{ signals.note }}")


async def signals_of(store: SqliteStore, workflow_id: str) -> list[SignalReceived]:
    events = [decode_event(event.body) for event in await store.events(workflow_id)]
    return [event for event in events if isinstance(event, SignalReceived)]


async def until_it_waits(store: SqliteStore, workflow_id: str) -> None:
    while not any(isinstance(decode_event(e.body), SignalAwaited) for e in await store.events(workflow_id)):
        await asyncio.sleep(0)


async def submit(runner: WorkflowRunner, source: str = GATE) -> str:
    return await runner.submit(parse_workflow(source), {}, "a")


async def test_a_workflow_waits_for_its_signal_and_goes_on_with_it(store: SqliteStore, start: Start) -> None:
    runner = start(EchoModel())
    workflow_id = await submit(runner)
    await until_it_waits(store, workflow_id)
    assert await runner.signal(workflow_id, "approve", True, dedup="1", tenant="a") is True
    assert (await runner.wait(workflow_id, "a")).state == "finished"
    assert (await runner.describe(workflow_id, "a"))["outputs"] == {"sent": "WRITE TRUE"}


async def test_the_same_signal_counts_once(store: SqliteStore, start: Start) -> None:
    runner = start(EchoModel(hung=frozenset({"draft"})))
    workflow_id = await submit(runner)
    assert await runner.signal(workflow_id, "approve", True, dedup="1", tenant="a") is True
    assert await runner.signal(workflow_id, "approve", True, dedup="1", tenant="a") is False
    while not await signals_of(store, workflow_id):
        await asyncio.sleep(0)
    assert await runner.signal(workflow_id, "approve", True, dedup="1", tenant="a") is False
    assert await signals_of(store, workflow_id) == [SignalReceived(name="approve", value=True, signal_id="1")]


async def test_of_two_senders_the_first_one_counts_and_the_second_is_told(store: SqliteStore, start: Start) -> None:
    runner = start(EchoModel(hung=frozenset({"draft"})))
    workflow_id = await submit(runner)
    await runner.signal(workflow_id, "approve", True, dedup="1", tenant="a")
    while not await signals_of(store, workflow_id):
        await asyncio.sleep(0)
    with pytest.raises(Refused, match="'approve' has come already: true; it has one value in a run"):
        await runner.signal(workflow_id, "approve", False, dedup="2", tenant="a")


async def test_another_signal_is_refused_also_before_the_owner_has_looked(store: SqliteStore, start: Start) -> None:
    owner = start(EchoModel(hung=frozenset({"draft"})), exclusive=False)
    workflow_id = await submit(owner)
    others = [start(EchoModel(), exclusive=False) for _ in range(2)]
    assert await others[0].signal(workflow_id, "approve", True, dedup="1", tenant="a") is True
    for other in others:
        with pytest.raises(Refused, match="'approve' has come already: true"):
            await other.signal(workflow_id, "approve", False, dedup="2", tenant="a")
        assert await other.signal(workflow_id, "approve", True, dedup="1", tenant="a") is False
    assert await others[1].signal(workflow_id, "note", "late", dedup="3", tenant="a") is True, "another name"
    assert await signals_of(store, workflow_id) == [], "its owner has not looked"
    assert len(await store.inputs(workflow_id)) == 2


async def test_of_two_that_come_at_once_one_counts_and_nothing_is_stuck(store: SqliteStore, start: Start) -> None:
    runners = [start(EchoModel(), exclusive=False) for _ in range(2)]
    workflow_id = await submit(runners[0])
    told = await asyncio.gather(
        *(runners[n % 2].signal(workflow_id, "approve", True, dedup=str(n), tenant="a") for n in range(6)),
        return_exceptions=True,
    )
    assert [type(said) for said in told if said is not True] == [Refused] * 5
    runners[0].posted(workflow_id)
    assert (await runners[0].wait(workflow_id, "a")).state == "finished"
    (counted,) = await signals_of(store, workflow_id)
    assert counted.signal_id == str(told.index(True)), "the sender who was told so"
    assert await store.inputs(workflow_id) == []


async def test_a_signal_that_was_posted_before_the_crash_is_taken_after_it(store: SqliteStore, start: Start) -> None:
    first = start(EchoModel(hung=frozenset({"draft"})))
    workflow_id = await submit(first)
    await first.close()
    second = start(EchoModel())
    await second.signal(workflow_id, "approve", True, dedup="1", tenant="a")
    assert await second.recover() == 0, "it was taken up with the signal"
    assert (await second.wait(workflow_id, "a")).state == "finished"


async def test_waiting_goes_on_after_a_crash_until_the_time_is_over(store: SqliteStore, start: Start) -> None:
    first = start(EchoModel(), FixedClock(1000.0))
    workflow_id = await submit(first, NOTED)
    await until_it_waits(store, workflow_id)
    shown = await first.describe(workflow_id, "a")
    assert shown["signals"] == [
        {"name": "approve", "state": "unused", "timeout_at_s": None, "value": None},
        {"name": "note", "state": "awaited", "timeout_at_s": 1060.0, "value": None},
    ]
    assert [node["awaits"] for node in shown["nodes"]] == [[], ["note"]]
    await first.close()
    early = start(EchoModel(), FixedClock(1059.0))
    await early.recover()
    for _ in range(20):
        await asyncio.sleep(0)
    assert await signals_of(store, workflow_id) == []
    await early.close()
    late = start(EchoModel(), FixedClock(1060.0))
    await late.recover()
    assert (await late.wait(workflow_id, "a")).state == "finished"
    shown = await late.describe(workflow_id, "a")
    assert shown["outputs"] == {"sent": "WRITE NONE GIVEN"}
    assert shown["signals"][1] == {
        "name": "note", "state": "defaulted", "timeout_at_s": None, "value": "none given"
    }  # fmt: skip


async def test_a_workflow_that_waits_can_be_cancelled(store: SqliteStore, start: Start) -> None:
    runner = start(EchoModel())
    workflow_id = await submit(runner)
    await until_it_waits(store, workflow_id)
    assert (await runner.cancel(workflow_id, "a")).state == "cancelled"
    assert await terminal_events(store, workflow_id) == ["Cancelled"]


async def test_whoever_may_not_or_cannot_signal_is_told_why(start: Start) -> None:
    runner = start(EchoModel(hung=frozenset({"draft"})))
    workflow_id = await submit(runner)
    with pytest.raises(NotFound):
        await runner.signal("wf-none", "approve", True, dedup="1", tenant="a")
    with pytest.raises(NotFound):
        await runner.signal(workflow_id, "approve", True, dedup="1", tenant="b")
    with pytest.raises(WorkflowError, match="did you mean 'approve'"):
        await runner.signal(workflow_id, "aprove", True, dedup="1", tenant="a")
    with pytest.raises(WorkflowError, match="should be boolean"):
        await runner.signal(workflow_id, "approve", "yes", dedup="1", tenant="a")
    await runner.cancel(workflow_id, "a")
    with pytest.raises(WorkflowError, match=r"has ended \(cancelled\) and takes no signals"):
        await runner.signal(workflow_id, "approve", True, dedup="1", tenant="a")


async def test_a_repeated_signal_is_known_even_after_the_end(store: SqliteStore, start: Start) -> None:
    runner = start(EchoModel())
    workflow_id = await submit(runner)
    await runner.signal(workflow_id, "approve", True, dedup="1", tenant="a")
    await runner.wait(workflow_id, "a")
    assert await runner.signal(workflow_id, "approve", True, dedup="1", tenant="a") is False


async def test_a_workflow_without_signals_names_none(start: Start) -> None:
    runner = start(EchoModel(hung=frozenset({"only"})))
    workflow_id = await submit(runner, ONE)
    with pytest.raises(WorkflowError, match="declares no signal 'go'; its signals: none"):
        await runner.signal(workflow_id, "go", 1, dedup="1", tenant="a")


async def test_an_input_that_cannot_be_read_is_dropped_and_holds_nothing_up(store: SqliteStore, start: Start) -> None:
    runner = start(EchoModel(hung=frozenset({"draft"})))
    workflow_id = await submit(runner)
    await store.post(workflow_id, b'{"input":"from the future"}', dedup="x", tenant=None)
    await runner.signal(workflow_id, "approve", True, dedup="1", tenant="a")
    while not await signals_of(store, workflow_id):
        await asyncio.sleep(0)
    assert await store.inputs(workflow_id) == []
