"""The front over real ComfyUI servers: `make test-comfyui COMFYUI_DIR=... COMFYUI_PYTHON=...`."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from PIL import Image

from tests.compat.comfyui.fake_nodes import graph
from tests.compat.comfyui.fronts import Client, eventually
from tests.compat.comfyui.real.behind_front import (
    for_comfyui,
    free_port,
    start_front,
    start_server,
    until_answered,
)
from tests.compat.comfyui.record import talk

ROOT = Path(__file__).parents[4]
COMFYUI = os.environ.get("COMFYUI_DIR")
pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.process,
    pytest.mark.timeout(900),
    pytest.mark.skipif(COMFYUI is None, reason="needs a checkout of ComfyUI: make test-comfyui COMFYUI_DIR=..."),
]


class Real:
    """Two servers and a front over them."""

    def __init__(self, folder: Path) -> None:
        assert COMFYUI is not None
        os.environ.setdefault("COMFYUI_PYTHON", "python3")
        os.environ.setdefault("SWARMX", str(ROOT / ".venv" / "bin" / "swarmx"))
        self.folder = folder
        made = folder / "tiny.safetensors"
        subprocess.run([sys.executable, str(ROOT / "scripts" / "tiny_checkpoint.py"), str(made)], check=True)
        self.ports = [free_port(), free_port()]
        self.servers = [self._server(number) for number in range(2)]
        self.front_port = free_port()
        for port, server in zip(self.ports, self.servers, strict=True):
            until_answered(f"http://127.0.0.1:{port}/queue", server)
        self.front = start_front(self.front_port, self.ports, folder)
        self.url = f"http://127.0.0.1:{self.front_port}"
        until_answered(f"{self.url}/readyz", self.front)

    def _server(self, number: int) -> subprocess.Popen[bytes]:
        base = self.folder / f"base{number}"
        for name in ("user", "models/checkpoints", "input", "output", "temp", "custom_nodes"):
            (base / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(self.folder / "tiny.safetensors", base / "models" / "checkpoints")
        arguments = ["--cpu", "--listen", "127.0.0.1", "--disable-all-custom-nodes", "--base-directory", str(base)]
        return start_server(arguments, self.ports[number], self.folder / f"server{number}", Path(str(COMFYUI)))

    def close(self) -> None:
        for process in (self.front, *self.servers):
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    found = Real(tmp_path_factory.mktemp("real"))
    yield found
    found.close()


async def test_the_front_says_what_the_server_behind_it_says(real: Real) -> None:
    alone = await talk(f"http://127.0.0.1:{real.ports[0]}", saved="tiny.safetensors", seed=11)
    through = await talk(real.url, saved="tiny.safetensors", seed=23)
    assert through["refused"] == alone["refused"]
    for name, run in through["runs"].items():
        assert run["order"][0] == "execution_start", name
        assert run["order"][-2:] == alone["runs"][name]["order"][-2:], name


def _refined(seed: int) -> dict[str, Any]:
    """A latent of one sampler that two others go on from, each to a picture that takes a while."""
    made: dict[str, Any] = graph(seed, steps=4, side=192)
    made["2"] = {"class_type": "KSampler", "inputs": {**made["3"]["inputs"], "steps": 30}}
    made["3"]["inputs"] |= {"latent_image": ["2", 0], "denoise": 0.5, "steps": 40}
    made["13"] = {"class_type": "KSampler", "inputs": {**made["3"]["inputs"], "seed": seed + 1}}
    made["18"] = {"class_type": "VAEDecode", "inputs": {"samples": ["13", 0], "vae": ["4", 2]}}
    made["19"] = {"class_type": "SaveImage", "inputs": {"images": ["18", 0], "filename_prefix": "again"}}
    return made


def _pixels(picture: bytes) -> bytes:
    return Image.open(io.BytesIO(picture)).convert("RGB").tobytes()


async def test_a_graph_in_parts_makes_the_same_pixels_as_whole(real: Real) -> None:
    """On servers that are idle: through the front, cut at a latent, and then on one of them alone."""

    async def pictures(client: Client, entry: dict[str, Any]) -> dict[str, bytes]:
        found = {}
        for node, output in entry["outputs"].items():
            async with client.session.get(f"{client.url}/view", params=output["images"][0]) as response:
                found[node] = _pixels(await response.read())
        return found

    async def ran(client: Client, prompt: dict[str, Any]) -> dict[str, Any]:
        status, answer = await client.submit(prompt)
        assert status == 200, answer
        return await eventually(lambda: client.history(answer["prompt_id"]), within_s=300)  # type: ignore[no-any-return]

    notes: list[str] = []
    async with aiohttp.ClientSession() as session:
        alone, front = Client(f"http://127.0.0.1:{real.ports[0]}", session), Client(real.url, session)
        for seed in range(100, 1100, 100):  # until a cut pays by what the front has learnt of nodes and of both servers
            await asyncio.gather(*(ran(front, _refined(seed + more)) for more in (20, 40)))  # both servers are heard of
            entry = await ran(front, _refined(seed))
            _, why = await front.ask("GET", f"/swarmx/why/{entry['prompt'][1]}")
            notes += [row["decision"]["note"] for row in why["decisions"]]
            if len({part["server"] for part in entry["swarmx"].get("parts", ())}) == 2:
                break
        assert len({part["server"] for part in entry["swarmx"].get("parts", ())}) == 2, notes
        split = await pictures(front, entry)
        await ran(alone, graph(1, steps=1, side=64))  # which has the server forget what it keeps of the parts
        whole = await pictures(alone, await ran(alone, _refined(seed)))
    assert split == whole
    print("PARTS", entry["swarmx"], notes)


async def test_jobs_are_spread_and_a_killed_server_loses_none(real: Real) -> None:
    async with aiohttp.ClientSession() as session:
        client = Client(real.url, session)
        ids = []
        for number in range(12):
            status, answer = await client.submit(graph(100 + number, steps=20, side=256))
            assert status == 200, answer
            ids.append(answer["prompt_id"])
        await eventually(lambda: client.history(ids[1]), within_s=120)
        real.servers[1].send_signal(signal.SIGKILL)
        entries = [await eventually(lambda i=i: client.history(i), within_s=240) for i in ids]  # type: ignore[misc]
        for entry in entries:
            image = entry["outputs"]["9"]["images"][0]
            if entry["swarmx"]["server"] == "s1":
                async with session.get(f"{real.url}/view", params=image) as response:
                    assert (await response.read()).startswith(b"\x89PNG")
    assert [entry["status"]["status_str"] for entry in entries] == ["success"] * len(ids)
    assert {entry["swarmx"]["server"] for entry in entries} == {"s1", "s2"}


def test_the_websocket_example_of_comfyui_runs_unchanged_but_for_address_and_graph(real: Real) -> None:
    source = (Path(str(COMFYUI)) / "script_examples" / "websockets_api_example.py").read_text()
    source = source.replace("127.0.0.1:8188", f"127.0.0.1:{real.front_port}")
    wanted = json.dumps(graph(int(time.time())))
    source = re.sub(r'prompt_text = """.*?"""', lambda _: f'prompt_text = """{wanted}"""', source, flags=re.DOTALL)
    source += "\nprint('IMAGES', sum(len(found) for found in images.values()))\n"
    script = real.folder / "example.py"
    script.write_text(source)
    ended = subprocess.run(
        [os.environ["COMFYUI_PYTHON"], str(script)], capture_output=True, text=True, timeout=120, check=False
    )
    assert "IMAGES 1" in ended.stdout, ended.stdout + ended.stderr


def test_the_execution_tests_of_comfyui_pass_through_the_front(tmp_path: Path) -> None:
    os.environ.setdefault("COMFYUI_PYTHON", "python3")
    os.environ.setdefault("SWARMX", str(ROOT / ".venv" / "bin" / "swarmx"))
    shim = tmp_path / "bin" / "python"
    shim.parent.mkdir()
    behind = Path(__file__).with_name("behind_front.py")
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} {behind} "$@"\n')
    shim.chmod(0o755)
    options = ("--output_dir", str(tmp_path), "--port", str(free_port()), "--skip-timing-checks")
    ended = subprocess.run(
        [os.environ["COMFYUI_PYTHON"], "-m", "pytest", "-q", *options, "tests/execution/test_execution.py"],
        cwd=str(COMFYUI),
        env={**os.environ, **for_comfyui(), "PATH": f"{shim.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    print(ended.stdout[-4000:])
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-2000:]
