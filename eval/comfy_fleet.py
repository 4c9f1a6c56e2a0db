"""What are forecasts worth to a fleet of ComfyUI servers? Emulated: four serial servers of unequal speed, virtual time.

Graphs are drawn from a few templates, as sessions of clients that change a seed, a prompt, the size or the end of their
graph. Costs of nodes are round figures of the kind that GPUs have, with noise, and one node whose time its inputs do
not tell. Baselines send a job to a server as it comes, where it waits in that server's queue, as gateways do; `central`
is their opposite without forecasts: one queue, the first free server takes the first job. The others are the front's
own scheduler; it learns from nothing, in the run.
"""

from __future__ import annotations

import argparse
import heapq
import math
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from eval.result import Claim, Row, claim, table, write_result
from swarmx.compat.comfyui.forecasts import JobFacts, JobForecaster, NodeForecaster, ServerState
from swarmx.compat.comfyui.graph import Graph
from swarmx.compat.comfyui.jobs import Job
from swarmx.compat.comfyui.scheduling import STRETCH, Scheduler, Waiting
from swarmx.core.forecast import Forecast, point
from swarmx.neural.heads.comfy_nodes import NodeWork

SPEEDS: Mapping[str, float] = {"one": 1.0, "two": 0.7, "three": 0.45, "four": 0.25}
LOADS = (0.7, 0.85)
WARM_UP, JOBS = 100, 600
_SEEDS = 3
_SESSIONS = 12
_MODELS = {"one.safetensors": 1.0, "two.safetensors": 1.6, "three.safetensors": 2.5}  # and how large they are
_STEPS, _SIDES, _BATCHES = (4, 8, 12, 20, 20, 25, 30, 50), (512, 768, 1024), (1, 1, 1, 2, 4)
_IN_MEMORY = 2  # checkpoints that the memory of a server holds
_COLD_S, _HELD_S = 4.0, 0.8  # a load from disk, and from memory, of the smallest
_EVALUATION_S, _DECODE_S, _UPSCALE_S, _SAVE_S, _DETAIL_S, _OTHER_S, _REST_S = 0.05, 0.3, 0.5, 0.08, 2.5, 0.02, 0.05
_NOISE = 0.08
_FOUND = 1.2  # faces in a picture
_TICK, _TICK_S = "tick", 1.0
_OUTPUT = ("9",)


@dataclass(slots=True, kw_only=True, eq=False)
class Arrival:
    """A job, when it comes, and what makes each of its nodes slower or faster than the rule, wherever it runs."""

    at_s: float
    graph: Graph
    facts: JobFacts
    luck: Mapping[str, float]


@dataclass(slots=True, kw_only=True)
class Server:
    """What a server really does: it runs a node if its last job left no result of it, and keeps some checkpoints."""

    name: str
    speed: float
    models: OrderedDict[str, None] = field(default_factory=OrderedDict)
    cached: frozenset[str] = frozenset()

    def would_take(self, job: Arrival) -> dict[str, float]:
        """Seconds of the nodes that it would have to run."""
        return {
            key: self._load_s(node.loads) if node.loads else _rule_s(node.work, job.luck[key]) / self.speed
            for key, node in job.facts.nodes.items()
            if node.signature not in self.cached
        }

    def run(self, job: Arrival) -> dict[str, float]:
        """The same, done."""
        took = self.would_take(job)
        for model in job.facts.models:
            self.models[model] = None
            self.models.move_to_end(model)
        while len(self.models) > _IN_MEMORY:
            self.models.popitem(last=False)
        self.cached = job.facts.signatures
        return took

    def _load_s(self, names: frozenset[str]) -> float:
        slow = 1.0 / math.sqrt(self.speed)  # disks differ less than GPUs
        return slow * sum(_MODELS[name] * (_HELD_S if name in self.models else _COLD_S) for name in names)


