"""A graph as an image model: its jobs end with whoever wanted them, and with the server that forgot them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import aiohttp
import pytest

from swarmx.providers.comfyui import ImageReplica, Template, served
from tests.compat.comfyui.fake import FakeComfy, serving
from tests.compat.comfyui.fake_nodes import graph
from tests.compat.comfyui.fronts import eventually

pytestmark = pytest.mark.process
WANTED = {"model": "tiny", "prompt": "a dog"}


def _replica(fake: FakeComfy, folder: Path) -> ImageReplica:
    described = graph(steps=500)
    described["6"]["inputs"]["text"] = "$prompt"
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
