"""Two contestants on the same arrivals: the ratio of a figure, with a bootstrap interval over seeds and records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eval.experiment.jobs import Run
from eval.experiment.measures import Floats, latencies, overall
from swarmx.core.errors import ConfigError

Ints = NDArray[np.int64]

RESAMPLES, FEW_SEEDS = 500, 4


@dataclass(frozen=True, slots=True)
class Ratio:
    """The median over seeds, the range of the seeds, and a 95 % interval; `over` is what was resampled for it, and
    `clusters` how many records there were, all kinds and seeds together."""

    value: float
    least: float
    most: float
    low: float
    high: float
    over: str
    clusters: int


def ratio(ours: Sequence[Run], theirs: Sequence[Run], level: float = 0.99, seed: int = 0) -> Ratio:
    """Ours over theirs, of the geometric mean over kinds of a quantile, seed by seed.

    Many workflows replay one record (`Run.sources`) and are slow together, in every seed. So it is records of each kind
    that are drawn anew, with all their workflows and for all seeds at once; from `FEW_SEEDS` seeds on, seeds are drawn,
    too (both ways at once: the pigeonhole bootstrap, Owen, Annals of Applied Statistics 1, 2007). An invented workflow
    is its own record. Runs must be of the same seeds in the same order, or ConfigError is raised.
    """
    if not ours or [r.job.workload for r in ours] != [r.job.workload for r in theirs]:
        raise ConfigError("only runs of the same workloads can be compared.")
    pairs = np.array([overall(a, level) / overall(b, level) for a, b in zip(ours, theirs, strict=True)])
    rng = np.random.default_rng([seed, len(pairs), 0xB007])
    logs = np.zeros((len(pairs), RESAMPLES))
    clusters = 0
    for kind in ours[0].latency_s:
        members, count = _records(ours, kind)
        drawn = rng.multinomial(count, np.full(count, 1.0 / count), size=RESAMPLES)
        clusters += count
        for row, (a, b, records) in enumerate(zip(ours, theirs, members, strict=True)):
            weights = drawn[:, records]
            for run, sign in ((a, 1.0), (b, -1.0)):
                quantiles = weighted_quantiles(latencies(run, kind), weights, level)
                logs[row] += sign * np.log(np.maximum(quantiles, 1e-9))
    ratios = np.exp(logs / len(ours[0].latency_s))
    over = "records"
    if len(pairs) >= FEW_SEEDS:
        over = "seeds and records"
        ratios = np.take_along_axis(ratios, rng.integers(len(pairs), size=ratios.shape), axis=0)
    low, high = np.quantile(np.median(ratios, axis=0), (0.025, 0.975)).tolist()
    return Ratio(float(np.median(pairs)), float(pairs.min()), float(pairs.max()), low, high, over, clusters)


def weighted_quantiles(values: Floats, weights: Ints, level: float) -> Floats:
    """The `level` quantile of `values`, [n], repeated `weights` times each, [resamples, n]: as `method="higher"` of
    `np.quantile` has it, one a row. Where a row has drawn none of them, each counts once."""
    weights = np.where(weights.any(axis=1, keepdims=True), weights, 1)
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[:, order], axis=1)
    needed = level * (reached[:, -1:] - 1) + 1.0
    found: Floats = values[order][(reached >= needed - 1e-9).argmax(axis=1)]
    return found


def _records(runs: Sequence[Run], kind: str) -> tuple[list[Ints], int]:
    """For each run the record of each workflow, as a number from 0 on, and how many there are."""
    if all(kind in run.sources for run in runs):
        sizes = [len(run.sources[kind]) for run in runs]
        names, numbers = np.unique(np.concatenate([run.sources[kind] for run in runs]), return_inverse=True)
        count = len(names)
    else:
        sizes = [len(run.latency_s[kind]) for run in runs]
        count = sum(sizes)
        numbers = np.arange(count)
    return np.split(numbers, np.cumsum(sizes)[:-1]), count