def _rule_s(work: NodeWork, luck: float) -> float:
    """Seconds of a node on a server of speed 1."""
    match work.class_type:
        case "ksampler":
            return luck * _EVALUATION_S * _MODELS[work.model] * (0.2 * work.amounts[0] + work.amounts[1])
        case "vaedecode":
            return luck * _DECODE_S * work.amounts[0]
        case "imagescaleby":
            return luck * _UPSCALE_S * work.amounts[0]
        case "saveimage":
            return luck * _SAVE_S * work.amounts[0]
        case "facedetailer":
            return luck * _DETAIL_S
        case _:
            return luck * _OTHER_S


class Sessions:
    """Clients that work on a graph each: most jobs are near the session's last one."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._states = [self._fresh() for _ in range(_SESSIONS)]

    def draw(self, at_s: float) -> Arrival:
        """The next job of some session: a new seed, a new prompt, another end, another size, or all of it new."""
        rng = self._rng
        index = int(rng.integers(len(self._states)))
        what, now = rng.random(), dict(self._states[index])
        if what < 0.45:
            now["seed"] = int(rng.integers(2**31))
        elif what < 0.6:
            now["text"], now["seed"] = int(rng.integers(2**31)), int(rng.integers(2**31))
        elif what < 0.75:
            now["end"] = str(rng.choice(["plain", "scaled", "faces"]))
        elif what < 0.9:
            now |= self._size()
        else:
            now = self._fresh()
        self._states[index] = now
        made = _graph(now)
        facts = JobFacts.of(made, _OUTPUT)
        luck = {
            key: float(rng.poisson(_FOUND) * now["batch"]) * (now["side"] / 1024) ** 2
            if node.work.class_type == "facedetailer"
            else math.exp(_NOISE * float(rng.normal()))
            for key, node in facts.nodes.items()
        }
        return Arrival(at_s=at_s, graph=made, facts=facts, luck=luck)

    def _fresh(self) -> dict[str, Any]:
        rng = self._rng
        return {
            "model": str(rng.choice(list(_MODELS), p=[0.5, 0.3, 0.2])),
            "text": int(rng.integers(2**31)),
            "seed": int(rng.integers(2**31)),
            "end": str(rng.choice(["plain", "plain", "scaled", "faces"])),
            "refined": bool(rng.random() < 0.3),
            **self._size(),
        }

    def _size(self) -> dict[str, Any]:
        rng = self._rng
        return {"steps": int(rng.choice(_STEPS)), "side": int(rng.choice(_SIDES)), "batch": int(rng.choice(_BATCHES))}


def _graph(now: Mapping[str, Any]) -> Graph:
    def node(name: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": name, "inputs": inputs}

    def sampler(latent: str, denoise: float) -> dict[str, Any]:
        return node(
            "KSampler", model=["4", 0], positive=["6", 0], negative=["7", 0], latent_image=[latent, 0], cfg=7.0,
            seed=now["seed"], steps=now["steps"], sampler_name="euler", scheduler="normal", denoise=denoise,
        )  # fmt: skip

    graph = {
        "4": node("CheckpointLoaderSimple", ckpt_name=now["model"]),
        "5": node("EmptyLatentImage", width=now["side"], height=now["side"], batch_size=now["batch"]),
        "6": node("CLIPTextEncode", clip=["4", 1], text=f"a lighthouse, number {now['text']}"),
        "7": node("CLIPTextEncode", clip=["4", 1], text="blurred"),
        "3": sampler("5", 1.0),
    }
    latent, image = "3", "8"
    if now["refined"]:
        graph["10"] = node("LatentUpscaleBy", samples=["3", 0], upscale_method="nearest-exact", scale_by=1.5)
        graph["11"] = sampler("10", 0.5)
        latent = "11"
    graph["8"] = node("VAEDecode", samples=[latent, 0], vae=["4", 2])
    if now["end"] == "scaled":
        graph["12"] = node("ImageScaleBy", image=["8", 0], upscale_method="lanczos", scale_by=2.0)
        image = "12"
    elif now["end"] == "faces":
        graph["13"] = node("FaceDetailer", image=["8", 0], model=["4", 0], steps=20)
        image = "13"
    graph["9"] = node("SaveImage", images=[image, 0], filename_prefix="fleet")
    return graph


def arrivals(load: float, seed: int, count: int = WARM_UP + JOBS) -> list[Arrival]:
    """Poisson arrivals at this share of what the servers could do with everything in memory and nothing cached."""
    rng = np.random.default_rng(seed)
    sessions = Sessions(rng)
    jobs = [sessions.draw(0.0) for _ in range(count)]
    warm = Server(name="", speed=1.0, models=OrderedDict.fromkeys(_MODELS))
    mean_s = float(np.mean([_REST_S + sum(warm.would_take(job).values()) for job in jobs]))
    at_s = np.cumsum(rng.exponential(mean_s / (load * sum(SPEEDS.values())), size=count))
    for job, time_s in zip(jobs, at_s, strict=True):
        job.at_s = float(time_s)
    return jobs


class Placing(Protocol):
    """Decides where jobs go."""

    def arrived(self, job: Arrival) -> None:
        """A job came."""
        ...

    def ended(self, server: str, took: Mapping[str, float]) -> None:
        """The server is free again; its job took this."""
        ...

    def starts(self, now_s: float) -> Iterator[tuple[str, Arrival]]:
        """Jobs that begin now, at servers that are free."""
        ...


Rule = Callable[[Arrival, Mapping[str, Sequence[Arrival]]], str]
"""Picks a server by the jobs that each has, the one that runs included."""


class Queues:
    """A queue for each server, and a rule that picks one as a job comes."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._of: dict[str, deque[Arrival]] = {name: deque() for name in SPEEDS}
        self._running: set[str] = set()

    def arrived(self, job: Arrival) -> None:
        self._of[self._rule(job, self._of)].append(job)

    def ended(self, server: str, took: Mapping[str, float]) -> None:
        self._of[server].popleft()
        self._running.discard(server)

    def starts(self, now_s: float) -> Iterator[tuple[str, Arrival]]:
        for name, queue in self._of.items():
            if queue and name not in self._running:
                self._running.add(name)
                yield name, queue[0]


