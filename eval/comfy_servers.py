"""A fleet of ComfyUI servers over real HTTP, behind SwarmX's front and behind the rules of other gateways.

`--comfyui-dir` starts two real servers on CPUs, with two random checkpoints. The second is slowed down by SIGSTOP and
SIGCONT for a share of every 50 ms; how much slower that makes it is measured and reported. `--fake` starts four
servers that speak the recorded protocol and take the time that nodes were measured to take on a real one.

A round is one draw of jobs and of their arrivals, which every way plays in turn, each round beginning with another
one; servers forget everything before a way begins. Gateways send a job on as it comes, and know exactly how many jobs
each server has. Every row is kept in `rows.jsonl`: the same command goes on where it was stopped, and only rounds that
all ways have played are compared.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import numpy as np

from eval.comfy_hosts import Fleet, fake_servers, real_servers
from eval.comfy_jobs import Arrival, Sessions, arrivals, work_s
from eval.result import Claim, Row, claim, table, write_result
from swarmx.compat.comfyui.graph import Graph, models_in

_CALIBRATION = 8  # graphs
_LOOK_S = 3.0  # between two looks for an end whose event did not come
_SLACK = 1  # jobs that model affinity lets a queue be longer by

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
OURS = "ours"
WAYS = (*BASELINES, OURS)


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


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """A job's seconds from its arrival to its end, and what its history says."""

    seconds: float
    server: str
    run_s: float | None = None
    forecast_p50_s: float | None = None
    forecast_p95_s: float | None = None
    parts: bool = False


class Block(msgspec.Struct, frozen=True, kw_only=True):
    """One way's jobs of one round, in the order of their arrival, without those to warm up."""

    round: int
    way: str
    done: list[Done]


class Ground(msgspec.Struct, frozen=True, kw_only=True):
    """What all blocks of a file have in common: what was asked for, and mean seconds of calibration by server."""

    asked: dict[str, str | float]
    mean_s: dict[str, float]


