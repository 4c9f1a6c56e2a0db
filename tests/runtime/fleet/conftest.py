"""A machine and a fleet for each test, checked and taken down after it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from tests.runtime.fleet.scenes import Machine, Scene


@pytest.fixture
async def machine() -> AsyncIterator[Machine]:
    served = Machine()
    app = web.Application()
    app.router.add_get("/{id}/metrics", served.metrics)
    runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    served.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield served
    await runner.cleanup()


@pytest.fixture
async def scene(machine: Machine) -> AsyncIterator[Scene]:
    built = Scene(machine)
    yield built
    await built.fleet.close()
    await built.watch.close()
    built.shell.close()
    built.router.validate()
    built.audit.check()
