"""What does the ComfyUI front cost a job? CPU of its own process, and seconds that it adds to a server's own.

The front, a server that computes nothing (the protocol fake of the tests) and the client each have a process. A job is
what clients do: a graph over HTTP, its events over a websocket that stays open, its history, its picture.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp
import msgspec
import numpy as np

from eval.image_costs import cpu_seconds
from eval.result import Row, claim, table, write_result

_AIM_MS = 10.0
_WARM_UP = 30


def graph(seed: int, steps: int) -> dict[str, Any]:
    """Text to image, as most graphs are."""
    sampler = {"seed": seed, "steps": steps, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    links = {"model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}
    return {
        "3": {"class_type": "KSampler", "inputs": sampler | links},
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "tiny.safetensors"}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 512, "batch_size": 1}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": f"a lighthouse, number {seed}", "clip": ["4", 1]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurred", "clip": ["4", 1]}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "overhead"}},
    }


@asynccontextmanager
async def _child(*command: str) -> AsyncIterator[tuple[int, str]]:
    """A program that prints one line of JSON with its URL: its process id, and that URL."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, stdout=asyncio.subprocess.PIPE, stdin=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        line = await process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(command)} did not start")
        yield process.pid, msgspec.json.decode(line)["url"]
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


class _Client:
    """One client id with one websocket."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url = url
        self._session = session
        self._id = uuid4().hex
        self.events = 0

    async def jobs(self, seeds: Sequence[int], steps: int) -> list[float]:
        """Seconds that each job takes, one after the other."""
        took_s = []
        async with self._session.ws_connect(f"{self._url}/ws?clientId={self._id}") as socket:
            for seed in seeds:
                begun_s = time.perf_counter()
                await self._job(socket, graph(seed, steps))
                took_s.append(time.perf_counter() - begun_s)
        return took_s

    async def _job(self, socket: aiohttp.ClientWebSocketResponse, wanted: dict[str, Any]) -> None:
        body = {"prompt": wanted, "client_id": self._id}
        async with self._session.post(f"{self._url}/prompt", json=body) as answer:
            prompt_id = (await answer.json())["prompt_id"]
        while True:
            event = (await socket.receive()).json()
            self.events += 1
            about = event["data"]
            if event["type"] == "executing" and about["node"] is None and about.get("prompt_id") == prompt_id:
                break
        async with self._session.get(f"{self._url}/history/{prompt_id}") as answer:
            images = (await answer.json())[prompt_id]["outputs"]["9"]["images"]
        async with self._session.get(f"{self._url}/view", params=images[0]) as answer:
            answer.raise_for_status()
            await answer.read()


async def measure(jobs: int, steps: int, rounds: int) -> list[Row]:
    """In turn the server by itself and the front before it, so that a change of the machine hits both."""
    took: dict[str, list[float]] = {"server": [], "front": []}
    front_cpu_s, events, seed = 0.0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        fake = ("-m", "tests.compat.comfyui.fake")
        async with _child(*fake) as (_, server_url):
            command = ("comfy", "--server", f"one={server_url}", "--port", "0", "--no-auth")
            async with (
                _child("-m", "swarmx", "--state-dir", folder, *command) as (pid, front_url),
                aiohttp.ClientSession() as session,
            ):
                await _ready(session, front_url)
                for number in range(rounds + 1):
                    count = jobs if number else _WARM_UP
                    for name, url in (("server", server_url), ("front", front_url)):
                        before_s, client = cpu_seconds(pid), _Client(url, session)
                        seconds = await client.jobs(range(seed, seed + count), steps)
                        seed += count
                        if number:
                            took[name] += seconds
                        if number and name == "front":
                            front_cpu_s += cpu_seconds(pid) - before_s
                            events += client.events
    rows: list[Row] = []
    for name, seconds in took.items():
        p50, p99 = np.quantile(seconds, (0.5, 0.99)) * 1e3
        rows.append({"way": name, "jobs": len(seconds), "steps": steps, "p50_ms": float(p50), "p99_ms": float(p99)})
    count = len(took["front"])
    rows[1] = {**rows[1], "front_cpu_ms": 1e3 * front_cpu_s / count, "events": events / count}
    return rows


async def _ready(session: aiohttp.ClientSession, url: str) -> None:
    while True:
        async with session.get(f"{url}/readyz") as answer:
            if answer.status == 200:
                return
        await asyncio.sleep(0.05)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write the result; 0 when the aim is met."""
    parser = argparse.ArgumentParser(prog="python -m eval comfy_overhead", description=__doc__)
    parser.add_argument("--jobs", type=int, default=200, help="of each way in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="of the sampler, each with its events")
    parser.add_argument("--out", type=Path, required=True, help="folder for the result")
    given = parser.parse_args(arguments)
    rows = asyncio.run(measure(given.jobs, given.steps, given.rounds))
    cpu_ms = float(rows[1]["front_cpu_ms"] or 0.0)
    added_ms = float(rows[1]["p50_ms"] or 0.0) - float(rows[0]["p50_ms"] or 0.0)
    claims = [claim("front_cpu_ms", cpu_ms, "<=", _AIM_MS), claim("added_p50_ms", added_ms, "<=", _AIM_MS)]
    command = " ".join(["python -m eval comfy_overhead", *(sys.argv[1:] if arguments is None else arguments)])
    print(table(rows))
    print(write_result(given.out, command, rows, claims, seeds=[0]))
    return 0 if all(each.met for each in claims) else 1


if __name__ == "__main__":
    sys.exit(main())
