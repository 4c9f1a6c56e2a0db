"""A fleet of ComfyUI servers over real HTTP, behind SwarmX's front and behind the rules of other gateways.

`--comfyui-dir` starts two real servers on CPUs, with two random checkpoints. The second is slowed down by SIGSTOP and
SIGCONT for a share of every 50 ms; how much slower that makes it is measured and reported. `--fake` starts four
servers that speak the recorded protocol and take the time that nodes were measured to take on a real one.

Graphs have the shapes of ComfyUI's own examples (text to image, two passes, image to image, an upscaled picture, both
pictures of two passes), with the steps, samplers and batches of its templates and small pictures. All ways get the same
jobs at the same moments; all servers forget everything between two ways. Gateways send a job on as it comes; they know
exactly how many jobs each server has.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from eval.result import Claim, Row, claim, table, write_result
from swarmx.compat.comfyui.graph import Graph, models_in
from swarmx.neural.heads.comfy_nodes import NodeWork, node_works
from tests.compat.comfyui.fake import FakeComfy, node_info
from tests.compat.comfyui.real.behind_front import die_with_parent, free_port, start_front, start_server, until_answered

ROOT = Path(__file__).parent.parent
MODELS: Mapping[str, int] = {"small.safetensors": 2, "large.safetensors": 4}  # and their blocks
FAKE_SPEEDS: Mapping[str, float] = {"one": 1.0, "two": 0.7, "three": 0.45, "four": 0.25}
_SESSIONS = 8
_STEPS, _SIDES, _BATCHES = (4, 8, 12, 20, 20, 25, 30, 50), (64, 96, 128, 160, 192, 224), (1, 1, 1, 2)
_SAMPLERS = ("euler", "euler", "euler", "heun", "dpmpp_2m")
_CALIBRATION = 10  # graphs
_PERIOD_S = 0.05
_LOOK_S = 3.0  # between two looks for an end whose event did not come
_SLACK = 1  # jobs that model affinity lets a queue be longer by
# Seconds of nodes of a real server on one core (74 graphs, ComfyUI 0.3.64, both checkpoints): a constant, and so much
# for each of a node's amounts.
_MEASURED: Mapping[tuple[str, str], tuple[float, ...]] = {
    ("ksampler", "small.safetensors"): (0.025, 0.0078, 0.197, 0.302),
    ("ksampler", "large.safetensors"): (0.0, 0.022, 0.942, 1.606),
    ("vaedecode", ""): (0.0, 11.7),
    ("vaeencode", ""): (0.0, 11.7),
    ("saveimage", ""): (0.001, 0.1),
    ("imagescaleby", ""): (0.001, 0.045),
}
_LOAD_S, _OTHER_S = 0.78, 0.0016


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A job and when it comes, in seconds from the beginning."""

    at_s: float
    graph: Graph