def round_robin() -> Rule:
    """One after the other."""
    order = deque(SPEEDS)

    def rule(job: Arrival, queues: Mapping[str, Sequence[Arrival]]) -> str:
        order.rotate(-1)
        return order[-1]

    return rule


def least_queue() -> Rule:
    """The shortest queue, the server that runs included; of equal ones the fastest."""
    return lambda job, queues: min(SPEEDS, key=lambda name: (len(queues[name]), -SPEEDS[name]))


def affinity(slack: int) -> Rule:
    """Of servers that will have run the model last, the shortest queue, if it is longer than the shortest of all by
    `slack` jobs at most; else that one."""
    last: dict[str, frozenset[str]] = {}

    def rule(job: Arrival, queues: Mapping[str, Sequence[Arrival]]) -> str:
        shortest = min(map(len, queues.values()))
        near = [n for n in SPEEDS if last.get(n) == job.facts.models and len(queues[n]) <= shortest + slack]
        chosen = min(near or SPEEDS, key=lambda name: (len(queues[name]), -SPEEDS[name]))
        last[chosen] = job.facts.models
        return chosen

    return rule


class Central:
    """One queue; a free server takes the first job, the fastest one first."""

    def __init__(self) -> None:
        self._line = deque[Arrival]()
        self._idle = list(SPEEDS)

    def arrived(self, job: Arrival) -> None:
        self._line.append(job)

    def ended(self, server: str, took: Mapping[str, float]) -> None:
        self._idle.append(server)

    def starts(self, now_s: float) -> Iterator[tuple[str, Arrival]]:
        while self._line and self._idle:
            fastest = max(self._idle, key=SPEEDS.__getitem__)
            self._idle.remove(fastest)
            yield fastest, self._line.popleft()


