"""News of workflows: who waits is woken, once for whatever happened, and there is an end to how many may wait."""

from __future__ import annotations

import asyncio

import pytest

from swarmx.core.errors import Unavailable
from swarmx.runtime.changes import Changes

LONG_S = 60.0  # never waited for: the test would hang


async def test_a_change_wakes_those_who_watch_that_workflow() -> None:
    changes = Changes()
    with changes.watching("a") as first, changes.watching("a") as second, changes.watching("b") as other:
        waits = [asyncio.create_task(watch.wait(LONG_S)) for watch in (first, second)]
        elsewhere = asyncio.create_task(other.wait(LONG_S))
        await asyncio.sleep(0)
        changes.notify("a")
        await asyncio.gather(*waits)
        assert not elsewhere.done()
        elsewhere.cancel()


async def test_a_change_that_came_while_nobody_waited_is_not_missed_and_counts_once() -> None:
    changes = Changes()
    with changes.watching("a") as watch:
        for _ in range(100):
            changes.notify("a")
        await watch.wait(LONG_S)
        again = asyncio.create_task(watch.wait(LONG_S))
        await asyncio.sleep(0)
        assert not again.done()
        changes.notify("a")
        await again


async def test_without_a_change_a_wait_ends_in_time() -> None:
    changes = Changes()
    with changes.watching("a") as watch:
        await watch.wait(0.0)
        changes.notify("b")
        await watch.wait(0.0)


async def test_there_are_so_many_and_no_more_and_who_leaves_makes_room() -> None:
    changes = Changes(most=2)
    with changes.watching("a"):
        with changes.watching("b"), pytest.raises(Unavailable, match="2 clients wait"), changes.watching("a"):
            pass
        with changes.watching("c"):
            assert changes.count == 2
    assert changes.count == 0
    changes.notify("a")


async def test_closing_wakes_everybody() -> None:
    changes = Changes()
    with changes.watching("a") as watch:
        wait = asyncio.create_task(watch.wait(LONG_S))
        await asyncio.sleep(0)
        changes.close()
        await wait
    assert changes.closed
