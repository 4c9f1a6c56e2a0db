"""A flash crowd on one model: static replicas, target tracking and demand forecast at the same cost, several seeds.

The fleet is emulated, everything else is real: one server process a run, real replica processes that are started and
drained, 40 emulated seconds to start one. The number of static replicas is given; the one parameter of the two other
policies, `target_in_flight`, is chosen on a seed of its own so that they cost about as much. Costs are replica seconds
(starting, ready and draining ones) times device weight, between the first arrival and the last end.

    python -m eval.flashcrowd --out DIR [--seeds 5] [--static 3] [--time-scale 6] [--quick]
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

_TUNING_SEED = 1000
_TARGETS = (1.5, 2.5, 4.0)
_BOUNDS = (1, 8, 8)


async def _run(
    policy: str, target: float, *, static: int, seed: int, shape: crowd.Crowd, time_scale: float
) -> dict[str, Any]:
    """One run: latencies and cost in emulated seconds."""
    is_static = policy == "static"
    scaler: Mapping[str, Any] = {
        "policy": policy,
        "parameters": {} if is_static else {"target_in_flight": target},
    }
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
        "target_in_flight": None if is_static else target,
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


async def _tuned(policy: str, cost: float, console: Console, **kwargs: Any) -> tuple[float, list[dict[str, Any]]]:
    """The target whose run on the tuning seed costs what the static one does, as nearly as the grid allows."""
    rows = []
    for target in _TARGETS:
        row = await _run(policy, target, seed=_TUNING_SEED, **kwargs)
        console.print(
            f"tuning {policy} target {target:g}: cost {row['cost']:.0f} (static {cost:.0f}), P95 {row['p95_s']:.1f} s"
        )
        rows.append(row)
    best = min(rows, key=lambda row: abs(float(row["cost"]) - cost))
    return float(best["target_in_flight"]), rows


async def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.flashcrowd", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--static", type=int, default=3)
    parser.add_argument("--time-scale", type=float, default=6.0)
    parser.add_argument("--quick", action="store_true", help="one seed, a short crowd, no tuning: does it run?")
    wanted = parser.parse_args(arguments)
    console = Console(stderr=True)
    shape = crowd.Crowd(begins_s=20.0, ends_s=60.0, over_s=80.0) if wanted.quick else crowd.Crowd()
    same = {"static": wanted.static, "shape": shape, "time_scale": wanted.time_scale}
    targets = {"static": 0.0, "target_tracking": 4.0, "demand_forecast": 4.0}
    tuning: list[dict[str, Any]] = []
    if not wanted.quick:
        reference = await _run("static", 0.0, seed=_TUNING_SEED, **same)
        for policy in ("target_tracking", "demand_forecast"):
            targets[policy], tried = await _tuned(policy, float(reference["cost"]), console, **same)
            tuning += [{**row, "experiment": "tuning"} for row in tried]
    seeds = range(1 if wanted.quick else wanted.seeds)
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        for policy, target in targets.items():
            row = await _run(policy, target, seed=seed, **same)
            console.print(f"seed {seed} {policy}: P95 {row['p95_s']:.1f} s, cost {row['cost']:.0f}")
            rows.append(row)

    def median(policy: str, field: str) -> float:
        return float(np.median([row[field] for row in rows if row["policy"] == policy]))

    claims = [
        claim("unfinished", float(sum(row["n"] - row["finished"] for row in rows)), "<=", 0.0),
        claim("void_runs", float(sum(row["void"] for row in rows)), "<=", 0.0),
        claim("p95_vs_static", median("demand_forecast", "p95_s") / median("static", "p95_s"), "<", 1.0),
        claim(
            "p95_vs_target_tracking", median("demand_forecast", "p95_s") / median("target_tracking", "p95_s"), "<", 1.0
        ),
        claim("cost_vs_static", median("demand_forecast", "cost") / median("static", "cost"), "<=", 1.01),
        claim(
            "cost_vs_target_tracking", median("demand_forecast", "cost") / median("target_tracking", "cost"), "<=", 1.01
        ),
    ]
    kept: list[Row] = [*tuning, *rows]
    path = write_result(wanted.out, "python -m eval.flashcrowd", kept, claims, list(seeds))
    shown: list[Row] = [
        {
            "policy": policy,
            **{f: round(median(policy, f), 1) for f in ("p50_s", "p95_s", "p99_s", "crowd_p95_s", "cost")},
        }
        for policy in targets
    ]
    console.print(table(shown))
    console.print(f"Written: {path}")


if __name__ == "__main__":
    asyncio.run(main())
