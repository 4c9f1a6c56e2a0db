"""What one call costs the engine model, in CPU time: `python -m eval.engine_speed --out DIR`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from pathlib import Path

import numpy as np

from eval.result import Claim, Row, claim, table, write_result
from swarmx.core.batching import BLOCK_TOKENS, Engine, Request
from swarmx.core.engine import profiles
from swarmx.core.engine_order import OrderName

PROFILE = ("llama-3.1-8b", "h100")
FAMILIES = 8  # of prompts with a common beginning, for each engine
PROMPT_TOKENS = (500, 4000)
OUTPUT_TOKENS = (200.0, 0.9)  # median and sigma of a log-normal: 300 on average
AWAY = 0.2  # callers that are not in the engine, for each that is
AIM_US = 100.0  # 100,000 calls a minute leave 600 us for all of a simulation


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the result."""
    parser = argparse.ArgumentParser(prog="python -m eval.engine_speed", description=__doc__)
    parser.add_argument("--engines", type=int, default=100)
    parser.add_argument("--running", type=_numbers, default=[30, 120], help="sequences in each engine, by comma")
    parser.add_argument("--calls", type=int, default=200, help="calls measured for each engine")
    parser.add_argument("--order", choices=["arrival", "priority", "uniboost"], default="arrival")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder for result.json and result.md")
    options = parser.parse_args(arguments)
    rows = [
        measure(engines=options.engines, running=n, calls=options.calls, order=options.order, seed=options.seed)
        for n in options.running
    ]
    command = " ".join(["python -m eval.engine_speed", *(sys.argv[1:] if arguments is None else arguments)])
    claims = [_claim(row) for row in rows]
    path = write_result(options.out, command, rows, claims, [options.seed])
    print(table(rows))
    for made in claims:
        print(f"{made.name}: {made.value:.1f} {made.op} {made.aim:g} {'met' if made.met else 'NOT met'}")
    print(f"Written to {path}.")
    return 0


@dataclass(slots=True)
class _World:
    """Engines, their callers, and one heap of what comes next: a request, or the next event of an engine."""

    engines: list[Engine]
    requests: list[Iterator[Request]]
    away_s: Iterator[float]
    heap: list[tuple[float, int, int, Request | None]] = field(default_factory=list)
    order: Iterator[int] = field(default_factory=count)
    due: list[int | None] = field(default_factory=list)
    finished: int = 0
    events: int = 0
    running: int = 0
    now_s: float = 0.0

    def run(self, calls: int) -> None:
        """Go on until so many calls have finished."""
        until = self.finished + calls
        while self.finished < until:
            self.now_s, number, place, request = heappop(self.heap)
            engine = self.engines[place]
            if request is not None:
                engine.submit(request, self.now_s)
            elif number != self.due[place]:
                continue
            for event in engine.advance(self.now_s):
                self.events += 1
                if event.kind == "finished":
                    self.finished += 1
                    self.running += engine.counters().running
                    self.call(place)
            at_s = engine.next_event_s()
            if at_s is not None:
                number = self.due[place] = next(self.order)
                heappush(self.heap, (at_s, number, place, None))

    def call(self, place: int) -> None:
        """A caller of that engine will ask again after a while."""
        at_s = self.now_s + next(self.away_s)
        heappush(self.heap, (at_s, next(self.order), place, next(self.requests[place])))


def measure(*, engines: int, running: int, calls: int, order: OrderName, seed: int) -> Row:
    """CPU time of this thread, the heap that drives the engines included, once the engines are full.

    Each engine has callers of its own who ask again some time after they got their answer.
    """
    rng = np.random.default_rng(seed)
    profile = profiles()[PROFILE]
    callers = round(running * (1.0 + AWAY))
    first_s = 300.0 * profile.step_s(running, running * 2500.0)
    away = rng.exponential(AWAY * first_s, size=engines * (4 * (callers + calls)))
    world = _World(
        engines=[Engine(profile, order=order) for _ in range(engines)],
        requests=[iter(_requests(rng, place, 4 * (callers + calls))) for place in range(engines)],
        away_s=iter(away.tolist()),
        due=[None] * engines,
    )
    for place in range(engines):
        for at_s in rng.uniform(0.0, first_s, size=callers).tolist():
            heappush(world.heap, (at_s, next(world.order), place, next(world.requests[place])))
    world.run(engines * callers)
    world.running = world.events = 0
    since_s, before = time.thread_time(), world.now_s
    world.run(engines * calls)
    cpu_s = time.thread_time() - since_s
    counters = [engine.counters() for engine in world.engines]
    return {
        "experiment": "engine_speed",
        "engines": engines,
        "order": order,
        "running_aim": running,
        "running_mean": world.running / (engines * calls),
        "calls": engines * calls,
        "cpu_us_per_call": 1e6 * cpu_s / (engines * calls),
        "events_per_call": world.events / (engines * calls),
        "calls_per_cpu_minute": 60.0 * engines * calls / cpu_s,
        "simulated_s": world.now_s - before,
        "kv_usage": float(np.mean([c.kv_usage for c in counters])),
        "hit_share": sum(c.prefix_hit_tokens for c in counters) / sum(c.prefix_query_tokens for c in counters),
        "preemptions": sum(c.preemptions for c in counters),
        "seed": seed,
    }


def _requests(rng: np.random.Generator, place: int, calls: int) -> list[Request]:
    prompts = rng.integers(*PROMPT_TOKENS, size=calls)
    outputs = np.maximum(1, rng.lognormal(np.log(OUTPUT_TOKENS[0]), OUTPUT_TOKENS[1], size=calls)).astype(int)
    families = rng.integers(FAMILIES, size=calls)
    common = rng.integers(256, 2048, size=FAMILIES) // BLOCK_TOKENS
    names = count((place + 1) << 40)
    beginnings = [[next(names) for _ in range(n)] for n in common]
    made = []
    for i, (prompt, output, family) in enumerate(zip(prompts.tolist(), outputs.tolist(), families, strict=True)):
        blocks = (prompt + output) // BLOCK_TOKENS
        prefix = beginnings[family][: prompt // BLOCK_TOKENS]
        prefix = prefix + [next(names) for _ in range(blocks - len(prefix))]
        made.append(
            Request(request_id=f"{place}-{i}", prompt_tokens=prompt, output_tokens=output, prefix=tuple(prefix))
        )
    return made


def _claim(row: Row) -> Claim:
    value = row["cpu_us_per_call"]
    assert isinstance(value, float)
    return claim(f"engine_us_per_call@{row['running_aim']}", value, "<=", AIM_US)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