class Sessions:
    """Clients that work on a graph each: most jobs are near the session's last one."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._states = [self._fresh() for _ in range(_SESSIONS)]

    def draw(self) -> Graph:
        """The next job of some session: a new seed, a new prompt, another size, or all of it new."""
        index, what = int(self._rng.integers(_SESSIONS)), self._rng.random()
        now = {**self._states[index], "seed": int(self._rng.integers(2**31))}
        if 0.5 <= what < 0.65:
            now["text"] = int(self._rng.integers(2**31))
        elif 0.65 <= what < 0.85:
            now |= self._size()
        elif what >= 0.85:
            now = self._fresh()
        self._states[index] = now
        return graph_of(now)

    def _fresh(self) -> dict[str, Any]:
        rng = self._rng
        shape = str(rng.choice(["text", "passes", "both", "image", "scaled"], p=[0.5, 0.15, 0.1, 0.15, 0.1]))
        model, seed = str(rng.choice(list(MODELS), p=[0.6, 0.4])), int(rng.integers(2**31))
        return {"shape": shape, "model": model, "text": seed, "seed": seed, **self._size()}

    def _size(self) -> dict[str, Any]:
        rng = self._rng
        return {
            "steps": int(rng.choice(_STEPS)),
            "side": int(rng.choice(_SIDES)),
            "batch": int(rng.choice(_BATCHES)),
            "sampler": str(rng.choice(_SAMPLERS)),
            "cfg": float(rng.choice([7.0, 7.0, 7.0, 7.0, 1.0])),
        }


def graph_of(now: Mapping[str, Any]) -> Graph:
    """A graph in API format."""

    def node(name: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": name, "inputs": inputs}

    def sampler(latent: str, steps: int, denoise: float) -> dict[str, Any]:
        return node(
            "KSampler", model=["4", 0], positive=["6", 0], negative=["7", 0], latent_image=[latent, 0], cfg=now["cfg"],
            seed=now["seed"], steps=steps, sampler_name=now["sampler"], scheduler="normal", denoise=denoise,
        )  # fmt: skip

    def decoded(latent: str) -> dict[str, Any]:
        return node("VAEDecode", samples=[latent, 0], vae=["4", 2])

    def saved(image: str) -> dict[str, Any]:
        return node("SaveImage", images=[image, 0], filename_prefix="fleet")

    shape, side, batch = now["shape"], now["side"], now["batch"]
    made = {
        "4": node("CheckpointLoaderSimple", ckpt_name=now["model"]),
        "5": node("EmptyLatentImage", width=side, height=side, batch_size=batch),
        "6": node("CLIPTextEncode", clip=["4", 1], text=f"a lighthouse, number {now['text']}"),
        "7": node("CLIPTextEncode", clip=["4", 1], text="blurred"),
        "3": sampler("5", now["steps"], 1.0),
    }
    latent = "3"
    if shape == "image":
        made["1"] = node("EmptyImage", width=side, height=side, batch_size=batch, color=now["text"] % 0xFFFFFF)
        made["5"] = node("VAEEncode", pixels=["1", 0], vae=["4", 2])
        made["3"] = sampler("5", now["steps"], 0.6)
    if shape in ("passes", "both"):
        made["10"] = node("LatentUpscaleBy", samples=["3", 0], upscale_method="nearest-exact", scale_by=1.5)
        made["11"] = sampler("10", max(2, now["steps"] // 2), 0.5)
        latent = "11"
    if shape == "both":
        made["12"], made["13"] = decoded("3"), saved("12")
    made["8"] = decoded(latent)
    if shape == "scaled":
        made["14"] = node("ImageScaleBy", image=["8", 0], upscale_method="bicubic", scale_by=2.0)
    made["9"] = saved("14" if shape == "scaled" else "8")
    return made


# The servers


@dataclass(slots=True, kw_only=True)
class Fleet:
    """Servers that are up, by name, fastest first, and how a front over them is started."""

    urls: Mapping[str, str]
    folder: Path
    fronts: int = 0

    @asynccontextmanager
    async def front(self) -> AsyncIterator[str]:
        """A new front of SwarmX, a process of its own that knows nothing yet."""
        self.fronts += 1
        port, folder = free_port(), self.folder / f"front{self.fronts}"
        folder.mkdir()
        process = start_front(port, [int(url.rpartition(":")[2]) for url in self.urls.values()], folder)
        url = f"http://127.0.0.1:{port}"
        try:
            await asyncio.to_thread(until_answered, f"{url}/readyz", process)
            yield url
        finally:
            process.terminate()
            await asyncio.to_thread(process.wait)


@asynccontextmanager
async def real_servers(comfyui: Path, folder: Path, slow: float) -> AsyncIterator[Fleet]:
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
        yield Fleet(urls=urls, folder=folder)
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
        self._noise = np.random.default_rng(seed)
        self._works: dict[str, NodeWork] = {}

    async def _execute(self, prompt_id: str, prompt: Graph, extra: dict[str, Any], outputs: list[str]) -> None:
        self._works = node_works(prompt)
        await super()._execute(prompt_id, prompt, extra, outputs)

    async def _node(
        self, client: str | None, prompt_id: str, node: str, row: dict[str, Any], states: Any
    ) -> str | None:
        seconds = measured_s(self._works[node], loaded=row["inputs"].get("ckpt_name") in self._loaded)
        self._loaded.update(models_in({node: row}))
        await asyncio.sleep(seconds * math.exp(0.08 * float(self._noise.normal())) / self._speed)
        return "interrupted" if self._interrupted else None


def measured_s(work: NodeWork, *, loaded: bool) -> float:
    """Seconds of a node on the core that it was measured on. Its file is read again, even where the disk still has it
    in memory, unless its result is there."""
    if work.class_type == "checkpointloadersimple":
        return _LOAD_S * (0.5 if loaded else 1.0)
    found = _MEASURED.get((work.class_type, work.model)) or _MEASURED.get((work.class_type, ""))
    return _OTHER_S if found is None else found[0] + sum(c * a for c, a in zip(found[1:], work.amounts, strict=True))


def work_s(graphs: Sequence[Graph]) -> float:
    """Mean seconds of the graphs where they were measured, each alone."""
    return float(np.mean([sum(measured_s(w, loaded=True) for w in node_works(g).values()) for g in graphs]))


@asynccontextmanager
async def fake_servers(folder: Path, seed: int) -> AsyncIterator[Fleet]:
    """Four servers of unequal speed."""
    fakes = {name: Timed(speed, seed + n) for n, (name, speed) in enumerate(FAKE_SPEEDS.items())}
    async with AsyncExitStack() as stack:
        for fake in fakes.values():
            await fake.start()
            stack.push_async_callback(fake.die)
        yield Fleet(urls={name: fake.url for name, fake in fakes.items()}, folder=folder)


# What sends jobs on

Rule = Callable[[Graph, Mapping[str, int]], str]
"""Picks a server by how many jobs each has."""


def round_robin(names: Sequence[str]) -> Rule:
    """One after the other."""
    turn = 0

    def rule(graph: Graph, jobs: Mapping[str, int]) -> str:
        nonlocal turn
        turn += 1
        return names[(turn - 1) % len(names)]

    return rule


def least_queue(names: Sequence[str]) -> Rule:
    """The fewest jobs; of equals the fastest."""
    return lambda graph, jobs: min(names, key=lambda name: (jobs[name], names.index(name)))


def affinity(names: Sequence[str]) -> Rule:
    """Of those that will have run the model last, the fewest jobs, unless another one has many fewer."""
    last: dict[str, frozenset[str]] = {}

    def rule(graph: Graph, jobs: Mapping[str, int]) -> str:
        models, fewest = models_in(graph), min(jobs.values())
        near = [name for name in names if last.get(name) == models and jobs[name] <= fewest + _SLACK]
        chosen = min(near or names, key=lambda name: (jobs[name], names.index(name)))
        last[chosen] = models
        return chosen

    return rule


BASELINES: Mapping[str, Callable[[Sequence[str]], Rule]] = {
    "round robin": round_robin,
    "least queue": least_queue,
    "model affinity, least queue": affinity,
}


@dataclass(slots=True)
class Address:
    """One address that jobs are sent to, and the ends that it tells."""

    url: str
    session: aiohttp.ClientSession
    client_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    ends: dict[str, asyncio.Event] = field(default_factory=dict)

    async def listen(self) -> None:
        """Until cancelled."""
        address = f"{self.url}/ws?clientId={self.client_id}"
        async with self.session.ws_connect(address, max_msg_size=0) as socket:
            async for message in socket:
                if message.type is not aiohttp.WSMsgType.TEXT:
                    continue
                event = message.json()
                data = event["data"]
                if event["type"] == "executing" and data["node"] is None and data.get("prompt_id") in self.ends:
                    self.ends[data["prompt_id"]].set()

    async def run(self, graph: Graph) -> dict[str, Any]:
        """Submit and wait for the end; gives the history. Raises RuntimeError for a job that is refused or fails."""
        prompt_id = str(uuid.uuid4())
        ended = self.ends[prompt_id] = asyncio.Event()
        body = {"prompt": graph, "prompt_id": prompt_id, "client_id": self.client_id}
        async with self.session.post(f"{self.url}/prompt", json=body) as response:
            if response.status != 200:
                raise RuntimeError(f"{self.url} refused a graph: {await response.text()}")
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await ended.wait()
            async with self.session.get(f"{self.url}/history/{prompt_id}") as response:
                entry = (await response.json()).get(prompt_id)
            if entry is not None:
                del self.ends[prompt_id]
                if entry["status"]["status_str"] != "success":
                    raise RuntimeError(f"a job failed at {self.url}: {entry['status']}")
                return dict(entry)
            await asyncio.sleep(0.02)


@asynccontextmanager
async def listening(urls: Mapping[str, str]) -> AsyncIterator[dict[str, Address]]:
    """These addresses, each with somebody who listens to it."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        found = {name: Address(url, session) for name, url in urls.items()}
        tasks = [asyncio.create_task(address.listen()) for address in found.values()]
        try:
            yield found
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def play(fleet: Fleet, way: str, jobs: Sequence[Arrival]) -> list[tuple[float, dict[str, Any]]]:
    """Send every job when it comes; seconds from then to its end, and its history, in the order of arrival."""
    async with AsyncExitStack() as stack:
        made = BASELINES.get(way)
        urls = fleet.urls if made is not None else {"front": await stack.enter_async_context(fleet.front())}
        addresses = await stack.enter_async_context(listening(urls))
        await forget(fleet)
        rule = made(tuple(urls)) if made is not None else lambda graph, counts: "front"
        counts, loop = dict.fromkeys(urls, 0), asyncio.get_running_loop()
        began_s = loop.time()

        async def one(job: Arrival) -> tuple[float, dict[str, Any]]:
            await asyncio.sleep(began_s + job.at_s - loop.time())
            chosen = rule(job.graph, counts)
            counts[chosen] += 1
            try:
                entry = await addresses[chosen].run(job.graph)
            finally:
                counts[chosen] -= 1
            return loop.time() - began_s - job.at_s, {"server": chosen, **entry.get("swarmx", {})}

        return list(await asyncio.gather(*(one(job) for job in jobs)))