class Rows:
    """The file in which blocks are kept, behind their ground."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, asked: Mapping[str, str | float]) -> tuple[Ground | None, list[Block]]:
        """What an earlier run left; SystemExit where that run was asked for something else."""
        lines = self._path.read_bytes().splitlines() if self._path.exists() else []
        if not lines:
            return None, []
        ground = msgspec.json.decode(lines[0], type=Ground)
        if ground.asked != asked:
            raise SystemExit(f"{self._path} is of a run with {ground.asked}, not {asked}: choose another folder")
        return ground, [msgspec.json.decode(line, type=Block) for line in lines[1:]]

    def add(self, row: Ground | Block) -> None:
        """One more line, on disk when this returns."""
        with self._path.open("ab") as out:
            out.write(msgspec.json.encode(row) + b"\n")


async def play(fleet: Fleet, way: str, jobs: Sequence[Arrival]) -> list[Done]:
    """Send every job when it comes, and wait for all ends; in the order of arrival."""
    async with AsyncExitStack() as stack:
        made = BASELINES.get(way)
        await fleet.forget()
        urls = fleet.urls if made is not None else {"front": await stack.enter_async_context(fleet.front())}
        addresses = await stack.enter_async_context(listening(urls))
        rule = made(tuple(urls)) if made is not None else lambda graph, counts: "front"
        counts, loop = dict.fromkeys(urls, 0), asyncio.get_running_loop()
        began_s = loop.time()

        async def one(job: Arrival) -> Done:
            await asyncio.sleep(began_s + job.at_s - loop.time())
            chosen = rule(job.graph, counts)
            counts[chosen] += 1
            try:
                entry = await addresses[chosen].run(job.graph)
            finally:
                counts[chosen] -= 1
            facts = entry.get("swarmx", {})
            return Done(
                seconds=loop.time() - began_s - job.at_s,
                server=facts.get("server", chosen),
                run_s=facts.get("run_s"),
                forecast_p50_s=facts.get("forecast_p50_s"),
                forecast_p95_s=facts.get("forecast_p95_s"),
                parts="parts" in facts,
            )

        return list(await asyncio.gather(*(one(job) for job in jobs)))


async def calibrate(fleet: Fleet, graphs: Sequence[Graph]) -> dict[str, float]:
    """Mean seconds of these graphs by server, one after the other, on all servers at a time."""

    async def mean_s(address: Address) -> float:
        await address.run(graphs[-1])  # its results are gone again when its turn comes
        began_s = asyncio.get_running_loop().time()
        for graph in graphs:
            await address.run(graph)
        return (asyncio.get_running_loop().time() - began_s) / len(graphs)

    await fleet.forget()
    async with listening(fleet.urls) as addresses:
        found = await asyncio.gather(*map(mean_s, addresses.values()))
    return dict(zip(addresses, found, strict=True))


def row_of(way: str, done: Sequence[Done], fleet: Sequence[str]) -> Row:
    """Completion of jobs, how many the slowest server had, and how far forecasts were off."""
    p50_s, p95_s, p99_s = np.quantile([each.seconds for each in done], (0.5, 0.95, 0.99))
    slowest = (fleet[-1], f"s{len(fleet)}")
    known = [
        (each.forecast_p50_s / each.run_s, each.run_s <= each.forecast_p95_s)
        for each in done
        if each.run_s and each.forecast_p50_s is not None and each.forecast_p95_s is not None
    ]
    return {
        "way": way,
        "jobs": len(done),
        "p50_s": float(p50_s),
        "mean_s": float(np.mean([each.seconds for each in done])),
        "p95_s": float(p95_s),
        "p99_s": float(p99_s),
        "at_the_slowest": float(np.mean([each.server in slowest for each in done])),
        "in_parts": sum(each.parts for each in done) if known else None,
        "median_error": float(np.median([abs(share - 1.0) for share, _ in known])) if known else None,
        "below_p95": float(np.mean([below for _, below in known])) if known else None,
    }


def pooled(blocks: Sequence[Block], ways: Sequence[str]) -> dict[str, list[Done]]:
    """The jobs of each way, of rounds that all ways have played."""
    played = {(block.round, block.way): block.done for block in blocks}
    rounds = [number for number in sorted({n for n, _ in played}) if all((number, way) in played for way in ways)]
    return {way: [each for number in rounds for each in played[number, way]] for way in ways}


def verdict(blocks: Sequence[Block], fleet: Sequence[str]) -> tuple[list[Row], list[Claim]]:
    """Rows and claims of what was played so far; none before the first round is whole."""
    jobs = {way: done for way, done in pooled(blocks, WAYS).items() if done}
    if not jobs:
        return [], []
    rows = [row_of(way, done, fleet) for way, done in jobs.items()]
    p95_s = {way: float(np.quantile([each.seconds for each in done], 0.95)) for way, done in jobs.items()}
    best_s = min(p95_s[name] for name in BASELINES)
    return rows, [
        claim("P95 below round robin", 1.0 - p95_s[OURS] / p95_s["round robin"], ">=", 0.35),
        claim("P95 below the best baseline", 1.0 - p95_s[OURS] / best_s, ">=", 0.15),
    ]


async def compare(given: argparse.Namespace, folder: Path) -> tuple[list[Row], list[Claim]]:
    """All rounds, or those that are left."""
    asked: dict[str, str | float] = {
        "servers": "fake" if given.fake else "real", "slow": given.slow, "load": given.load, "jobs": given.jobs,
        "warm_up": given.warm_up, "seed": given.seed,
    }  # fmt: skip
    rows = Rows(given.out / "rows.jsonl")
    ground, blocks = rows.read(asked)
    costs = given.out / "node_costs.json"
    servers = (
        fake_servers(folder, costs, given.seed)
        if given.fake
        else real_servers(given.comfyui_dir.absolute(), folder, costs, given.slow)
    )
    async with servers as fleet:
        trial = Sessions(np.random.default_rng([given.seed, 0]))
        calibration = [trial.draw() for _ in range(_CALIBRATION)]
        if ground is None:
            ground = Ground(asked=asked, mean_s=await calibrate(fleet, calibration))
            rows.add(ground)
        measured: list[Row] = [{"way": f"calibration: {name}", "mean_s": s} for name, s in ground.mean_s.items()]
        print(table(measured), flush=True)
        capacity = sum(work_s(calibration) / each_s for each_s in ground.mean_s.values())  # measured seconds a second
        for number in range(given.rounds):
            count, rng = given.warm_up + given.jobs, np.random.default_rng([given.seed, 1 + number])
            jobs = arrivals(rng, count, load=given.load, capacity=capacity)
            for way in (*WAYS[number % len(WAYS) :], *WAYS[: number % len(WAYS)]):
                if any((block.round, block.way) == (number, way) for block in blocks):
                    continue
                done = (await play(fleet, way, jobs))[given.warm_up :]
                blocks.append(Block(round=number, way=way, done=done))
                rows.add(blocks[-1])
                print(table([{"round": number, **row_of(way, done, list(fleet.urls))}]), flush=True)
        found, claims = verdict(blocks, list(fleet.urls))
    return [*measured, *found], claims


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare all ways; 0 when the aims are met."""
    parser = argparse.ArgumentParser(prog="python -m eval comfy_servers", description=__doc__)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--fake", action="store_true", help="four servers without ComfyUI")
    kind.add_argument("--comfyui-dir", type=Path, help="a checkout of ComfyUI")
    parser.add_argument("--comfyui-python", type=Path, help="its interpreter")
    parser.add_argument("--slow", type=float, default=0.4, help="share of the time for which the second server runs")
    parser.add_argument("--load", type=float, default=0.7, help="of what the servers can do together")
    parser.add_argument("--rounds", type=int, default=2, help="draws of jobs and arrivals")
    parser.add_argument("--jobs", type=int, default=40, help="of each way in each round")
    parser.add_argument("--warm-up", type=int, default=8, help="jobs before those that count")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder for the result, and for what is left of it")
    given = parser.parse_args(arguments)
    if given.comfyui_dir is not None:
        if given.comfyui_python is None:
            parser.error("--comfyui-python is the interpreter that runs the servers")
        os.environ["COMFYUI_PYTHON"] = str(given.comfyui_python.absolute())
    os.environ.setdefault("SWARMX", str(Path(sys.executable).with_name("swarmx")))
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="comfy-servers-") as folder:
        rows, claims = asyncio.run(compare(given, Path(folder)))
    command = " ".join(["python -m eval comfy_servers", *(sys.argv[1:] if arguments is None else arguments)])
    print(table(rows))
    print(write_result(given.out, command, rows, claims, seeds=[given.seed]))
    return 0 if claims and all(each.met for each in claims) else 1


if __name__ == "__main__":
    sys.exit(main())
