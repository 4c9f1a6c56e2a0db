"""What is seen of a program from outside is kept in order, and the last of it when the server stops."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from swarmx.core.errors import StoreError
from swarmx.core.records import StoredEvent
from swarmx.gateway.program_events import ProgramEnded, outline, program_events
from swarmx.gateway.program_log import MOST_WAITING
from swarmx.gateway.transparent import TransparentWorkflows
from tests.agents.worlds import a_call
from tests.gateway.transparent.programs import Clock, ShakyStore, a, events_of, until


async def test_what_is_seen_of_a_program_is_kept_in_order(store: ShakyStore, open_ones: TransparentWorkflows) -> None:
    call = msgspec.structs.replace(a_call("c1"), workflow_id="red:w")
    begun = await open_ones.touch(a(source="codex", final=True), "red")
    open_ones.seen(begun, call, tools_offered=3)
    open_ones.answered(call, ("grep", "read"))
    open_ones.tools_returned("red:w", ("grep", "read"), 0.5)
    open_ones.answered(msgspec.structs.replace(call, workflow_id="wf_declared"), ("other",))
    await open_ones.release(begun)
    events = await events_of(store)
    assert [type(event).__name__ for event in events] == [
        "ProgramStarted", "CallSeen", "CallAnswered", "ToolGap", "ProgramEnded",
    ]  # fmt: skip
    assert outline(events) == {
        "source": "codex", "parent_id": None, "subagents": [], "tools": {"grep": 1, "read": 1}, "gaps_s": 0.5,
        "ended_by": "final",
    }  # fmt: skip


async def test_events_are_written_while_the_program_runs_and_a_full_disk_only_delays_them(
    store: ShakyStore, clock: Clock, open_ones: TransparentWorkflows
) -> None:
    begun = await open_ones.touch(a(), "red")
    open_ones.seen(begun, msgspec.structs.replace(a_call("c1"), workflow_id="red:w"), tools_offered=0)
    store.failures, store.unanswered = 2, 1

    async def count() -> int:
        return len(await store.events("red:w"))

    reaper = asyncio.create_task(open_ones.run())
    try:
        await until(count, 2)
        open_ones.tools_returned("red:w", ("grep",), 1.0)
        await until(count, 3)
    finally:
        reaper.cancel()
        await asyncio.wait({reaper})
    assert [type(event).__name__ for event in await events_of(store)] == ["ProgramStarted", "CallSeen", "ToolGap"]


async def test_events_that_are_too_many_are_counted(store: ShakyStore, open_ones: TransparentWorkflows) -> None:
    begun = await open_ones.touch(a(final=True), "red")
    for _ in range(MOST_WAITING + 7):
        open_ones.tools_returned("red:w", ("grep",), 1.0)
    await open_ones.release(begun)
    events = await events_of(store)
    assert len(events) == MOST_WAITING + 2
    assert events[-1] == ProgramEnded(at_s=1000.0, why="final", lost=7)


async def test_the_last_events_are_written_when_the_server_stops(
    store: ShakyStore, open_ones: TransparentWorkflows
) -> None:
    reaper = asyncio.create_task(open_ones.run())
    await asyncio.sleep(0)
    await open_ones.touch(a(), "red")
    open_ones.tools_returned("red:w", ("grep",), 1.0)
    reaper.cancel()
    await asyncio.wait({reaper})
    assert outline(await events_of(store))["gaps_s"] == 1.0


def test_events_of_another_version_are_told_from_nonsense() -> None:
    with pytest.raises(StoreError, match="another version"):
        program_events([StoredEvent(seq=1, at_s=0.0, body=b'{"type":"Unheard"}')])
