"""A store, a clock and transparent workflows for each test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from swarmx.core.messages import Message, WorkflowEnded
from swarmx.gateway.transparent import TransparentWorkflows
from tests.gateway.transparent.programs import Clock, ShakyStore, alone


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[ShakyStore]:
    found = ShakyStore(tmp_path / "x.db")
    await found.open()
    yield found
    await found.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def heard() -> list[Message]:
    """What agents hear of the `open_ones`."""
    return []


@pytest.fixture
def open_ones(store: ShakyStore, clock: Clock, heard: list[Message]) -> TransparentWorkflows:
    return TransparentWorkflows(store, clock, epoch=alone(store), idle_s=0.04, post=heard.append)


@pytest.fixture
def fall_silent(
    open_ones: TransparentWorkflows, clock: Clock, heard: list[Message]
) -> Callable[[str], Awaitable[None]]:
    """Lets so much time go by that the workflow has ended."""

    async def fall(workflow_id: str) -> None:
        clock.at_s += 1000.0
        reaper = asyncio.create_task(open_ones.run())
        ended = WorkflowEnded(workflow_id=workflow_id, state="finished")
        try:
            async with asyncio.timeout(20.0):
                while ended not in heard:
                    await asyncio.sleep(0.005)
        finally:
            reaper.cancel()
            await asyncio.wait({reaper})

    return fall
