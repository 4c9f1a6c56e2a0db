"""How good forecasts were, in one value: proper scores, coverage and rank correlation, of all rows and by label."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from swarmx.neural.head import Floats
from swarmx.neural.losses import coverage, crps, kendall_tau, pinball

COVERED = (0.5, 0.8, 0.9, 0.99)
PLOTTED = (0.05, 0.1, 0.25, 0.5, 0.75, 0.8, 0.9, 0.95, 0.99)
OTHER = "(fewer rows each)"
FEWEST = 20
_MOST_LABELS = 40

Labels = NDArray[np.str_]


class Scores(msgspec.Struct, frozen=True, kw_only=True):
    """`pinball` and `crps` are means in the unit of the outcome, `pinball_log` that of the logarithm, a relative error.

    `coverage` is the share of outcomes at or below the quantile of each level, "0.9" for the level 0.9: a calibrated
    forecast gives the level. `kendall_tau` ranks medians against outcomes; None where all are equal.
    """

    rows: int
    pinball: float
    pinball_log: float
    crps: float
    coverage: dict[str, float]
    kendall_tau: float | None


class ScoreSet(msgspec.Struct, frozen=True, kw_only=True):
    """The scores of one set of rows, `about` in a sentence: of all, by label (`by["model"]["m"]`), and `calibration`,
    the observed coverage of each level of `PLOTTED`."""

    name: str
    about: str
    overall: Scores
    by: dict[str, dict[str, Scores]]
    calibration: dict[str, float]


def scores_of(target: Floats, quantiles: Floats, levels: Sequence[float]) -> Scores:
    """Scores of quantiles [rows, K] against what came [rows], at least one row."""
    log_q = np.log(np.maximum(quantiles, 0.0) + 1.0)
    middle = quantiles[:, min(range(len(levels)), key=lambda k: abs(levels[k] - 0.5))]
    tau = kendall_tau(middle, target) if len(target) > 1 else math.nan
    return Scores(
        rows=len(target),
        pinball=float(pinball(target, quantiles, levels).mean()),
        pinball_log=float(pinball(np.log(target + 1.0), log_q, levels).mean()),
        crps=float(crps(target, quantiles, levels).mean()),
        coverage={f"{level:g}": coverage(target, quantiles, levels, level) for level in COVERED},
        kendall_tau=tau if math.isfinite(tau) else None,
    )


def score_set(
    name: str,
    about: str,
    target: Floats,
    quantiles: Floats,
    levels: Sequence[float],
    labels: Mapping[str, Labels],
) -> ScoreSet:
    """The scores of all rows, and of the rows of each label [rows] by its dimension ("model", "role" ...).

    Labels with fewer than `FEWEST` rows, and those beyond the 40 most frequent, are scored together.
    """
    return ScoreSet(
        name=name,
        about=about,
        overall=scores_of(target, quantiles, levels),
        by={dimension: _by_label(target, quantiles, levels, column) for dimension, column in labels.items()},
        calibration={f"{level:g}": coverage(target, quantiles, levels, level) for level in PLOTTED},
    )


def _by_label(target: Floats, quantiles: Floats, levels: Sequence[float], column: Labels) -> dict[str, Scores]:
    counts = Counter(column.tolist())
    often = [label for label, count in counts.most_common(_MOST_LABELS) if count >= FEWEST]
    found = {
        label: scores_of(target[rows], quantiles[rows], levels) for label in often if (rows := column == label).any()
    }
    others = ~np.isin(column, often)
    if others.any():
        found[OTHER] = scores_of(target[others], quantiles[others], levels)
    return found