class Ours:
    """The front's scheduler."""

    def __init__(self, forecaster: JobForecaster, *, stretch: float = STRETCH) -> None:
        self._scheduler = Scheduler(forecaster, stretch=stretch)
        for name in SPEEDS:
            self._scheduler.server(name, up=True)
        self._jobs: dict[str, Arrival] = {}
        self.judged: list[tuple[Forecast, float]] = []
        """What was forecast when a job began, and what it took."""

    def arrived(self, job: Arrival) -> None:
        seq = len(self._jobs) + 1
        made = Job(
            prompt_id=f"job{seq}", tenant="t", client_id=None, number=float(seq), seq=seq, priority=0, graph=job.graph,
            extra={}, targets=None, outputs=_OUTPUT, files=frozenset(), created_s=job.at_s,
        )  # fmt: skip
        self._jobs[made.prompt_id] = job
        waiting = Waiting(job=made, able=frozenset(SPEEDS), since_s=job.at_s, _facts=job.facts)
        self._scheduler.add(waiting)

    def ended(self, server: str, took: Mapping[str, float]) -> None:
        seconds = _REST_S + sum(took.values())
        self.judged.append((self._scheduler.running[server].forecast, seconds))
        self._scheduler.ended(server, seconds=seconds, nodes=took)

    def starts(self, now_s: float) -> Iterator[tuple[str, Arrival]]:
        while (placed := self._scheduler.next(now_s)) is not None:
            self._scheduler.started(placed.server, placed.waiting, placed.forecast, now_s)
            yield placed.server, self._jobs[placed.waiting.job.prompt_id]


class Means:
    """Another forecaster's means, without their spread."""

    def __init__(self, inner: JobForecaster) -> None:
        self._inner = inner

    def forecast(self, facts: JobFacts, server: ServerState) -> Forecast:
        return point(self._inner.forecast(facts, server).mean, unit="s", source="empirical")

    def ended(self, facts: JobFacts, server: ServerState, seconds: float, nodes: Mapping[str, float]) -> None:
        self._inner.ended(facts, server, seconds, nodes)


class Oracle:
    """What each job will take, exactly: no forecast can be worth more."""

    def __init__(self, jobs: Sequence[Arrival], servers: Mapping[str, Server]) -> None:
        self._jobs = {id(job.facts): job for job in jobs}
        self._servers = servers

    def forecast(self, facts: JobFacts, server: ServerState) -> Forecast:
        took = self._servers[server.name].would_take(self._jobs[id(facts)])
        return point(_REST_S + sum(took.values()), unit="s")

    def ended(self, facts: JobFacts, server: ServerState, seconds: float, nodes: Mapping[str, float]) -> None:
        """It knows."""


Made = Callable[[Sequence[Arrival], Mapping[str, Server]], Placing]
_SLACK = 1  # of 0, 1, 2 and 4 the best on other seeds, at both loads
BASELINES: Mapping[str, Made] = {
    "round robin": lambda jobs, servers: Queues(round_robin()),
    "least queue": lambda jobs, servers: Queues(least_queue()),
    "model affinity, least queue": lambda jobs, servers: Queues(affinity(_SLACK)),
}
WAYS: Mapping[str, Made] = {
    **BASELINES,
    "central": lambda jobs, servers: Central(),
    "ours, first come first served": lambda jobs, servers: Ours(NodeForecaster(), stretch=0.0),
    "ours, means": lambda jobs, servers: Ours(Means(NodeForecaster())),
    "ours": lambda jobs, servers: Ours(NodeForecaster()),
    "ours, told the truth": lambda jobs, servers: Ours(Oracle(jobs, servers)),
}


