"""The stores that every test of the contract runs on: a file, memory, and a database in a PostgreSQL server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from swarmx.core.ports import WorkflowStore
from tests.contract.places import FilePlace, MemoryPlace, Place, PostgresPlace
from tests.postgres import PostgresServer


@pytest.fixture(params=["file", "memory", "postgres"])
async def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Where a store is, to be opened by whoever asks for it."""
    return MemoryPlace() if request.param == "memory" else await _lasting(request, tmp_path)


@pytest.fixture(params=["file", "postgres"])
async def lasting(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Place]:
    """One that can be opened again."""
    place = await _lasting(request, tmp_path)
    yield place
    await place.remove()


async def _lasting(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "file":
        return FilePlace(tmp_path / "swarmx.db")
    server: PostgresServer = request.getfixturevalue("postgres")
    return PostgresPlace(server, await server.new_database())


@pytest.fixture(params=["file", "postgres"])
def sync_lasting(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """The same for a test that has a loop of its own."""
    place = asyncio.run(_lasting(request, tmp_path))
    yield place
    asyncio.run(place.remove())


@pytest.fixture
async def store(place: Place) -> AsyncIterator[WorkflowStore]:
    opened = await place.opened()
    yield opened
    await opened.close()
    await place.remove()
