"""Clients that others wrote, and image nodes of workflows, over the front."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from swarmx.core.errors import ConfigError
from swarmx.providers.comfyui import ImageReplica, Template
from tests.compat.comfyui.fake import PNG, FakeComfy, serving
from tests.compat.comfyui.fake_nodes import graph
from tests.compat.comfyui.fronts import front

pytestmark = pytest.mark.process


@asynccontextmanager
async def _served(app: web.Application) -> AsyncIterator[str]:
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.mark.filterwarnings("ignore")  # of packages that are not ours
async def test_comfy_sdk_runs_a_graph_through_comfy_api_proxy_and_the_front(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = pytest.importorskip("comfy_api_proxy.app")
    sdk = pytest.importorskip("comfy_sdk")
    fake = FakeComfy(step_s=0.01)
    async with (
        serving(fake),
        front(tmp_path / "front", fake) as client,
        _served(proxy.make_app(client.url, state_dir=tmp_path / "proxy")) as url,
    ):
        monkeypatch.setenv("COMFY_BASE_URL", url)
        async with sdk.AsyncComfy() as comfy:
            done = await comfy.run(comfy.workflows.from_json(graph(3)))
            picture = await done.get_outputs("9")[0].to_bytes()
            with pytest.raises(sdk.ComfyError):
                await comfy.run(comfy.workflows.from_json(graph(model="absent.safetensors")))
            long = await comfy.submit(comfy.workflows.from_json(graph(4, steps=2000)))
            await long.cancel()
            with pytest.raises(sdk.ComfyError):
                await long.result()
    assert picture.startswith(PNG)


def _template(folder: Path) -> Template:
    described = graph()
    described["6"]["inputs"]["text"] = "$prompt"
    described["5"]["inputs"] |= {"width": "$width", "height": "$height", "batch_size": "$n"}
    described["3"]["inputs"] |= {"seed": "$seed", "steps": "$steps"}
    path = folder / "graph.json"
    path.write_text(json.dumps(described))
    return Template(path)


async def test_an_image_request_of_openai_becomes_a_graph_and_its_picture(tmp_path: Path) -> None:
    fake = FakeComfy()
    async with serving(fake), front(tmp_path / "front", fake) as client, aiohttp.ClientSession() as session:
        replica = ImageReplica(url=client.url, model="tiny", template=_template(tmp_path), token=None)
        async with _served(replica.app()) as url:
            wanted = {"model": "tiny", "prompt": "a dog", "size": "64x128", "steps": 3, "seed": 7}
            async with session.post(f"{url}/v1/images/generations", json=wanted) as response:
                answer = await response.json()
            async with session.post(f"{url}/v1/images/generations", json={**wanted, "size": "big"}) as response:
                refused = response.status
            async with session.get(f"{url}/metrics") as response:
                metrics = await response.text()
        _, history = await client.ask("GET", "/history")
    ran = next(iter(history.values()))["prompt"][2]
    assert base64.b64decode(answer["data"][0]["b64_json"]).startswith(PNG)
    assert ran["6"]["inputs"]["text"] == "a dog"
    assert ran["5"]["inputs"] == {"width": 64, "height": 128, "batch_size": 1}
    assert (ran["3"]["inputs"]["steps"], ran["3"]["inputs"]["seed"]) == (3, 7)
    assert refused == 400
    assert "vllm:num_requests_running 0" in metrics


def test_a_template_without_a_place_for_the_prompt_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(graph()))
    with pytest.raises(ConfigError, match="prompt"):
        Template(path)
