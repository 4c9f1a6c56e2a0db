"""How quick the slow side is: from an alert to the applied change, and the console's answers without a model.

One flash crowd (emulated fleet) in mode auto, with the rules as coordinator: for each change that it made, the seconds
from the newest alert before it. Then questions to the console of an idle server, over REST, one after the other.

    python -m eval.control --out DIR [--questions 200] [--runs 3]
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from eval.result import Row, table, write_result
from swarmx.demo import crowd
from swarmx.demo.fleet import server

_SCALE = 6.0
_QUESTIONS = (
    "why is qwen3-8b slow?",
    "how is the cluster?",
    "what changed in the last ten minutes?",
    "scale qwen3-8b to 2",
)


async def _alert_to_applied(seed: int) -> list[float]:
    """Wall seconds from alert to applied, one a change that the coordinator made."""
    wanted = crowd.settings(
        time_scale=_SCALE,
        seed=seed,
        scaler={},
        bounds=(1, 2, 8),
        coordinator={"engine": "rules", "mode": "auto", "gap_s": 0.1},
    )
    todo = crowd.arrivals(crowd.Crowd(), seed=seed, time_scale=_SCALE)
    with tempfile.TemporaryDirectory(prefix="swarmx-control-") as folder:
        run = await crowd.run_crowd(wanted, todo, Path(folder), operator=False)
    seconds = []
    for proposal in run.proposals:
        if proposal["actor"]["type"] == "coordinator" and proposal["applied_at_s"] is not None:
            before = [alert["at_s"] for alert in run.alerts if alert["at_s"] <= proposal["at_s"]]
            seconds.append(proposal["applied_at_s"] - max(before))
    return seconds


async def _answers(count: int) -> dict[str, list[float]]:
    """Wall milliseconds until the whole answer, by question."""
    wanted = crowd.settings(
        time_scale=_SCALE, seed=0, scaler={}, bounds=(1, 2, 8), coordinator={"engine": "off"}, start_s=1.0
    )
    took: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="swarmx-control-") as folder:
        async with server(wanted, Path(folder)) as api:
            for question in _QUESTIONS:
                # Proposals of the same order may pile up to a limit; those that follow are refused, as fast.
                for _ in range(count):
                    begin_s = time.perf_counter()
                    async for _ in api.stream("/api/v1/console", json={"text": question}):
                        pass
                    took.setdefault(question, []).append((time.perf_counter() - begin_s) * 1000.0)
    return took


async def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.control", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--runs", type=int, default=3)
    wanted = parser.parse_args(arguments)
    rows: list[Row] = []
    for question, times_ms in (await _answers(wanted.questions)).items():
        p50, p95 = np.percentile(times_ms, (50, 95)).tolist()
        rows.append({"what": f"ask: {question}", "n": len(times_ms), "p50_ms": round(p50, 2), "p95_ms": round(p95, 2)})
    seconds = [s for seed in range(wanted.runs) for s in await _alert_to_applied(seed)]
    p50, top = np.percentile(seconds, (50, 100)).tolist()
    rows.append(
        {"what": "alert to applied", "n": len(seconds), "p50_ms": round(p50 * 1000, 1), "max_ms": round(top * 1000, 1)}
    )
    write_result(wanted.out, "python -m eval.control", rows, [], list(range(wanted.runs)))
    Console(stderr=True).print(table(rows))


if __name__ == "__main__":
    asyncio.run(main())
