"""A graph as an image model: its jobs end with whoever wanted them, and with the server that forgot them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from swarmx.providers.comfyui import ImageReplica, Template, served
from tests.compat.comfyui.fake import FakeComfy, serving
from tests.compat.comfyui.fake_nodes import graph
from tests.compat.comfyui.fronts import eventually

pytestmark = pytest.mark.process
WANTED = {"model": "tiny", "prompt": "a dog"}


def _replica(fake: FakeComfy, folder: Path) -> ImageReplica:
    described = graph(steps=500)
    described["6"]["inputs"]["text"] = "$prompt"
    described["5"]["inputs"]["width"] = "$width"
    (folder / "graph.json").write_text(json.dumps(described))
    return ImageReplica(url=fake.url, model="tiny", template=Template(folder / "graph.json"), token=None)


async def _runs(fake: FakeComfy) -> bool:
    return fake._running is not None


async def _is_idle(fake: FakeComfy) -> bool:
    return fake._running is None


async def test_a_job_whose_caller_hangs_up_is_stopped(tmp_path: Path) -> None:
    fake = FakeComfy(step_s=0.05)
    async with serving(fake), served(_replica(fake, tmp_path)) as port, aiohttp.ClientSession() as session:
        url = f"http://127.0.0.1:{port}/v1/images/generations"
        asked = asyncio.create_task(session.post(url, json=WANTED))
        await eventually(lambda: _runs(fake))
        asked.cancel()
        await eventually(lambda: _is_idle(fake))
    assert "POST /interrupt" in fake.requests


async def test_a_job_that_its_server_forgot_is_an_error_and_no_wait_for_ever(tmp_path: Path) -> None:
    fake = FakeComfy(step_s=0.05)
    async with serving(fake), served(_replica(fake, tmp_path)) as port, aiohttp.ClientSession() as session:
        url = f"http://127.0.0.1:{port}/v1/images/generations"
        asked = asyncio.create_task(session.post(url, json=WANTED))
        await eventually(lambda: _runs(fake))
        await fake.die()
        await fake.start(fake.port)
        async with await asked as response:
            assert response.status == 502
            assert "not there any more" in await response.text()


async def _answered(replica: ImageReplica, **wanted: object) -> tuple[int, str]:
    async with served(replica) as port, aiohttp.ClientSession() as session:
        url = f"http://127.0.0.1:{port}/v1/images/generations"
        async with session.post(url, json=WANTED | wanted) as response:
            return response.status, (await response.json())["error"]["message"]


async def test_what_a_request_asks_too_much_of_is_its_fault_and_a_graph_that_cannot_run_is_not(tmp_path: Path) -> None:
    fake, without_model = FakeComfy(), FakeComfy(models=())
    async with serving(fake, without_model):
        status, message = await _answered(_replica(fake, tmp_path), size="99999x128")
        broken, _ = await _answered(_replica(without_model, tmp_path), size="99999x128")
    assert status == 400
    assert "width: 99999 is above the maximum of 16384" in message
    assert broken == 502, "another replica may have the model"
    assert fake.received == []


class _Newer(FakeComfy):
    """Has the jobs API."""

    @web.middleware
    async def _faults(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if request.path.startswith("/api/jobs/"):
            runs = self._running is not None and request.path.endswith(self._running[2])
            return web.json_response({"status": "in_progress"} if runs else {}, status=200 if runs else 404)
        return await super()._faults(request, handler)


@pytest.mark.parametrize(("fake", "most"), [(FakeComfy(step_s=0.05), 8), (_Newer(step_s=0.05), 0)])
async def test_a_whole_queue_is_asked_for_less_often_than_a_job_or_never(
    tmp_path: Path, fake: FakeComfy, most: int
) -> None:
    fake.stuck = True
    async with serving(fake), served(_replica(fake, tmp_path)) as port, aiohttp.ClientSession() as session:
        asked = asyncio.create_task(session.post(f"http://127.0.0.1:{port}/v1/images/generations", json=WANTED))
        await eventually(lambda: _asked_for(fake, 10))
        queues = fake.requests.count("GET /queue")
        asked.cancel()
        await eventually(lambda: _is_idle(fake))
    assert queues <= most


async def _asked_for(fake: FakeComfy, times: int) -> bool:
    return sum(request.startswith("GET /history/") for request in fake.requests) >= times