async def forget(fleet: Fleet) -> None:
    """Have the servers drop models and results."""
    async with aiohttp.ClientSession() as session:
        for url in fleet.urls.values():
            body = {"unload_models": True, "free_memory": True}
            async with session.post(f"{url}/free", json=body) as response:
                response.raise_for_status()
    await asyncio.sleep(1.5)  # a server does so when its queue looks again


async def calibrate(fleet: Fleet, graphs: Sequence[Graph]) -> dict[str, float]:
    """Mean seconds of these graphs by server, one after the other, on all servers at a time."""

    async def mean_s(address: Address) -> float:
        await address.run(graphs[-1])  # its results are gone again when its turn comes
        began_s = asyncio.get_running_loop().time()
        for graph in graphs:
            await address.run(graph)
        return (asyncio.get_running_loop().time() - began_s) / len(graphs)

    async with listening(fleet.urls) as addresses:
        await forget(fleet)
        found = await asyncio.gather(*map(mean_s, addresses.values()))
    return dict(zip(addresses, found, strict=True))


def row_of(way: str, judged: Sequence[tuple[float, dict[str, Any]]], slowest: str, slowest_id: str) -> Row:
    """Completion of jobs, how many the slowest server had, and how far forecasts were off."""
    seconds = [each_s for each_s, _ in judged]
    p50_s, p95_s, p99_s = np.quantile(seconds, (0.5, 0.95, 0.99))
    forecast = [abs(f["forecast_p50_s"] / f["run_s"] - 1.0) for _, f in judged if "forecast_p50_s" in f]
    return {
        "way": way,
        "p50_s": float(p50_s),
        "mean_s": float(np.mean(seconds)),
        "p95_s": float(p95_s),
        "p99_s": float(p99_s),
        "at_the_slowest": float(np.mean([f["server"] in (slowest, slowest_id) for _, f in judged])),
        "in_parts": sum("parts" in f for _, f in judged) if forecast else None,
        "median_error": float(np.median(forecast)) if forecast else None,
    }