def simulate(jobs: Sequence[Arrival], made: Made) -> tuple[list[float], Placing]:
    """Seconds from arrival to end of every job, in the order of their arrival; and what placed them."""
    servers = {name: Server(name=name, speed=speed) for name, speed in SPEEDS.items()}
    placing = made(jobs, servers)
    numbers = {id(job): number for number, job in enumerate(jobs)}
    took_s = [math.nan] * len(jobs)
    events: list[tuple[float, int, str, Mapping[str, float]]] = [(job.at_s, n, "", {}) for n, job in enumerate(jobs)]
    heapq.heapify(events)
    order, open_count = len(jobs), len(jobs)
    heapq.heappush(events, (_TICK_S, order, _TICK, {}))
    while open_count:
        now_s, number, kind, took = heapq.heappop(events)
        if kind == _TICK:  # as the front does: who waits for a busy server may change his mind
            order += 1
            heapq.heappush(events, (now_s + _TICK_S, order, _TICK, {}))
        elif kind:
            placing.ended(kind, took)
            open_count -= 1
        else:
            placing.arrived(jobs[number])
        for server, job in placing.starts(now_s):
            order += 1
            took = servers[server].run(job)
            end_s = now_s + _REST_S + sum(took.values())
            took_s[numbers[id(job)]] = end_s - job.at_s
            heapq.heappush(events, (end_s, order, server, took))
    return took_s, placing


def measure(name: str, load: float, seeds: Sequence[int], count: int) -> Row:
    """Medians over the seeds of the completion of jobs after the warm-up, and of how forecasts were off."""
    found: dict[str, list[float]] = {}

    def note(**values: float) -> None:
        for key, value in values.items():
            found.setdefault(key, []).append(value)

    for seed in seeds:
        took_s, placing = simulate(arrivals(load, seed, count), WAYS[name])
        p50_s, p95_s, p99_s = np.quantile(took_s[WARM_UP:], (0.5, 0.95, 0.99))
        note(p50_s=float(p50_s), mean_s=float(np.mean(took_s[WARM_UP:])), p95_s=float(p95_s), p99_s=float(p99_s))
        if isinstance(placing, Ours):
            judged = placing.judged[WARM_UP:]
            note(
                median_error=float(np.median([abs(f.quantile(0.5) / s - 1.0) for f, s in judged])),
                below_p95=float(np.mean([s <= f.quantile(0.95) for f, s in judged])),
            )
    return {"load": load, "way": name, **{key: float(np.median(values)) for key, values in found.items()}}


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare all ways at all loads; 0 when the aims are met."""
    parser = argparse.ArgumentParser(prog="python -m eval comfy_fleet", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--seeds", type=int, default=_SEEDS)
    parser.add_argument("--jobs", type=int, default=JOBS, help=f"after {WARM_UP} to warm up")
    parser.add_argument("--out", type=Path, required=True, help="folder for the result")
    given = parser.parse_args(arguments)
    seeds = list(range(given.seed, given.seed + given.seeds))
    rows: list[Row] = []
    claims: list[Claim] = []
    for load in LOADS:
        found = {name: measure(name, load, seeds, WARM_UP + given.jobs) for name in WAYS}
        rows += found.values()
        p95_s = {name: float(row["p95_s"] or 0.0) for name, row in found.items()}
        best_s = min(p95_s[name] for name in BASELINES)
        claims.append(claim(f"P95 below round robin@{load}", 1.0 - p95_s["ours"] / p95_s["round robin"], ">=", 0.35))
        claims.append(claim(f"P95 below the best baseline@{load}", 1.0 - p95_s["ours"] / best_s, ">=", 0.15))
        print(table(list(found.values())), flush=True)
    command = " ".join(["python -m eval comfy_fleet", *(sys.argv[1:] if arguments is None else arguments)])
    print(write_result(given.out, command, rows, claims, seeds=seeds))
    return 0 if all(each.met for each in claims) else 1


if __name__ == "__main__":
    sys.exit(main())
