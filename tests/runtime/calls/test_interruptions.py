"""Replicas that hang, break off or go, and clients that leave: nothing of their calls is left behind."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from tests.agents.worlds import PROMPT, a_call
from tests.runtime.calls.scenes import ANSWER, EVENTS, STREAM, Hanging, Make, plain, streaming


@pytest.mark.parametrize("breaks", [True, False], ids=["connection lost", "no end"])
async def test_a_stream_that_breaks_ends_with_an_error_event_and_is_not_retried(scene: Make, breaks: bool) -> None:
    s = scene()
    await s.serve("a", streaming(*EVENTS, breaks=breaks))
    await s.serve("b", streaming(*STREAM))
    chunks = await s.ask_stream()
    assert b"".join(chunks[:-1]) == b"".join(EVENTS)
    error = msgspec.json.decode(chunks[-1].removeprefix(b"data: "))["error"]
    assert error["code"] == "connection_lost"
    record = s.check_settled("failed")
    assert (record.attempts, record.replica_id) == (1, "a")


async def test_a_replica_that_hangs_is_left_and_another_answers(scene: Make) -> None:
    s = scene()
    hanging = Hanging()
    await s.serve("a", hanging)
    await s.serve("b", plain)
    task = asyncio.create_task(s.ask())
    await hanging.entered.wait()
    s.run_out_of_patience()
    assert await task == ANSWER
    await asyncio.wait_for(hanging.left.wait(), 60.0)
    assert s.check_settled("finished").attempts == 2


async def test_a_replica_that_hangs_within_its_refusal_is_left_as_well(scene: Make) -> None:
    s = scene()
    hanging = Hanging(b"wait", status=503)
    await s.serve("a", hanging)
    await s.serve("b", plain)
    task = asyncio.create_task(s.ask())
    await hanging.entered.wait()
    s.run_out_of_patience()
    assert await task == ANSWER
    await asyncio.wait_for(hanging.left.wait(), 60.0)
    s.check_settled("finished")


async def test_a_stream_that_hangs_in_the_middle_is_given_up(scene: Make) -> None:
    s = scene()
    hanging = Hanging(*EVENTS)
    await s.serve("a", hanging)
    stream = s.calls.stream(a_call("c", stream=True), PROMPT, b"{}")
    chunks = [await anext(stream)]
    s.run_out_of_patience()
    chunks += [chunk async for chunk in stream]
    assert b'"code":"timeout"' in chunks[-1]
    await asyncio.wait_for(hanging.left.wait(), 60.0)
    s.check_settled("failed")


async def test_a_client_that_leaves_is_followed_down_to_the_server(scene: Make) -> None:
    s = scene()
    hanging = Hanging()
    await s.serve("a", hanging)
    task = asyncio.create_task(s.ask())
    await hanging.entered.wait()
    assert s.attempts_in_flight() == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(hanging.left.wait(), 60.0)
    s.check_settled("cancelled")


async def test_a_client_that_leaves_a_stream_is_followed_down_to_the_server(scene: Make) -> None:
    s = scene()
    hanging = Hanging(*EVENTS)
    await s.serve("a", hanging)
    stream = s.calls.stream(a_call("c", stream=True), PROMPT, b"{}")
    await anext(stream)
    await stream.aclose()
    await asyncio.wait_for(hanging.left.wait(), 60.0)
    s.check_settled("cancelled")


async def test_a_client_that_leaves_the_queue_is_forgotten(scene: Make) -> None:
    s = scene()
    s.announce()
    task = asyncio.create_task(s.ask())
    await asyncio.sleep(0)
    assert s.calls.in_flight == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    s.check_settled("cancelled")


async def test_the_calls_of_a_replica_that_is_gone_go_to_another(scene: Make) -> None:
    s = scene()
    hanging = Hanging()
    await s.serve("a", hanging)
    task = asyncio.create_task(s.ask())
    await hanging.entered.wait()
    await s.serve("b", plain)
    s.change("a", "gone")
    assert await task == ANSWER
    await asyncio.wait_for(hanging.left.wait(), 60.0)
    assert s.check_settled("finished").replica_id == "b"


async def test_an_attempt_that_is_cancelled_before_it_began_is_not_begun(scene: Make) -> None:
    s = scene()
    hanging = Hanging()
    await s.serve("a", hanging)
    await s.serve("b", plain)
    s.change("a", "cordoned")
    s.change("b", "cordoned")
    task = asyncio.create_task(s.ask())
    await asyncio.sleep(0)
    s.change("a", "ready")
    s.run_out_of_patience()
    s.change("b", "ready")
    s.run_out_of_patience()
    assert await task == ANSWER
    assert not hanging.entered.is_set()
    s.check_settled("finished")


async def test_an_answer_that_comes_as_its_attempt_is_given_up_leaves_nothing_behind(scene: Make) -> None:
    s = scene()
    await s.serve("a", plain)
    await s.serve("b", plain)
    s.upstream.then = lambda: s.change("a", "gone")  # nothing is awaited any more that this could interrupt
    assert await s.ask() == ANSWER
    s.check_settled("finished")
