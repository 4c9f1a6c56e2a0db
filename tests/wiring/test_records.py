"""Records that nobody waits for reach the store, whoever stops waiting for them."""

from __future__ import annotations

import asyncio

from swarmx.gateway.telemetry import Telemetry
from swarmx.runtime.clock import WallClock
from swarmx.runtime.fleet_book import FleetBook
from swarmx.wiring.records import Background


def background() -> Background:
    return Background(Telemetry(FleetBook(WallClock()), faults=lambda: 0))


async def test_a_flush_that_is_cancelled_at_any_moment_calls_no_record_off() -> None:
    for turns in range(6):
        records, kept = background(), list[int]()

        async def keep(number: int, kept: list[int] = kept) -> None:
            await asyncio.sleep(0)
            kept.append(number)

        for number in range(3):
            records.add(keep(number))
        flushing = asyncio.ensure_future(records.flush())
        for _ in range(turns):
            await asyncio.sleep(0)
        flushing.cancel()
        await asyncio.gather(flushing, return_exceptions=True)
        await records.flush()
        assert kept == [0, 1, 2], f"cancelled after {turns} turns"


async def test_a_flush_waits_for_the_one_before_it() -> None:
    records, kept, gate = background(), list[str](), asyncio.Event()

    async def keep() -> None:
        await gate.wait()
        kept.append("slow")

    records.add(keep())
    first, second = asyncio.ensure_future(records.flush()), asyncio.ensure_future(records.flush())
    await asyncio.sleep(0)
    gate.set()
    await second
    assert kept == ["slow"]
    await first
