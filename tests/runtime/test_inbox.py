"""What a task is told comes to it whole, in its order, and once."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from swarmx.runtime.inbox import Inbox


async def test_whoever_waits_hears_all_that_came_by_then() -> None:
    inbox = Inbox[int]()
    hearing = asyncio.create_task(inbox.heard())
    await asyncio.sleep(0)
    assert not hearing.done()
    inbox.put(1)
    inbox.put(2)
    assert await hearing == [1, 2]
    assert inbox.drained() == []


async def test_what_is_there_is_heard_without_waiting() -> None:
    inbox = Inbox[int]()
    inbox.put(1)
    hearing = asyncio.create_task(inbox.heard())
    await asyncio.sleep(0)
    assert hearing.result() == [1]


async def test_a_reader_that_is_cancelled_takes_nothing_away() -> None:
    inbox = Inbox[int]()
    hearing = asyncio.create_task(inbox.heard())
    await asyncio.sleep(0)
    inbox.put(1)
    hearing.cancel()  # after it was woken, before it took anything
    await asyncio.gather(hearing, return_exceptions=True)
    assert hearing.cancelled()
    inbox.put(2)
    assert await inbox.heard() == [1, 2]


@given(st.lists(st.sampled_from(["put", "turn", "drain"])))
def test_everything_is_heard_once_and_in_its_order(steps: list[str]) -> None:
    async def run() -> None:
        inbox, heard, count = Inbox[int](), list[int](), 0

        async def read() -> None:
            while True:
                heard.extend(await inbox.heard())

        reading = asyncio.create_task(read())
        for step in steps:
            match step:
                case "put":
                    inbox.put(count)
                    count += 1
                case "turn":
                    await asyncio.sleep(0)
                case _:
                    heard.extend(inbox.drained())
        for _ in range(3):
            await asyncio.sleep(0)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        assert heard == list(range(count))

    asyncio.run(run())
