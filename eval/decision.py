"""How long the router thinks about one call: `python -m eval.decision --out DIR`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from eval.result import Claim, Row, claim, table, write_result
from swarmx.agents.policies import DEFAULT_POLICY, POLICIES
from swarmx.agents.router import RouterAgent
from swarmx.agents.router_settings import RouterSettings
from swarmx.core.engine import profiles
from swarmx.core.forecast import from_samples
from swarmx.core.messages import CallFinished, CallReady, FirstToken, ReplicaChanged, SignalReported
from swarmx.core.nouns import Call, Replica

MODEL = "qwen3-8b"
IN_FLIGHT_PER_REPLICA = 8
WARM_UP = 200


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the result."""
    parser = argparse.ArgumentParser(prog="python -m eval.decision", description=__doc__)
    parser.add_argument("--replicas", type=_numbers, default=[10, 100, 1000], help="fleet sizes, by comma")
    parser.add_argument("--calls", type=int, default=5000, help="decisions measured for each fleet and policy")
    parser.add_argument("--policies", type=_names, default=list(POLICIES), help="by comma; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder for result.json and result.md")
    options = parser.parse_args(arguments)
    rows = [
        measure(policy, replicas=replicas, calls=options.calls, seed=options.seed)
        for replicas in options.replicas
        for policy in options.policies
    ]
    command = " ".join(["python -m eval.decision", *(sys.argv[1:] if arguments is None else arguments)])
    claims = list(claims_of(rows))
    path = write_result(options.out, command, rows, claims, [options.seed])
    print(table(rows))
    for made in claims:
        print(f"{made.name}: {made.value:.3f} {made.op} {made.aim:g} {'met' if made.met else 'NOT met'}")
    print(f"Written to {path}.")
    return 0


def measure(policy: str, *, replicas: int, calls: int, seed: int) -> Row:
    """Time `handle(CallReady)` while calls come and finish, eight in flight a replica on average.

    Wall time includes whatever else the machine does; CPU time is this thread's own.
    """
    rng = np.random.default_rng(seed)
    agent = _fleet(policy, replicas)
    now_s, in_flight = 0.0, list[str]()
    wall_ns, cpu_ns = np.zeros(calls), np.zeros(calls)
    arrivals = _arrivals(rng)
    for message in islice(arrivals, IN_FLIGHT_PER_REPLICA * replicas):
        agent.handle(message, now_s)
        in_flight.append(message.call.call_id)
    for i in range(-WARM_UP, calls):
        now_s += 0.01
        message = next(arrivals)
        wall, cpu = _timed(lambda message=message, now_s=now_s: agent.handle(message, now_s))  # type: ignore[misc]
        if i >= 0:
            wall_ns[i], cpu_ns[i] = wall, cpu
        in_flight.append(message.call.call_id)
        position = int(rng.integers(len(in_flight)))
        in_flight[position], ending = in_flight[-1], in_flight[position]
        in_flight.pop()
        agent.handle(FirstToken(call_id=ending, attempt=1), now_s)
        agent.handle(
            CallFinished(call_id=ending, attempt=1, prompt_tokens=500, cached_tokens=0, work_done=200.0), now_s
        )
    agent.validate()
    return {
        "experiment": "decision",
        "policy": policy,
        "replicas": replicas,
        "calls": calls,
        "seed": seed,
        "wall_p50_ms": float(np.percentile(wall_ns, 50)) / 1e6,
        "wall_p99_ms": float(np.percentile(wall_ns, 99)) / 1e6,
        "cpu_mean_ms": float(cpu_ns.mean()) / 1e6,
        "cpu_p50_ms": float(np.percentile(cpu_ns, 50)) / 1e6,
        "cpu_p99_ms": float(np.percentile(cpu_ns, 99)) / 1e6,
    }


def claims_of(rows: Sequence[Row]) -> Iterator[Claim]:
    """The aims for the default policy, as far as the rows speak about them."""
    for row in rows:
        if row["policy"] != DEFAULT_POLICY:
            continue
        if row["replicas"] == 10:
            yield claim("decision_p50_cpu_ms@10", _number(row["cpu_p50_ms"]), "<=", 0.1)
        if row["replicas"] == 32:
            yield claim("decision_p50_ms@32", _number(row["wall_p50_ms"]), "<=", 0.1)
        if row["replicas"] == 1000:
            yield claim("decision_p99_ms@1000", _number(row["wall_p99_ms"]), "<", 1.0)


def _fleet(policy: str, replicas: int) -> RouterAgent:
    agent = RouterAgent(RouterSettings(policy=policy))
    known = [profile for (model, _), profile in sorted(profiles().items()) if model == MODEL]
    for number, profile in enumerate(islice(cycle(known), replicas)):
        replica = Replica(
            replica_id=f"{MODEL}-{profile.device}-{number}",
            model=MODEL,
            kind="llm",
            device=profile.device,
            url="http://127.0.0.1:0",
            profile=profile,
            provider="none",
            emulated=True,
        )
        agent.handle(ReplicaChanged(replica=replica, state="ready"), 0.0)
        agent.handle(
            SignalReported(replica_id=replica.replica_id, running=8, waiting=0, kv_usage=0.2, measured_at_s=0.0), 0.0
        )
    return agent


def _arrivals(rng: np.random.Generator) -> Iterator[CallReady]:
    number = 0
    while True:
        number += 1
        prompt_tokens = int(rng.lognormal(6.5, 1.0)) + 1
        call = Call(
            call_id=f"call_{number:024x}",
            tenant="eval",
            kind="llm",
            model=MODEL,
            role="writer",
            workflow_id="none",
            workflow_kind="eval",
            node="n",
            prompt_key=f"{number:016x}",
            prompt_bytes=4 * prompt_tokens,
            prompt_tokens=prompt_tokens,
            work_limit=4096.0,
            stream=True,
        )
        yield CallReady(call=call, forecast=from_samples(rng.lognormal(5.4, 0.9, size=32).tolist(), unit="tokens"))


def _timed(work: Callable[[], object]) -> tuple[int, int]:
    cpu, wall = time.thread_time_ns(), time.perf_counter_ns()
    work()
    return time.perf_counter_ns() - wall, time.thread_time_ns() - cpu


def _number(value: object) -> float:
    assert isinstance(value, float)
    return value


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    return text.split(",")


if __name__ == "__main__":
    sys.exit(main())
