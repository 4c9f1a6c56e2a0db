"""A fleet of ComfyUI servers over real HTTP, behind SwarmX's front and behind the rules of other gateways.

`--comfyui-dir` starts two real servers on CPUs, with two random checkpoints. The second is slowed down by SIGSTOP and
SIGCONT for a share of every 50 ms; how much slower that makes it is measured and reported. `--fake` starts four
servers that speak the recorded protocol and take the time that nodes were measured to take on a real one; `--virtual`
plays the same jobs in virtual time, by more ways, the front's scheduler that is told the truth among them.

A round is one draw of jobs and of their arrivals, which every way plays: in turn on real servers, each round beginning
with another way, and at the same time on emulated ones, where each way has servers and a process of its own. Servers
forget everything before a way begins. Gateways send a job on as it comes, and know exactly how many jobs each server
has. Every row is kept in `rows.jsonl`: the same command goes on where it was stopped, and only rounds that all ways
have played are compared.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import numpy as np

from eval.comfy_hosts import Fleet, fake_servers, real_servers
from eval.comfy_jobs import FAKE_SPEEDS, FAKES, Arrival, Sessions, arrivals, virtual, work_s
from eval.comfy_virtual import RULES, simulate
from eval.comfy_virtual import WAYS as VIRTUAL_WAYS
from eval.result import Claim, Row, claim, table, write_result
from swarmx.compat.comfyui.graph import Graph, models_in

_CALIBRATION = 8  # graphs
_LOOK_S = 3.0  # between two looks for an end whose event did not come

OURS = "ours"
WAYS = (*RULES, OURS)


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
        made = RULES.get(way)
        await fleet.forget()
        urls = fleet.urls if made is not None else {"front": await stack.enter_async_context(fleet.front())}
        addresses = await stack.enter_async_context(listening(urls))
        rule = made(tuple(urls)) if made is not None else lambda models, counts: "front"
        counts, loop = dict.fromkeys(urls, 0), asyncio.get_running_loop()
        began_s = loop.time()

        async def one(job: Arrival) -> Done:
            await asyncio.sleep(began_s + job.at_s - loop.time())
            chosen = rule(models_in(job.graph), counts)
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


def play_alone(way: str, jobs: Sequence[Arrival], folder: Path, costs: Path, seed: int) -> list[Done]:
    """`play` on four emulated servers that this process starts and ends."""

    async def whole() -> list[Done]:
        async with fake_servers(folder, costs, seed) as fleet:
            return await play(fleet, way, jobs)

    return asyncio.run(whole())


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
        "at_the_slowest": float(np.mean([each.server in slowest for each in done])) if done[0].server else None,
        "in_parts": sum(each.parts for each in done) if known else None,
        "median_error": float(np.median([abs(share - 1.0) for share, _ in known])) if known else None,
        "below_p95": float(np.mean([below for _, below in known])) if known else None,
    }


def pooled(blocks: Sequence[Block], ways: Collection[str]) -> dict[str, list[Done]]:
    """The jobs of each way, of rounds that all ways have played."""
    played = {(block.round, block.way): block.done for block in blocks}
    rounds = [number for number in sorted({n for n, _ in played}) if all((number, way) in played for way in ways)]
    return {way: [each for number in rounds for each in played[number, way]] for way in ways}


def verdict(
    blocks: Sequence[Block], fleet: Sequence[str], ways: Collection[str] = WAYS
) -> tuple[list[Row], list[Claim]]:
    """Rows and claims of what was played so far; none before the first round is whole."""
    jobs = {way: done for way, done in pooled(blocks, ways).items() if done}
    if not jobs:
        return [], []
    rows = [row_of(way, done, fleet) for way, done in jobs.items()]
    p95_s = {way: float(np.quantile([each.seconds for each in done], 0.95)) for way, done in jobs.items()}
    best_s = min(p95_s[name] for name in RULES)
    return rows, [
        claim("P95 below round robin", 1.0 - p95_s[OURS] / p95_s["round robin"], ">=", 0.35),
        claim("P95 below the best baseline", 1.0 - p95_s[OURS] / best_s, ">=", 0.15),
    ]


def asked_for(given: argparse.Namespace) -> dict[str, str | float]:
    """What makes rows comparable."""
    kind = "fake" if given.fake else "virtual" if given.virtual else "real"
    return {
        "servers": kind, "slow": given.slow, "load": given.load, "jobs": given.jobs, "warm_up": given.warm_up,
        "seed": given.seed,
    }  # fmt: skip


def drawn(given: argparse.Namespace, number: int, capacity: float) -> list[Arrival]:
    """The jobs of a round. `capacity` is in seconds of measured work a second."""
    rng = np.random.default_rng([given.seed, 1 + number])
    return arrivals(rng, given.warm_up + given.jobs, load=given.load, capacity=capacity)


@dataclass(slots=True, kw_only=True)
class Match:
    """What was played so far on a fleet, whose fastest server comes first, and the file that keeps it.

    The first `warm_up` jobs of a round do not count.
    """

    rows: Rows
    blocks: list[Block]
    fleet: Sequence[str]
    warm_up: int

    def left(self, number: int, ways: Iterable[str]) -> list[str]:
        """Those of the ways that have not played the round yet."""
        played = {block.way for block in self.blocks if block.round == number}
        return [way for way in ways if way not in played]

    def played(self, number: int, way: str, done: Sequence[Done]) -> None:
        """Keep it, and show it."""
        self.blocks.append(Block(round=number, way=way, done=list(done[self.warm_up :])))
        self.rows.add(self.blocks[-1])
        print(table([{"round": number, **row_of(way, self.blocks[-1].done, self.fleet)}]), flush=True)


async def on_real_servers(given: argparse.Namespace, folder: Path, rows: Rows) -> tuple[list[Row], list[Claim]]:
    """All rounds, or those that are left: one way after the other."""
    asked = asked_for(given)
    ground, blocks = rows.read(asked)
    costs = given.out / "node_costs.json"
    async with real_servers(given.comfyui_dir.absolute(), folder, costs, given.slow) as fleet:
        match = Match(rows=rows, blocks=blocks, fleet=list(fleet.urls), warm_up=given.warm_up)
        trial = Sessions(np.random.default_rng([given.seed, 0]))
        calibration = [trial.draw() for _ in range(_CALIBRATION)]
        if ground is None:
            ground = Ground(asked=asked, mean_s=await calibrate(fleet, calibration))
            rows.add(ground)
        measured: list[Row] = [{"way": f"calibration: {name}", "mean_s": s} for name, s in ground.mean_s.items()]
        print(table(measured), flush=True)
        capacity = sum(work_s(calibration) / each_s for each_s in ground.mean_s.values())
        for number in range(given.rounds):
            jobs, first = drawn(given, number, capacity), number % len(WAYS)
            for way in match.left(number, (*WAYS[first:], *WAYS[:first])):
                match.played(number, way, await play(fleet, way, jobs))
    found, claims = verdict(blocks, match.fleet)
    return [*measured, *found], claims


def on_fakes(given: argparse.Namespace, folder: Path, rows: Rows) -> tuple[list[Row], list[Claim]]:
    """All rounds, or those that are left: all ways of a round at the same time."""
    match, costs = emulated(given, rows), given.out / "node_costs.json"
    with ProcessPoolExecutor(len(WAYS), multiprocessing.get_context("spawn")) as pool:
        for number in range(given.rounds):
            jobs = drawn(given, number, sum(FAKE_SPEEDS.values()))
            playing = {
                pool.submit(play_alone, way, jobs, folder / f"{number} {way}", costs, given.seed): way
                for way in match.left(number, WAYS)
            }
            for done in as_completed(playing):
                match.played(number, playing[done], done.result())
    return verdict(match.blocks, match.fleet)


def in_virtual_time(given: argparse.Namespace, rows: Rows) -> tuple[list[Row], list[Claim]]:
    """What `on_fakes` plays, without servers."""
    match = emulated(given, rows)
    for number in range(given.rounds):
        jobs = virtual(drawn(given, number, sum(FAKE_SPEEDS.values())), given.seed)
        for way in match.left(number, VIRTUAL_WAYS):
            took_s, _ = simulate(FAKES, jobs, VIRTUAL_WAYS[way])
            match.played(number, way, [Done(seconds=each_s, server="") for each_s in took_s])
    return verdict(match.blocks, match.fleet, VIRTUAL_WAYS)


def emulated(given: argparse.Namespace, rows: Rows) -> Match:
    """What was played on the four emulated servers; their speeds are known without a calibration."""
    asked = asked_for(given)
    ground, blocks = rows.read(asked)
    if ground is None:
        rows.add(Ground(asked=asked, mean_s={}))
    return Match(rows=rows, blocks=blocks, fleet=list(FAKE_SPEEDS), warm_up=given.warm_up)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare all ways; 0 when the aims are met."""
    parser = argparse.ArgumentParser(prog="python -m eval comfy_servers", description=__doc__)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--fake", action="store_true", help="four servers without ComfyUI")
    kind.add_argument("--virtual", action="store_true", help="the same four in virtual time")
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
        kept = Rows(given.out / "rows.jsonl")
        if given.comfyui_dir is not None:
            rows, claims = asyncio.run(on_real_servers(given, Path(folder), kept))
        elif given.fake:
            rows, claims = on_fakes(given, Path(folder), kept)
        else:
            rows, claims = in_virtual_time(given, kept)
    command = " ".join(["python -m eval comfy_servers", *(sys.argv[1:] if arguments is None else arguments)])
    print(table(rows))
    print(write_result(given.out, command, rows, claims, seeds=[given.seed]))
    return 0 if claims and all(each.met for each in claims) else 1


if __name__ == "__main__":
    sys.exit(main())
