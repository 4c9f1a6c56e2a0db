"""From runs to the rows of a result: quantiles, misses and costs of each workflow kind by itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from eval.experiment.jobs import Run
from eval.result import Row

Floats = NDArray[np.float64]

ALL = "all"
"""Stands for all kinds: geometric means of their quantiles, and shares of all workflows."""


def latencies(run: Run, kind: str) -> Floats:
    """Seconds, [workflows], in the order of submission; infinite where a workflow was refused."""
    return np.array([math.inf if each is None else each for each in run.latency_s[kind]], dtype=np.float64)


def quantile(run: Run, kind: str, level: float) -> float:
    """Of the latency of a kind; infinite when so many were refused."""
    return float(np.quantile(latencies(run, kind), level, method="higher"))


def overall(run: Run, level: float) -> float:
    """The geometric mean of the kinds' quantiles."""
    return math.exp(float(np.mean([math.log(max(quantile(run, kind, level), 1e-9)) for kind in run.latency_s])))


def missed(run: Run, kind: str, slo_s: float) -> float:
    """The share of a kind that took longer, or was refused."""
    return float((latencies(run, kind) > slo_s).mean())


def missed_of_all(run: Run, slo_s: Mapping[str, float]) -> float:
    """The share of all workflows that took longer than their kind's target, or were refused."""
    late = sum(int((latencies(run, kind) > slo_s[kind]).sum()) for kind in run.latency_s)
    return late / sum(map(len, run.latency_s.values()))


def clusters(run: Run, kind: str) -> int:
    """How many records the workflows of a kind were drawn from; invented ones are all by themselves."""
    return len(set(run.sources[kind])) if kind in run.sources else len(run.latency_s[kind])


def rows_of(run: Run, about: Row, slo_s: Mapping[str, float], factor: float) -> Iterator[Row]:
    """One row a kind, and one for all of them; `slo_s` are `factor` times the unloaded P99."""
    job = run.job
    settings: Row = {
        **about,
        "seed": job.workload.content.seed,
        "forecast": job.forecast,
        "path": job.path,
        "late_binding": job.late_binding,
        "parameters": " ".join(f"{name}={value:g}" for name, value in job.parameters.items()),
        "rate_per_s": job.workload.rate_per_s,
        "warmup_s": job.warmup_s,
    }
    whole: Row = {
        "jain": run.jain, "cost": run.cost, "hit_ratio": run.hit_ratio, "preemptions": run.preemptions,
        "refused": run.refusals, "unended": run.unended,
    }  # fmt: skip
    for kind in (*sorted(run.latency_s), ALL):
        kinds = list(run.latency_s) if kind == ALL else [kind]
        count = sum(len(run.latency_s[each]) for each in kinds)

        def share(times: float, kinds: list[str] = kinds, count: int = count) -> float:
            return sum(missed(run, each, slo_s[each] * times) * len(run.latency_s[each]) for each in kinds) / count

        p50_s, p95_s, p99_s = (
            math.exp(float(np.mean([math.log(quantile(run, k, q)) for k in kinds]))) for q in (0.5, 0.95, 0.99)
        )
        yield {
            **settings, "kind": kind, "n": count, "clusters": sum(clusters(run, each) for each in kinds),
            "p50_s": p50_s, "p95_s": p95_s, "p99_s": p99_s,
            "miss": share(1.0), "miss_1.5x": share(1.5 / factor), "miss_3x": share(3.0 / factor),
            "slo_s": slo_s[kind] if kind != ALL else None,
            "goodput": (1.0 - share(1.0)) * count / max(run.span_s, 1e-9),
            "max_slowdown": max(run.max_slowdown[each] for each in kinds),
            "jain_slowdown": min(run.jain_slowdown[each] for each in kinds),
            **whole,
        }  # fmt: skip


def without_infinities(row: Row) -> Row:
    """JSON has none: None stands for a quantile that was refused."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }
