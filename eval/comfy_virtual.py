"""Serial ComfyUI servers in virtual time, and what places jobs on them.

Baselines send a job to a server as it comes, where it waits in that server's queue, as gateways do; `central` is their
opposite without forecasts: one queue, the first free server takes the first job. The others are the front's own
scheduler.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from swarmx.compat.comfyui.forecasts import JobFacts, JobForecaster, NodeFacts, NodeForecaster, ServerState
from swarmx.compat.comfyui.graph import Graph
from swarmx.compat.comfyui.jobs import Job
from swarmx.compat.comfyui.scheduling import Scheduler, Waiting
from swarmx.core.forecast import Forecast, point

SLACK = 1  # jobs that model affinity lets a queue be longer by: of 0, 1, 2 and 4 the best on the seeds for tuning
_TICK, _TICK_S = "tick", 1.0


@dataclass(slots=True, kw_only=True, eq=False)
class VirtualJob:
    """A job, when it comes, and what makes each of its nodes slower or faster than the rule, wherever it runs."""

    at_s: float
    graph: Graph
    outputs: tuple[str, ...]
    facts: JobFacts
    luck: Mapping[str, float]


class NodeSeconds(Protocol):
    """What a node takes."""

    def __call__(self, node: NodeFacts, speed: float, in_memory: Mapping[str, None]) -> float:
        """Seconds on a server of this speed that has these models, without luck."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Servers by speed, fastest first, that keep so many `models`; and what nodes take, and jobs beside them."""

    speeds: Mapping[str, float]
    models: int
    node_s: NodeSeconds
    rest_s: float

    def servers(self) -> dict[str, Server]:
        """All of them, with nothing in memory."""
        return {name: Server(world=self, name=name, speed=speed) for name, speed in self.speeds.items()}


@dataclass(slots=True, kw_only=True)
class Server:
    """What a server really does: it runs a node if its last job left no result of it, and keeps some models."""

    world: World
    name: str
    speed: float
    models: OrderedDict[str, None] = field(default_factory=OrderedDict)
    cached: frozenset[str] = frozenset()

    def would_take(self, job: VirtualJob) -> dict[str, float]:
        """Seconds of the nodes that it would have to run."""
        return {
            key: self.world.node_s(node, self.speed, self.models) * job.luck[key]
            for key, node in job.facts.nodes.items()
            if node.signature not in self.cached
        }

    def run(self, job: VirtualJob) -> dict[str, float]:
        """The same, done."""
        took = self.would_take(job)
        for model in job.facts.models:
            self.models[model] = None
            self.models.move_to_end(model)
        while len(self.models) > self.world.models:
            self.models.popitem(last=False)
        self.cached = job.facts.signatures
        return took


class Placing(Protocol):
    """Decides where jobs go."""

    def arrived(self, job: VirtualJob) -> None:
        """A job came."""
        ...

    def ended(self, server: str, took: Mapping[str, float]) -> None:
        """The server is free again; its job took this."""
        ...

    def starts(self, now_s: float) -> Iterator[tuple[str, VirtualJob]]:
        """Jobs that begin now, at servers that are free."""
        ...


class Rule(Protocol):
    """Picks a server as a job comes."""

    def __call__(self, models: frozenset[str], jobs: Mapping[str, int]) -> str:
        """By the models of the job, and how many jobs each server has, the one that runs included."""
        ...


def round_robin(names: Sequence[str]) -> Rule:
    """One after the other."""
    order = deque(names)

    def rule(models: frozenset[str], jobs: Mapping[str, int]) -> str:
        order.rotate(-1)
        return order[-1]

    return rule


def least_queue(names: Sequence[str]) -> Rule:
    """The fewest jobs; of equals the first name, which is the fastest."""
    return lambda models, jobs: min(names, key=lambda name: (jobs[name], names.index(name)))


def affinity(names: Sequence[str], slack: int = SLACK) -> Rule:
    """Of servers that will have run the models last, the fewest jobs, if these are by `slack` more than the fewest of
    all at most; else those."""
    last: dict[str, frozenset[str]] = {}

    def rule(models: frozenset[str], jobs: Mapping[str, int]) -> str:
        fewest = min(jobs.values())
        near = [name for name in names if last.get(name) == models and jobs[name] <= fewest + slack]
        chosen = min(near or names, key=lambda name: (jobs[name], names.index(name)))
        last[chosen] = models
        return chosen

    return rule


RULES: Mapping[str, Callable[[Sequence[str]], Rule]] = {
    "round robin": round_robin,
    "least queue": least_queue,
    "model affinity, least queue": affinity,
}


