"""A workload in numbers, by kind: how many calls, tokens and shared prefixes, and how good its forecasts are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from eval.result import Row
from eval.workloads.load import uncached_tokens
from eval.workloads.plan import PlannedCall, PlannedWorkflow, Workload
from swarmx.core.forecast import LEVELS

Floats = NDArray[np.float64]


def summary(workload: Workload) -> list[Row]:
    """One row a kind.

    `reuse` is the share of prompt tokens in blocks that an earlier call had, too: the hits of an endless cache that
    all replicas share. `r2` is that of the forecast's log mean against the log truth, after the mean of each (kind,
    role, model) was taken out of both; `p50` and so on are the shares of calls that came to no more than that quantile.
    """
    kinds = sorted({workflow.kind for workflow in workload.workflows})
    return [_row(kind, [w for w in workload.workflows if w.kind == kind], workload) for kind in kinds]


def _row(kind: str, workflows: Sequence[PlannedWorkflow], workload: Workload) -> Row:
    calls = [call for workflow in workflows for call in workflow.calls]
    counts = np.array([len(workflow.calls) for workflow in workflows])
    llm = [call for call in calls if call.kind == "llm"]
    row: dict[str, str | int | float | bool | None] = {"kind": kind, "workflows": len(workflows), "calls": len(calls)}
    row |= _quantiles("calls", counts)
    row |= _quantiles("prompt", np.array([call.prompt_tokens for call in llm]))
    row |= _quantiles("output", np.array([call.work for call in llm]))
    row |= _quantiles("serial", np.array([call.work for call in calls if call.kind != "llm"]))
    row["reuse"] = _reuse(llm)
    row["r2"] = r2(llm, workload)
    asked = llm or calls
    work = np.array([call.work for call in asked])
    said = workload.quantiles[[call.forecast for call in asked]]
    for level in (0.5, 0.9, 0.99):
        row[f"p{round(level * 100)}"] = float((work <= said[:, LEVELS.index(level)]).mean())
    return row


def r2(calls: Sequence[PlannedCall], workload: Workload) -> float | None:
    """Of log forecast means within (role, model), as a regression explains it (squared correlation)."""
    groups: dict[tuple[str, str], list[PlannedCall]] = {}
    for call in calls:
        groups.setdefault((call.role, call.model), []).append(call)
    truth, said = np.zeros(0), np.zeros(0)
    for group in groups.values():
        work = np.log1p(np.array([call.work for call in group]))
        mean = np.log1p(means(workload.quantiles[[call.forecast for call in group]].astype(float)))
        truth, said = np.append(truth, work - work.mean()), np.append(said, mean - mean.mean())
    if len(truth) < 2 or not (truth.std() > 0.0 and said.std() > 0.0):
        return None
    return float(np.corrcoef(truth, said)[0, 1] ** 2)


def means(quantiles: Floats) -> Floats:
    """Means of the piecewise linear distributions, [rows], as `Forecast.mean` has them."""
    levels = np.array(LEVELS)
    inner = ((quantiles[:, 1:] + quantiles[:, :-1]) / 2.0) @ np.diff(levels)
    made: Floats = inner + levels[0] * quantiles[:, 0] + (1.0 - levels[-1]) * quantiles[:, -1]
    return made


def _quantiles(name: str, values: NDArray[np.number]) -> dict[str, float | None]:
    if not len(values):
        return {}
    return {f"{name}_{label}": float(np.quantile(values, q)) for label, q in (("p10", 0.1), ("p50", 0.5), ("p90", 0.9))}


def _reuse(calls: Sequence[PlannedCall]) -> float | None:
    seen: set[int] = set()
    total = fresh = 0
    for call in calls:
        total += call.prompt_tokens
        fresh += uncached_tokens(call, seen)
        seen.update(call.blocks)
    return 1.0 - fresh / total if total else None
