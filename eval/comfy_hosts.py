"""Fleets of ComfyUI servers for `comfy_servers`: two real ones on this machine, or four that only take the time."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from eval.comfy_jobs import FAKE_SPEEDS, MODELS, luck_of, measured_s
from swarmx.compat.comfyui.graph import Graph, links, models_in, signatures, with_inputs
from swarmx.compat.comfyui.kept_costs import FILE_NAME
from swarmx.neural.heads.comfy_nodes import NodeWork, node_works
from tests.compat.comfyui.fake import FakeComfy
from tests.compat.comfyui.fake_nodes import node_info
from tests.compat.comfyui.real.behind_front import die_with_parent, free_port, start_front, start_server, until_answered

ROOT = Path(__file__).parent.parent
_PERIOD_S = 0.05


@dataclass(slots=True, kw_only=True)
class Fleet:
    """Servers that are up, by name, fastest first, and how a front over them is started.

    A front begins with what the fronts before it have learnt, which is kept in the file `costs`; of what the servers
    have in memory it knows nothing.
    """

    urls: Mapping[str, str]
    folder: Path
    costs: Path
    fronts: int = 0

    @asynccontextmanager
    async def front(self) -> AsyncIterator[str]:
        """A new front of SwarmX, a process of its own, once all servers are up for it."""
        self.fronts += 1
        port, folder = free_port(), self.folder / f"front{self.fronts}"
        learnt = folder / "state" / "comfyui" / FILE_NAME
        learnt.parent.mkdir(parents=True)
        if self.costs.exists():
            shutil.copy(self.costs, learnt)
        process = start_front(port, [int(url.rpartition(":")[2]) for url in self.urls.values()], folder)
        url = f"http://127.0.0.1:{port}"
        try:
            await asyncio.to_thread(until_answered, f"{url}/readyz", process)
            await _until_up(url, len(self.urls))
            yield url
        finally:
            process.terminate()
            await asyncio.to_thread(process.wait)
            if learnt.exists():
                shutil.copy(learnt, self.costs)

    async def forget(self) -> None:
        """Have the servers drop models and results."""
        async with aiohttp.ClientSession() as session:
            for url in self.urls.values():
                body = {"unload_models": True, "free_memory": True}
                async with session.post(f"{url}/free", json=body) as response:
                    response.raise_for_status()
        await asyncio.sleep(1.5)  # a server does so when its queue looks again


async def _until_up(front: str, servers: int) -> None:
    async with aiohttp.ClientSession() as session:
        while True:
            async with session.get(f"{front}/healthz") as response:
                if (await response.json())["servers_up"] == servers:
                    return
            await asyncio.sleep(0.1)


@asynccontextmanager
async def real_servers(comfyui: Path, folder: Path, costs: Path, slow: float) -> AsyncIterator[Fleet]:
    """Two servers; the second runs for the share `slow` of the time."""
    script = importlib.util.spec_from_file_location("tiny_checkpoint", ROOT / "scripts" / "tiny_checkpoint.py")
    assert script is not None
    assert script.loader is not None
    module = importlib.util.module_from_spec(script)
    script.loader.exec_module(module)
    for name, blocks in MODELS.items():
        module.main(folder / name, blocks)
    ports, processes = [free_port(), free_port()], []
    for number, port in enumerate(ports):
        base = folder / f"base{number}"
        for name in ("user", "models/checkpoints", "input", "output", "temp", "custom_nodes"):
            (base / name).mkdir(parents=True)
        for name in MODELS:
            shutil.copy(folder / name, base / "models" / "checkpoints")
        options = ["--cpu", "--listen", "127.0.0.1", "--disable-all-custom-nodes", "--base-directory", str(base)]
        processes.append(start_server(options, port, folder / f"server{number}", comfyui))
    duty = None
    try:
        for port, process in zip(ports, processes, strict=True):
            await asyncio.to_thread(until_answered, f"http://127.0.0.1:{port}/queue", process)
        duty = _throttled(processes[1].pid, slow)
        urls = {name: f"http://127.0.0.1:{port}" for name, port in zip(("fast", "slow"), ports, strict=True)}
        yield Fleet(urls=urls, folder=folder, costs=costs)
    finally:
        if duty is not None:
            duty.kill()
            duty.wait()
        for process in processes:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()


def _throttled(pid: int, share: float) -> subprocess.Popen[bytes]:
    """A process that lets another one run for this share of the time only."""
    code = (
        "import os, signal, sys, time\n"
        "pid, on_s, off_s = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])\n"
        "while True:\n"
        "    os.kill(pid, signal.SIGSTOP); time.sleep(off_s)\n"
        "    os.kill(pid, signal.SIGCONT); time.sleep(on_s)\n"
    )
    arguments = [str(pid), str(_PERIOD_S * share), str(_PERIOD_S * (1.0 - share))]
    return subprocess.Popen([sys.executable, "-c", code, *arguments], preexec_fn=die_with_parent)


class Timed(FakeComfy):
    """A server that speaks the protocol and takes the measured time, at some speed. It keeps both checkpoints."""

    def __init__(self, speed: float, seed: int) -> None:
        super().__init__(tuple(MODELS))
        for name, inputs, output in (
            ("VAEEncode", {"pixels": ["IMAGE", {}], "vae": ["VAE", {}]}, "LATENT"),
            ("LatentUpscaleBy", {"samples": ["LATENT", {}]}, "LATENT"),
            ("ImageScaleBy", {"image": ["IMAGE", {}]}, "IMAGE"),
        ):
            self.info[name] = node_info(name, inputs, [output])
        self._speed = speed
        self._seed = seed
        self._works: dict[str, NodeWork] = {}
        self._names: dict[str, str] = {}

    async def _execute(self, prompt_id: str, prompt: Graph, extra: dict[str, Any], outputs: list[str]) -> None:
        self._works, self._names = node_works(sized(prompt)), signatures(prompt, outputs)
        await super()._execute(prompt_id, prompt, extra, outputs)

    async def _node(
        self, client: str | None, prompt_id: str, node: str, row: dict[str, Any], states: Any
    ) -> str | None:
        seconds = measured_s(self._works[node], loaded=row["inputs"].get("ckpt_name") in self._loaded)
        self._loaded.update(models_in({node: row}))
        await asyncio.sleep(seconds * luck_of(self._names[node], self._seed) / self._speed)
        return "interrupted" if self._interrupted else None


def sized(prompt: Graph) -> Graph:
    """The graph of a part, whose loaded latents lead to the sampler that made them: nothing else needs that one."""
    used = {link[0] for node in prompt for link in links(prompt, node)}
    made = [node for node, row in prompt.items() if row["class_type"] == "KSampler" and node not in used]
    loaders = [node for node, row in prompt.items() if row["class_type"] == "LoadLatent"]
    return with_inputs(prompt, {(loader, "samples"): [made[0], 0] for loader in loaders if made})


@asynccontextmanager
async def fake_servers(folder: Path, costs: Path, seed: int) -> AsyncIterator[Fleet]:
    """Four servers of unequal speed."""
    fakes = {name: Timed(speed, seed) for name, speed in FAKE_SPEEDS.items()}
    async with AsyncExitStack() as stack:
        for fake in fakes.values():
            await fake.start()
            stack.push_async_callback(fake.die)
        yield Fleet(urls={name: fake.url for name, fake in fakes.items()}, folder=folder, costs=costs)