class Queues:
    """A queue for each server, and a rule that picks one as a job comes."""

    def __init__(self, names: Sequence[str], rule: Rule) -> None:
        self._rule = rule
        self._of: dict[str, deque[VirtualJob]] = {name: deque() for name in names}
        self._running: set[str] = set()

    def arrived(self, job: VirtualJob) -> None:
        counts = {name: len(queue) for name, queue in self._of.items()}
        self._of[self._rule(job.facts.models, counts)].append(job)

    def ended(self, server: str, took: Mapping[str, float]) -> None:
        self._of[server].popleft()
        self._running.discard(server)

    def starts(self, now_s: float) -> Iterator[tuple[str, VirtualJob]]:
        for name, queue in self._of.items():
            if queue and name not in self._running:
                self._running.add(name)
                yield name, queue[0]


class Central:
    """One queue; a free server takes the first job, the fastest one first."""

    def __init__(self, speeds: Mapping[str, float]) -> None:
        self._line = deque[VirtualJob]()
        self._speeds = speeds
        self._idle = list(speeds)

    def arrived(self, job: VirtualJob) -> None:
        self._line.append(job)

    def ended(self, server: str, took: Mapping[str, float]) -> None:
        self._idle.append(server)

    def starts(self, now_s: float) -> Iterator[tuple[str, VirtualJob]]:
        while self._line and self._idle:
            fastest = max(self._idle, key=self._speeds.__getitem__)
            self._idle.remove(fastest)
            yield fastest, self._line.popleft()


class Ours:
    """The front's scheduler."""

    def __init__(self, world: World, forecaster: JobForecaster, *, by_ratio: bool = True) -> None:
        self._world = world
        self._scheduler = Scheduler(forecaster, by_ratio=by_ratio)
        for name in world.speeds:
            self._scheduler.server(name, up=True)
        self._jobs: dict[str, VirtualJob] = {}
        self.judged: list[tuple[Forecast, float]] = []
        """What was forecast when a job began, and what it took."""

    def arrived(self, job: VirtualJob) -> None:
        seq = len(self._jobs) + 1
        made = Job(
            prompt_id=f"job{seq}", tenant="t", client_id=None, number=float(seq), seq=seq, priority=0, graph=job.graph,
            extra={}, outputs=job.outputs, files=frozenset(), created_s=job.at_s,
        )  # fmt: skip
        self._jobs[made.prompt_id] = job
        able = frozenset(self._world.speeds)
        self._scheduler.add(Waiting(job=made, able=able, since_s=job.at_s, _facts=job.facts))

    def ended(self, server: str, took: Mapping[str, float]) -> None:
        seconds = self._world.rest_s + sum(took.values())
        self.judged.append((self._scheduler.running[server].forecast, seconds))
        self._scheduler.ended(server, seconds=seconds, nodes=took)

    def starts(self, now_s: float) -> Iterator[tuple[str, VirtualJob]]:
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

    def __init__(self, jobs: Sequence[VirtualJob], servers: Mapping[str, Server]) -> None:
        self._jobs = {id(job.facts): job for job in jobs}
        self._servers = servers

    def forecast(self, facts: JobFacts, server: ServerState) -> Forecast:
        real = self._servers[server.name]
        return point(real.world.rest_s + sum(real.would_take(self._jobs[id(facts)]).values()), unit="s")

    def ended(self, facts: JobFacts, server: ServerState, seconds: float, nodes: Mapping[str, float]) -> None:
        """It knows."""


class Way(Protocol):
    """How jobs are placed, made anew for each run."""

    def __call__(self, world: World, jobs: Sequence[VirtualJob], servers: Mapping[str, Server]) -> Placing: ...


def _by(made: Callable[[Sequence[str]], Rule]) -> Way:
    return lambda world, jobs, servers: Queues(tuple(servers), made(tuple(servers)))


BASELINES: Mapping[str, Way] = {name: _by(made) for name, made in RULES.items()}
WAYS: Mapping[str, Way] = {
    **BASELINES,
    "central": lambda world, jobs, servers: Central(world.speeds),
    "ours, first come first served": lambda world, jobs, servers: Ours(world, NodeForecaster(), by_ratio=False),
    "ours, means": lambda world, jobs, servers: Ours(world, Means(NodeForecaster())),
    "ours": lambda world, jobs, servers: Ours(world, NodeForecaster()),
    "ours, told the truth": lambda world, jobs, servers: Ours(world, Oracle(jobs, servers)),
}


def simulate(world: World, jobs: Sequence[VirtualJob], way: Way) -> tuple[list[float], Placing]:
    """Seconds from arrival to end of every job, in the order of their arrival; and what placed them."""
    servers = world.servers()
    placing = way(world, jobs, servers)
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
            end_s = now_s + world.rest_s + sum(took.values())
            took_s[numbers[id(job)]] = end_s - job.at_s
            heapq.heappush(events, (end_s, order, server, took))
    return took_s, placing
