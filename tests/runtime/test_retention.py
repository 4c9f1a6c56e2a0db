"""What ended long ago is forgotten in small parts until nothing is left of it; a store in trouble is asked again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from swarmx.core.errors import StoreError
from swarmx.core.records import Forgotten
from swarmx.memory.sqlite import SqliteStore
from swarmx.runtime import retention
from swarmx.runtime.retention import DAY_S, KEPT_CALLS, forget_older, keep_for
from swarmx.runtime.retraining import RetrainingSettings
from tests.contract.test_store import workflow


class Shaky(SqliteStore):
    """Counts how often it is asked to forget, and refuses as long as it is told to."""

    def __init__(self) -> None:
        super().__init__(":memory:", clock=lambda: 10 * DAY_S)
        self.asked = 0
        self.refuses = False

    async def forget(self, **limits: Any) -> Forgotten:
        self.asked += 1
        if self.refuses:
            raise StoreError("the disk is full")
        return await super().forget(**limits)


@pytest.fixture
async def store() -> AsyncIterator[Shaky]:
    opened = Shaky()
    await opened.open()
    yield opened
    await opened.close()


async def ended(store: SqliteStore, count: int, *, at_s: float) -> None:
    for i in range(count):
        name = f"{at_s}.{i}"
        await store.accept(workflow(name, at_s=at_s), [b"one"])
        await store.append(name, [], expected_seq=1, at_s=at_s, state="finished")


async def left(store: SqliteStore) -> int:
    return len((await store.workflows(tenant=None, state=None, limit=1000, cursor=None)).workflows)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


async def test_all_that_is_old_goes_in_several_parts_and_nothing_else(store: Shaky) -> None:
    await ended(store, 120, at_s=1.0)
    await ended(store, 3, at_s=9.5 * DAY_S)
    assert (await forget_older(store, DAY_S, pause_s=0.0)).workflows == 120
    assert store.asked == 4
    assert await left(store) == 3
    assert await forget_older(store, DAY_S, pause_s=0.0) == Forgotten()


async def test_a_store_in_trouble_is_asked_again_later(store: Shaky, caplog: pytest.LogCaptureFixture) -> None:
    await ended(store, 2, at_s=1.0)
    store.refuses = True
    task = asyncio.create_task(keep_for(store, DAY_S, first_s=0.0, every_s=0.001))
    with caplog.at_level(logging.INFO, logger=retention.__name__):
        await until(lambda: store.asked > 2)
        assert await left(store) == 2
        store.refuses = False
        await until(lambda: "2 workflows" in caplog.text)
    assert "could not forget what is old" in caplog.text
    assert await left(store) == 0
    task.cancel()
    await asyncio.wait([task])


def test_what_predictors_are_trained_again_on_is_among_the_calls_that_stay() -> None:
    assert RetrainingSettings().records <= KEPT_CALLS
