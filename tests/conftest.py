"""What several test modules share: one running server over four emulated replicas."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.e2e.fleet import Http, Server, all_ready, serving
from tests.postgres import PostgresServer, missing

# How fast this machine is at the moment says nothing about the code.
settings.register_profile("house", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")

EMULATED = {
    "emulation": {"time_scale": 20.0, "seed": 7},
    "watch": {"every_s": 0.2, "timeout_s": 20.0},
    "workflows": {"transparent_idle_s": 300.0, "traces": True},
    "server": {"max_body_bytes": 2_000_000, "drain_s": 1},
    "emulated": [
        {"model": "qwen3-8b", "device": "l40s", "count": 2, "size_class": "8b"},
        {"model": "qwen3-8b", "device": "h100", "count": 1, "size_class": "8b"},
        {"model": "sdxl", "device": "l40s", "count": 1, "kind": "image"},
    ],
}


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that many tests share; a test that bends the fleet or the settings starts its own."""
    with serving(EMULATED, tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server that many tests share, each with a database of its own."""
    if why := missing():
        pytest.skip(why)
    running = PostgresServer()
    try:
        running.start()
        yield running
    finally:
        running.remove()


@pytest.fixture
async def http(server: Server) -> AsyncIterator[Http]:
    """A client of the shared server, with the token of its administrator."""
    async with server.http() as client:
        await all_ready(client)
        yield client
