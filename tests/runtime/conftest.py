"""A store on disk, and runners and a desk over it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from swarmx.memory.sqlite import SqliteStore
from swarmx.runtime.workflows import WorkflowRunner
from tests.runtime.offices import Office
from tests.runtime.runners import EchoModel, FixedClock, Start


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    opened = SqliteStore(tmp_path / "swarmx.db")
    await opened.open()
    yield opened
    await opened.close()


@pytest.fixture
async def start(store: SqliteStore) -> AsyncIterator[Start]:
    runners: list[WorkflowRunner] = []

    def make(model: EchoModel, clock: FixedClock | None = None, **more: Any) -> WorkflowRunner:
        runners.append(WorkflowRunner(more.pop("store", store), model, clock or FixedClock(), **more))
        return runners[-1]

    yield make
    for runner in runners:
        await runner.close()


@pytest.fixture
def office(store: SqliteStore) -> Office:
    return Office(store=store)
