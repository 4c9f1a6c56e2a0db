"""A memory that opens beside everything else."""

from __future__ import annotations

import asyncio

from swarmx.core.ports import VectorMemory
from swarmx.memory.lazy import LazyVectors
from swarmx.memory.vectors import ArrayVectors


async def test_uses_that_come_before_it_is_open_wait_for_the_one_opening() -> None:
    gate, opened = asyncio.Event(), []

    async def opener() -> VectorMemory:
        await gate.wait()
        memory = ArrayVectors(None, 2)
        await memory.open()
        opened.append(memory)
        return memory

    lazy = LazyVectors(opener)
    opening = asyncio.create_task(lazy.open())
    adding = asyncio.create_task(lazy.add("east", [1.0, 0.0], {"n": 1}))
    await asyncio.sleep(0)
    assert not adding.done()
    gate.set()
    await asyncio.gather(opening, adding)
    assert [key for key, _, _ in await lazy.nearest([1.0, 0.1], 1)] == ["east"]
    assert len(opened) == 1
    await lazy.close()


async def test_one_that_was_never_used_has_nothing_to_close() -> None:
    async def opener() -> VectorMemory:
        raise AssertionError("nobody wants it")

    await LazyVectors(opener).close()
