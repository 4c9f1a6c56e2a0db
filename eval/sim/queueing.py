"""Queues whose waiting times the books know, for the simulator to reproduce."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from eval.result import Row
from eval.sim.settings import SimSettings
from eval.sim.simulate import simulate
from eval.workloads.plan import PlannedCall, PlannedWorkflow, Workload
from swarmx.agents.router_settings import RouterSettings
from swarmx.core.engine import EngineProfile
from swarmx.core.forecast import LEVELS
from swarmx.core.nouns import CallKind, Replica

Floats = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], Floats]

UNIT_S = 0.001
SERIAL = EngineProfile(model="m", device="serial", step_base_s=UNIT_S, max_batch=1)
# A batch of n takes n units of time a step: everybody gets the same share of one processor.
SHARING = EngineProfile(
    model="m", device="sharing", step_base_s=1e-7, decode_seq_s=UNIT_S, max_batch=10_000, max_step_tokens=20_000
)
_TRIM = 0.1


def exponential(rng: np.random.Generator, count: int) -> Floats:
    return rng.exponential(1.0, size=count)


def constant(rng: np.random.Generator, count: int) -> Floats:
    return np.ones(count)


def hyperexponential(rng: np.random.Generator, count: int) -> Floats:
    """Nine in ten take half a second, one in ten 5.5: a squared coefficient of variation of 5.5."""
    return np.where(rng.random(count) < 0.9, rng.exponential(0.5, count), rng.exponential(5.5, count))


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """Poisson arrivals at `load` * `servers` a second, services of mean 1; `expected_s` is the mean time in system."""

    name: str
    servers: int
    load: float
    services: Draw
    expected_s: float
    profile: EngineProfile = SERIAL


def pollaczek_khinchine(load: float, scv: float) -> float:
    """Mean time in an M/G/1 queue with services of mean 1 and this squared coefficient of variation."""
    return 1.0 + load * (1.0 + scv) / (2.0 * (1.0 - load))


def erlang_c(servers: int, load: float) -> float:
    """Mean time in an M/M/c queue with services of mean 1."""
    offered = servers * load
    last = offered**servers / math.factorial(servers) / (1.0 - load)
    waits = last / (sum(offered**k / math.factorial(k) for k in range(servers)) + last)
    return 1.0 + waits / (servers * (1.0 - load))


QUEUES = (
    Queue(name="M/M/1", servers=1, load=0.7, services=exponential, expected_s=1.0 / 0.3),
    Queue(name="M/D/1", servers=1, load=0.7, services=constant, expected_s=pollaczek_khinchine(0.7, 0.0)),
    Queue(name="M/G/1", servers=1, load=0.5, services=hyperexponential, expected_s=pollaczek_khinchine(0.5, 5.5)),
    Queue(name="M/M/4", servers=4, load=0.8, services=exponential, expected_s=erlang_c(4, 0.8)),
    Queue(name="M/M/16", servers=16, load=0.9, services=exponential, expected_s=erlang_c(16, 0.9)),
    Queue(name="M/M/1-PS", servers=1, load=0.6, services=exponential, expected_s=2.5, profile=SHARING),
    Queue(name="M/D/1-PS", servers=1, load=0.6, services=constant, expected_s=2.5, profile=SHARING),
)


def fleet_of(profile: EngineProfile, count: int) -> list[Replica]:
    """So many replicas on this profile."""
    kind: CallKind = "image" if profile.max_batch == 1 else "llm"
    return [
        Replica(
            replica_id=f"{profile.device}-{i}", model=profile.model, kind=kind, device=profile.device, url="",
            profile=profile, provider="simulated", emulated=True,
        )
        for i in range(count)
    ]  # fmt: skip


def single_calls(
    at_s: Sequence[float], prompt_tokens: Sequence[int], work: Sequence[float], kind: CallKind
) -> Workload:
    """Workflows of one call each for the model "m"."""
    return Workload(
        name="single calls",
        workflows=[
            PlannedWorkflow(
                workflow_id=str(i), kind="single", at_s=t,
                calls=(
                    PlannedCall(
                        role="call", model="m", kind=kind, after=(), gap_s=0.0, prompt_tokens=p, work=w, work_limit=w,
                        blocks=(), forecast=0,
                    ),
                ),
            )
            for i, (t, p, w) in enumerate(zip(at_s, prompt_tokens, work, strict=True))
        ],
        quantiles=np.ones((1, len(LEVELS)), dtype=np.float32),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sample:
    """Arrivals and whole units of work of one run of a queue, both of shape [calls]."""

    at_s: Floats
    units: Floats


def sample(queue: Queue, count: int, seed: int) -> Sample:
    """`count` calls of this queue."""
    rng = np.random.default_rng([seed, 0x0E0E])
    at_s = np.cumsum(rng.exponential(1.0 / (queue.load * queue.servers), size=count))
    return Sample(at_s, np.maximum(1.0, np.round(queue.services(rng, count) / UNIT_S)))


def mean_time_s(queue: Queue, drawn: Sample) -> float:
    """Mean time in the simulated system, without the first tenth."""
    count = len(drawn.at_s)
    shared = queue.profile is SHARING  # the first token is free there: it comes with the prefill
    work = (drawn.units + shared).tolist()
    plan = single_calls(drawn.at_s.tolist(), [int(shared)] * count, work, "llm" if shared else "image")
    settings = SimSettings(
        router=RouterSettings(policy="least_outstanding", log_decisions=False, demand_every_s=0.0),
        forecast="oracle", network_s=0.0, forecast_s=0.0, decision_s=0.0, signal_every_s=0.0, drain_s=1e6,
    )  # fmt: skip
    outcome = simulate(plan, fleet_of(queue.profile, queue.servers), settings)
    return float(outcome.latency(trim=_TRIM).mean())


def recursion_s(servers: int, drawn: Sample) -> float:
    """The same mean for first come, first served, call by call (Lindley 1952; Kiefer and Wolfowitz 1955)."""
    free_s = [0.0] * servers
    took_s: list[float] = []
    for at_s, service_s in zip(drawn.at_s.tolist(), (drawn.units * UNIT_S).tolist(), strict=True):
        end_s = max(at_s, heappop(free_s)) + service_s
        heappush(free_s, end_s)
        took_s.append(end_s - at_s)
    return float(np.mean(took_s[int(_TRIM * len(took_s)) :]))


def queue_rows(count: int, seeds: Sequence[int]) -> list[Row]:
    """Each queue by the book and in the simulator: the mean over seeds, and its standard error.

    `ratio_same` is to the recursion on the very arrivals and services that were simulated, where there is one.
    """
    rows: list[Row] = []
    for queue in QUEUES:
        drawn = [sample(queue, count, seed) for seed in seeds]
        found = [mean_time_s(queue, each) for each in drawn]
        same = None
        if queue.profile is SERIAL:
            same = float(np.mean(found) / np.mean([recursion_s(queue.servers, each) for each in drawn]))
        spread = float(np.std(found, ddof=1) / math.sqrt(len(found))) if len(found) > 1 else math.nan
        rows.append(
            {
                "part": "queueing", "queue": queue.name, "load": queue.load, "calls": count * len(seeds),
                "expected_s": queue.expected_s, "simulated_s": float(np.mean(found)), "standard_error_s": spread,
                "ratio": float(np.mean(found)) / queue.expected_s, "ratio_same": same,
            }
        )  # fmt: skip
    return rows
