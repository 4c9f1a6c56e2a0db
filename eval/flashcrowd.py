"""A flash crowd on one model: static fleets, target tracking and demand forecast, with their costs, over several seeds.

The fleet is emulated, everything else is real: one server process a run, real replica processes that are started and
drained, 40 emulated seconds to start one. Costs are replica seconds (starting, ready and draining ones) times device
weight, between the first arrival and the last end. Static fleets of several sizes run beside the two policies, so that
each of these can be compared with the static fleet that costs at least as much.

    python -m eval.flashcrowd --out DIR [--seeds 3] [--static 3,4] [--targets 4] [--time-scale 6] [--quick]
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from eval.result import Row, claim, table, write_result
from swarmx.demo import crowd

_BOUNDS = (1, 8, 8)
_SHAPE = crowd.Crowd(begins_s=60.0, ends_s=150.0, over_s=450.0)


async def _run(policy: str, knob: float, *, seed: int, shape: crowd.Crowd, time_scale: float) -> dict[str, Any]:
    """One run: latencies and cost in emulated seconds. `knob` is the number of static replicas, or the target."""
    is_static = policy == "static"
    scaler: Mapping[str, Any] = {
        "policy": policy,
        "parameters": {} if is_static else {"target_in_flight": knob},
    }
    static = int(knob)
    wanted = crowd.settings(
        time_scale=time_scale,
        seed=seed,
        scaler=scaler,
        bounds=(static, static, static) if is_static else _BOUNDS,
        coordinator={"engine": "off"},
    )
    todo = crowd.arrivals(shape, seed=seed, time_scale=time_scale)
    with tempfile.TemporaryDirectory(prefix="swarmx-crowd-") as folder:
        run = await crowd.run_crowd(wanted, todo, Path(folder), operator=False)
    done = [r for r in run.workflows if r["state"] == "finished"]
    times = {r["workflow_id"]: (r["ended_at_s"] - r["created_at_s"]) * time_scale for r in done}
    in_crowd = [
        times[r["workflow_id"]]
        for r in done
        if shape.begins_s <= (r["created_at_s"] - run.began_at_s) * time_scale < shape.ends_s
    ]
    p50, p95, p99 = np.percentile(list(times.values()), (50, 95, 99)).tolist()
    return {
        "experiment": "flashcrowd",
        "policy": policy,
        "knob": knob,
        "seed": seed,
        "n": len(run.workflows),
        "finished": len(done),
        "p50_s": p50,
        "p95_s": p95,
        "p99_s": p99,
        "crowd_p95_s": float(np.percentile(in_crowd, 95)),
        "cost": crowd.cost(run) * time_scale,
        "most_replicas": max(held for _, held, _ in run.samples),
        "deploys": sum(r["entry"]["tool"] == "deploy" and r["entry"]["kind"] == "intent" for r in run.records),
        "audit_sound": run.sound,
        "void": bool(run.voids),
    }


async def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.flashcrowd", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--static", type=_numbers, default=(3.0, 4.0), help="sizes of the static fleets")
    parser.add_argument("--targets", type=_numbers, default=(4.0,), help="target_in_flight of the two policies")
    parser.add_argument("--time-scale", type=float, default=6.0)
    parser.add_argument("--quick", action="store_true", help="one seed, a short crowd: does it run?")
    wanted = parser.parse_args(arguments)
    console = Console(stderr=True)
    shape = crowd.Crowd(begins_s=20.0, ends_s=60.0, over_s=80.0) if wanted.quick else _SHAPE
    knobs = [("static", n) for n in wanted.static]
    knobs += [(policy, target) for target in wanted.targets for policy in ("target_tracking", "demand_forecast")]
    seeds = range(1 if wanted.quick else wanted.seeds)
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        for policy, knob in knobs:
            row = await _run(policy, knob, seed=seed, shape=shape, time_scale=wanted.time_scale)
            console.print(f"seed {seed} {policy} {knob:g}: P95 {row['p95_s']:.1f} s, cost {row['cost']:.0f}")
            rows.append(row)

    def median(policy: str, knob: float, field: str) -> float:
        return float(np.median([row[field] for row in rows if (row["policy"], row["knob"]) == (policy, knob)]))

    claims = [
        claim("unfinished", float(sum(row["n"] - row["finished"] for row in rows)), "<=", 0.0),
        claim("void_runs", float(sum(row["void"] for row in rows)), "<=", 0.0),
    ]
    for policy, knob in knobs:
        cost, p95_s = median(policy, knob, "cost"), median(policy, knob, "p95_s")
        dearer = [n for n in wanted.static if median("static", n, "cost") >= cost]
        if policy != "static" and dearer:
            ratio = p95_s / median("static", min(dearer), "p95_s")
            claims.append(claim(f"p95_vs_static@{policy},{knob:g}", ratio, "<", 1.0))
    for target in wanted.targets:
        forecast, tracking = ("demand_forecast", target), ("target_tracking", target)
        p95 = median(*forecast, "p95_s") / median(*tracking, "p95_s")
        cost = median(*forecast, "cost") / median(*tracking, "cost")
        claims.append(claim(f"p95_vs_target_tracking@{target:g}", p95, "<", 1.0))
        claims.append(claim(f"cost_vs_target_tracking@{target:g}", cost, "<=", 1.01))
    kept: list[Row] = list(rows)
    path = write_result(wanted.out, "python -m eval.flashcrowd", kept, claims, list(seeds))
    fields = ("p50_s", "p95_s", "p99_s", "crowd_p95_s", "cost", "most_replicas")
    shown: list[Row] = [
        {"policy": policy, "knob": knob, **{field: round(median(policy, knob, field), 1) for field in fields}}
        for policy, knob in knobs
    ]
    console.print(table(shown))
    console.print(f"Written: {path}")


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(","))


if __name__ == "__main__":
    asyncio.run(main())