async def compare(given: argparse.Namespace, folder: Path) -> tuple[list[Row], list[Claim]]:
    """All ways, one after the other."""
    servers = (
        fake_servers(folder, given.seed)
        if given.fake
        else real_servers(given.comfyui_dir.absolute(), folder, given.slow)
    )
    async with servers as fleet:
        rng = np.random.default_rng([given.seed, 1])
        trial = Sessions(rng)
        calibration = [trial.draw() for _ in range(_CALIBRATION)]
        mean_s = await calibrate(fleet, calibration)
        rows: list[Row] = [{"way": f"calibration: {name}", "mean_s": each_s} for name, each_s in mean_s.items()]
        print(table(rows), flush=True)
        rng = np.random.default_rng([given.seed, 2])
        sessions = Sessions(rng)
        graphs = [sessions.draw() for _ in range(given.warm_up + given.jobs)]
        harder = work_s(graphs) / work_s(calibration)
        rate = given.load * sum(1.0 / (harder * each_s) for each_s in mean_s.values())
        at_s = np.cumsum(rng.exponential(1.0 / rate, size=len(graphs)))
        jobs = [Arrival(at_s=float(each_s), graph=graph) for each_s, graph in zip(at_s, graphs, strict=True)]
        p95_s: dict[str, float] = {}
        for way in [*BASELINES, "ours"]:
            done = (await play(fleet, way, jobs))[given.warm_up :]
            row = row_of(way, done, list(fleet.urls)[-1], f"s{len(fleet.urls)}")
            rows.append(row)
            p95_s[way] = float(row["p95_s"] or 0.0)
            print(table([row]), flush=True)
    best_s = min(p95_s[name] for name in BASELINES)
    return rows, [
        claim("P95 below round robin", 1.0 - p95_s["ours"] / p95_s["round robin"], ">=", 0.35),
        claim("P95 below the best baseline", 1.0 - p95_s["ours"] / best_s, ">=", 0.15),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare all ways; 0 when the aims are met."""
    parser = argparse.ArgumentParser(prog="python -m eval comfy_servers", description=__doc__)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--fake", action="store_true", help="four servers without ComfyUI")
    kind.add_argument("--comfyui-dir", type=Path, help="a checkout of ComfyUI")
    parser.add_argument("--comfyui-python", type=Path, help="its interpreter")
    parser.add_argument("--slow", type=float, default=0.4, help="share of the time for which the second server runs")
    parser.add_argument("--load", type=float, default=0.7, help="of what the servers can do together")
    parser.add_argument("--jobs", type=int, default=120)
    parser.add_argument("--warm-up", type=int, default=20, help="jobs before those that count")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder for the result")
    given = parser.parse_args(arguments)
    if given.comfyui_dir is not None:
        if given.comfyui_python is None:
            parser.error("--comfyui-python is the interpreter that runs the servers")
        os.environ["COMFYUI_PYTHON"] = str(given.comfyui_python.absolute())
    os.environ.setdefault("SWARMX", str(Path(sys.executable).with_name("swarmx")))
    with tempfile.TemporaryDirectory(prefix="comfy-servers-") as folder:
        rows, claims = asyncio.run(compare(given, Path(folder)))
    command = " ".join(["python -m eval comfy_servers", *(sys.argv[1:] if arguments is None else arguments)])
    print(write_result(given.out, command, rows, claims, seeds=[given.seed]))
    return 0 if all(each.met for each in claims) else 1


if __name__ == "__main__":
    sys.exit(main())
