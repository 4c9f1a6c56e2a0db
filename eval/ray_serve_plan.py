"""The workflows that `eval.ray_serve` puts to routers of Ray Serve, and what a run of them came to."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.result import Claim, Row, claim

if TYPE_CHECKING:
    from eval.workloads.reading import Part

OURS = "swarmx"
DEVICES = ("h100", "a100", "l40s", "b60")
SLOTS = 4
_WARM = 1 / 6  # of the workflows, the first ones: nobody's times count while a router learns
MODEL = "llama-3.1-8b"
_STAGES = (("research/planner", 1), ("research/reader", 3), ("research/writer", 1))
_SYSTEM = {
    "research/planner": "You plan how a question is to be researched.",
    "research/reader": "You read a source and note what matters.",
    "research/writer": "You write the report from the notes.",
}


def parser_of(name: str, about: str | None, routers: Sequence[str]) -> argparse.ArgumentParser:
    """The command line of a comparison; `routers` are those that take part unless it says otherwise."""
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=about)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--rate", type=float, default=2.2, help="workflows a second of the wall clock")
    parser.add_argument("--time-scale", type=float, default=4.0)
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    add_routers(parser, routers)
    return parser


def add_routers(parser: argparse.ArgumentParser, known: Sequence[str]) -> None:
    """`--routers` of a command line: names with commas between them, all that are known unless it says otherwise."""

    def named(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"there is no {', '.join(unknown)}; there are {', '.join(known)}")
        return names

    parser.add_argument("--routers", type=named, default=",".join(known))


def seeds_of(wanted: argparse.Namespace) -> list[int]:
    """The seeds that the command line asks for."""
    return list(range(wanted.first_seed, wanted.first_seed + wanted.seeds))


@dataclass
class Asked:
    """A chat completion as Ray Serve LLM's deployments get it: an object with attributes."""

    messages: list[dict[str, str]]
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A workflow to come: when it is submitted, and the messages of its calls by stage, with the truth of each."""

    at_s: float
    stages: Sequence[Sequence[tuple[list[dict[str, str]], int, int, int]]]


def plan(count: int, rate: float, *, seed: int, prompts: Path | None, part: Part = "evaluation") -> list[Planned]:
    """The same for every router; prompts of `part` of the data."""
    rng = np.random.default_rng(seed)
    rows = None
    if prompts is not None:
        from eval.workloads.prompt_rows import read_prompts

        rows = read_prompts(prompts, part)
    planned, at_s = [], 0.0
    for number in range(count):
        at_s += float(rng.exponential(1.0 / rate))
        stages = []
        for role, width in _STAGES:
            calls = []
            for piece in range(width):
                if rows is None:
                    text, work = f"Do part {piece} of task {number}.", int(np.clip(rng.lognormal(5.0, 0.9), 8, 2000))
                    prompt_tokens, limit = 200, 2048
                else:
                    drawn = rows.draw(role, MODEL, rng)
                    text, work, prompt_tokens = drawn.text, min(drawn.work, 2000), drawn.prompt_tokens
                    limit = int(drawn.work_limit)
                content = f"{text}\n\n[{number}.{role}.{piece}]"  # the truth is looked up by it
                system = {"role": "system", "content": _SYSTEM[role]}
                calls.append(([system, {"role": "user", "content": content}], prompt_tokens, work, limit))
            stages.append(calls)
        planned.append(Planned(at_s=at_s, stages=stages))
    return planned


def key_of(messages: Sequence[dict[str, str]]) -> str:
    """Under which the truth knows how long the answer is."""
    return sha256(messages[-1]["content"].encode()).hexdigest()[:24]


def truth_of(planned: Sequence[Planned]) -> dict[str, list[int]]:
    """Tokens of prompt and answer of each call, by `key_of`."""
    calls = [call for workflow in planned for stage in workflow.stages for call in stage]
    return {key_of(messages): [prompt_tokens, work] for messages, prompt_tokens, work, _ in calls}


def row_of(
    router: str, seed: int, times: Sequence[float | None], devices: Mapping[str, int], time_scale: float
) -> dict[str, Any]:
    """What a run came to: percentiles of the workflows that count, in seconds of the engines."""
    counted = [took for took in times[int(_WARM * len(times)) :] if took is not None]
    p50, p95, p99 = (np.percentile(counted, (50, 95, 99)) * time_scale).tolist()
    return {
        "experiment": "ray_serve",
        "policy": router,
        "seed": seed,
        "n": len(times),
        "failed": sum(took is None for took in times),
        "p50_s": p50,
        "p95_s": p95,
        "p99_s": p99,
        "mean_s": float(np.mean(counted)) * time_scale,
        **{f"calls_{device}": count for device, count in devices.items()},
    }


def claims_of(rows: Sequence[Row]) -> list[Claim]:
    """The aims, as far as the rows speak about them: workflows against the best of Serve's routers, and a decision's
    milliseconds, by the clock where Ray ran, of the thread alone otherwise."""

    def median(router: str, field: str) -> float:
        return float(np.median([float(row[field] or 0.0) for row in rows if row["policy"] == router]))

    theirs = sorted({str(row["policy"]) for row in rows} - {OURS})
    ours = [row for row in rows if row["policy"] == OURS]
    if not theirs or not ours:
        return []
    best = min(theirs, key=lambda router: median(router, "p99_s"))
    fastest = min(median(router, "p50_s") for router in theirs)
    decided = "decision_p99_ms" if "decision_p99_ms" in ours[0] else "busy_p99_ms"
    return [
        claim("serve_p99_vs_best_router", median(OURS, "p99_s") / median(best, "p99_s"), "<=", 0.6),
        claim("serve_p50_vs_best_router", median(OURS, "p50_s") / fastest, "<=", 1.0),
        claim(decided, median(OURS, decided), "<", 1.0),
        claim("failed", float(sum(int(row["failed"] or 0) for row in ours)), "<=", 0.0),
    ]
