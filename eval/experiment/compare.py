"""Two contestants on the same arrivals: the ratio of a figure, with a bootstrap interval over seeds or workflows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.experiment.jobs import Run
from eval.experiment.measures import Floats, latencies, overall
from swarmx.core.errors import ConfigError

RESAMPLES, FEW_SEEDS = 2000, 4
_BY_WORKFLOW = 200


@dataclass(frozen=True, slots=True)
class Ratio:
    """The median over seeds, the range of the seeds, and a 95 % interval; `over` is what was resampled for it."""

    value: float
    least: float
    most: float
    low: float
    high: float
    over: str


def ratio(ours: Sequence[Run], theirs: Sequence[Run], level: float = 0.99, seed: int = 0) -> Ratio:
    """Ours over theirs, of the geometric mean over kinds of a quantile, seed by seed.

    From four seeds on, seeds are resampled; with fewer, workflows within each seed and kind, the same for both, which
    says nothing of how seeds differ. Runs must be of the same seeds in the same order, or ConfigError is raised.
    """
    if not ours or [r.job.workload for r in ours] != [r.job.workload for r in theirs]:
        raise ConfigError("only runs of the same workloads can be compared.")
    pairs = np.array([overall(a, level) / overall(b, level) for a, b in zip(ours, theirs, strict=True)])
    rng = np.random.default_rng([seed, len(pairs), 0xB007])
    if len(pairs) >= FEW_SEEDS:
        drawn = np.median(rng.choice(pairs, size=(RESAMPLES, len(pairs))), axis=1)
        over = "seeds"
    else:
        both = zip(ours, theirs, strict=True)
        drawn = np.median([_resampled(a, b, level, rng) for a, b in both], axis=0)
        over = "workflows"
    low, high = np.quantile(drawn, (0.025, 0.975)).tolist()
    return Ratio(float(np.median(pairs)), float(pairs.min()), float(pairs.max()), low, high, over)


def _resampled(ours: Run, theirs: Run, level: float, rng: np.random.Generator) -> Floats:
    """Ratios of resampled workflows, [resamples]."""
    logs = np.zeros(_BY_WORKFLOW)
    for kind in ours.latency_s:
        a, b = latencies(ours, kind), latencies(theirs, kind)
        which = rng.integers(len(a), size=(_BY_WORKFLOW, len(a)))
        for values, sign in ((a, 1.0), (b, -1.0)):
            quantiles = np.quantile(values[which], level, axis=1, method="higher")
            logs += sign * np.log(np.maximum(quantiles, 1e-9))
    made: Floats = np.exp(logs / len(ours.latency_s))
    return made
