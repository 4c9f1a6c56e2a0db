"""What a request router adds to Ray Serve's own path: SwarmX's, and those that Serve ships, before idle replicas.

Real Ray Serve on this machine, an application for each router, all up at once, each with four replicas that answer at
once and take so many requests that nobody waits. One process sends chat completions through handles, open loop, at some
rates; the routers take turns in short blocks, so that the moods of the machine hit all alike. Needs `make setup-ray`:

    .venv-ray/bin/python -m eval.ray_serve_overhead --out DIR [--prompts FOLDER] [--blocks 6] [--rates 10,50]

Measured of each request: for how long Serve waits for the router to name a replica (`choose`, by the clock;
`choose_cpu` of the router's thread); from `handle.remote()` until a replica has taken it (`accepted`), and until the
answer is there (`answer`). `thread` is the mean of all that the router's thread does, put off or not. SwarmX's own word
is `decision`, `decision_cpu` and `added`. A row "swarmx - power_of_two" is what SwarmX takes beyond Serve's default,
with a 90 % interval from resampled requests. Where the machine cannot keep up with a rate, all of it is waiting.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from eval.ray_serve import config, deploy, serving
from eval.ray_serve_plan import OURS, Asked, add_routers, plan
from eval.result import Claim, Row, Value, claim, table, write_result

THEIRS = "power_of_two"  # Serve's default
_ROUTERS = (THEIRS, "round_robin", "capacity_queue", OURS)
_SECONDS = {10: 8.0, 50: 3.0}  # of a block at this rate
_LEAST_S = 1.5
_MOST_ONGOING = 100
_WARM_UP, _WARM_UP_RATE = 300, 100
_LEAD = 5  # requests of a block, which find old queue lengths and the like: not counted
_REST_S = 0.5  # after a block, for what is done about its last answers
_RESAMPLED = 2000
_AIM_MS = 1.0
Call = tuple[str, Asked]
"""A session, and a request of it."""
Times = Mapping[str, Sequence[float]]
"""Milliseconds of requests, by what was measured."""


class Model:
    """A replica that has the answer at once."""

    async def __call__(self, asked: Asked) -> dict[str, Any]:
        return {"usage": {"completion_tokens": min(16, asked.max_tokens)}}


def build(args: dict[str, Any]) -> Any:
    """The application, by the `args` of the config, which say nothing."""
    from ray import serve

    deployment: Any = serve.deployment(ray_actor_options={"num_cpus": 0.1}, graceful_shutdown_timeout_s=1)(Model)
    return deployment.bind()


def calls_of(count: int, prompts: Path | None) -> list[Call]:
    """So many calls of workflows such as `eval.ray_serve` has, one after the other."""
    workflows = enumerate(plan(count, 1.0, seed=0, prompts=prompts))
    calls = (
        (f"workflow-{number}", Asked(messages=messages, max_tokens=limit))
        for number, workflow in workflows
        for messages, _, _, limit in chain.from_iterable(workflow.stages)
    )
    return list(islice(calls, count))


def count_of(rate: int) -> int:
    """Calls of a block at this rate."""
    return int(rate * _SECONDS.get(rate, _LEAST_S))


def applications(routers: Sequence[str], log_dir: Path) -> list[dict[str, Any]]:
    """As `eval.ray_serve` has them in a config file, but for the replicas."""
    made = []
    for router in routers:
        application = config(router, Path(), time_scale=1.0, log_dir=log_dir)
        [model] = application["deployments"]
        model["max_ongoing_requests"] = _MOST_ONGOING
        made.append(application | {"import_path": "eval.ray_serve_overhead:build", "args": {}})
    return made


class Route:
    """The way through one router, watched from outside."""

    def __init__(self, router: str, handle: Any) -> None:
        self.router = router
        self.failed = 0
        self._handle = handle.options()  # this makes the router
        self._chose: list[tuple[float, float]] = []

    def watch(self) -> None:
        """From now on, time the choices; a request has been sent by now, so that there is who chooses."""
        self._chooser = self._handle._router._asyncio_router.request_router
        choose = self._chooser._choose_replica_for_request

        async def timed(*args: Any, **kwargs: Any) -> Any:
            began_s, busy_s = time.perf_counter(), time.thread_time()
            replica = await choose(*args, **kwargs)
            self._chose.append((time.perf_counter() - began_s, time.thread_time() - busy_s))
            return replica

        self._chooser._choose_replica_for_request = timed

    async def block(self, calls: Sequence[Call], rate: int, seed: int) -> Times:
        """Send these calls at this rate; what was measured, without the lead."""
        self._chose.clear()
        busy_s = self._thread_s()
        took = await self.send(calls, rate, seed)
        await asyncio.sleep(_REST_S)
        thread_s = (self._thread_s() - busy_s) / len(calls)
        self.failed += took.count(None)
        accepted, answer = zip(*[times for times in took[_LEAD:] if times is not None], strict=True)
        choose, choose_cpu = zip(*self._chose[_LEAD:], strict=True)
        times_s = {"choose": choose, "choose_cpu": choose_cpu, "accepted": accepted, "answer": answer}
        times_s |= {"thread": (thread_s,)} | self._own_times(len(choose))
        return {name: [1e3 * time_s for time_s in times] for name, times in times_s.items()}

    async def send(self, calls: Sequence[Call], rate: int, seed: int) -> list[tuple[float, float] | None]:
        """Seconds until each call was accepted, and answered; None for one that failed."""
        handles = [self._handle.options(session_id=session) for session, _ in calls]
        due_s = time.perf_counter() + np.cumsum(np.random.default_rng(seed).exponential(1.0 / rate, len(calls)))
        sent = zip(handles, calls, due_s.tolist(), strict=True)
        return list(await asyncio.gather(*[self._one(handle, asked, at_s) for handle, (_, asked), at_s in sent]))

    async def _one(self, handle: Any, asked: Asked, at_s: float) -> tuple[float, float] | None:
        await asyncio.sleep(at_s - time.perf_counter())
        accepted_s: list[float] = []
        began_s = time.perf_counter()
        response = handle.remote(asked)
        response._replica_result_future.add_done_callback(lambda _: accepted_s.append(time.perf_counter()))
        try:
            await response
        except Exception as error:  # noqa: BLE001  # counted, whatever it is
            print(f"{self.router}: {error!r}")
            return None
        return accepted_s[0] - began_s, time.perf_counter() - began_s

    def _thread_s(self) -> float:
        """CPU so far of the thread that routes, which all routers share."""

        async def read() -> float:
            return time.thread_time()

        return asyncio.run_coroutine_threadsafe(read(), self._handle._router.event_loop).result()

    def _own_times(self, last: int) -> dict[str, tuple[float, ...]]:
        """What SwarmX says of its last decisions."""
        if self.router != OURS:
            return {}
        status = self._chooser.swarmx_status()
        own = {"decision": "decision_s", "decision_cpu": "decision_busy_s", "added": "added_s"}
        return {name: tuple(status[field][-last:]) for name, field in own.items()}


def rows_of(router: str, rate: int, times: Times, less: Times | None = None) -> list[Row]:
    """Percentiles of what was measured, or how much more they are than those of `less`, with the interval of that."""
    rng, rows = np.random.default_rng(0), list[Row]()
    for name in times if less is None else less:
        parts = [np.array(times[name])] if less is None else [np.array(times[name]), np.array(less[name])]
        row: dict[str, Value] = {"policy": router, "rate": rate, "measured": name, "n": len(parts[0])}
        if name == "thread":
            rows.append(row | {"mean_ms": float(parts[0].mean() - sum(part.mean() for part in parts[1:]))})
            continue
        again = [part[rng.integers(len(part), size=(_RESAMPLED, len(part)))] for part in parts]
        for percent in (50, 99):
            first, *rest = (float(np.percentile(part, percent)) for part in parts)
            row[f"p{percent}_ms"] = first - sum(rest)
            if less is not None:
                one, other = (np.percentile(drawn, percent, axis=1) for drawn in again)
                row[f"p{percent}_low_ms"], row[f"p{percent}_high_ms"] = np.percentile(one - other, (5, 95)).tolist()
        rows.append(row)
    return rows


def claims_of(rows: Sequence[Row]) -> list[Claim]:
    """The aim at each rate: under a millisecond beyond Serve's default, until a replica is named, and until one has
    accepted."""
    return [
        claim(f"{row['measured']}_added_p99_ms@{row['rate']}", float(row["p99_ms"] or 0.0), "<", _AIM_MS)
        for row in rows
        if row["policy"] == f"{OURS} - {THEIRS}" and row["measured"] in ("choose", "accepted")
    ]


async def measure(routes: Sequence[Route], calls: Sequence[Call], rates: Sequence[int], blocks: int) -> list[Row]:
    """Blocks in turn, each time in another order; rate by rate."""
    rng, left, rows = np.random.default_rng(0), iter(calls), list[Row]()
    warm = list(islice(left, _WARM_UP))
    for route in routes:
        await route.send(warm, _WARM_UP_RATE, 0)
        route.watch()
    for rate in rates:
        times: dict[str, defaultdict[str, list[float]]] = {route.router: defaultdict(list) for route in routes}
        for number in range(blocks):
            block = list(islice(left, count_of(rate)))
            for at in rng.permutation(len(routes)):
                for name, values in (await routes[at].block(block, rate, number)).items():
                    times[routes[at].router][name] += values
        found = [row for router, one in times.items() for row in rows_of(router, rate, one)]
        if {OURS, THEIRS} <= times.keys():
            found += rows_of(f"{OURS} - {THEIRS}", rate, times[OURS], times[THEIRS])
        print(table(found), flush=True)
        rows += found
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Bring everything up, measure, and write the result."""
    parser = argparse.ArgumentParser(prog="python -m eval.ray_serve_overhead", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--rates", default="10,50", help="requests a second")
    add_routers(parser, _ROUTERS)
    wanted = parser.parse_args(arguments)
    routers, rates = wanted.routers, [int(rate) for rate in wanted.rates.split(",")]
    calls = calls_of(_WARM_UP + wanted.blocks * sum(map(count_of, rates)), wanted.prompts)
    wanted.out.mkdir(parents=True, exist_ok=True)
    with serving():
        handles = deploy(applications(routers, wanted.out.resolve() / "decisions"))
        routes = [Route(router, handles[f"eval-{router}"]) for router in routers]
        rows = asyncio.run(measure(routes, calls, rates, wanted.blocks))
    claims = [*claims_of(rows), claim("failed", float(sum(route.failed for route in routes)), "<=", 0.0)]
    command = "python -m eval.ray_serve_overhead" + (" --prompts FOLDER" if wanted.prompts else "")
    print(f"Written: {write_result(wanted.out, command, rows, claims, [0])}")


if __name__ == "__main__":
    main()
