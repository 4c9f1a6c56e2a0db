"""How good forecasts are: proper scores and coverage of quantiles, in numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from swarmx.neural.head import Floats


def pinball(target: Floats, quantiles: Floats, levels: Sequence[float]) -> Floats:
    """Pinball (quantile) loss [rows, K] of quantiles [rows, K] against what came [rows], in its unit.

    Koenker and Bassett, Econometrica 46 (1978): level * (y - q) above the quantile, (1 - level) * (q - y) below.
    """
    error = target[:, None] - quantiles
    tau = np.asarray(levels)
    loss: Floats = np.maximum(tau * error, (tau - 1.0) * error)
    return loss


def crps(target: Floats, quantiles: Floats, levels: Sequence[float]) -> Floats:
    """Continuous ranked probability score [rows]: twice the integral of the pinball loss over the level.

    By the trapezium rule between the levels, the outermost loss held to 0 and 1 (Gneiting and Ranjan, JBES 29, 2011).
    """
    loss = pinball(target, quantiles, levels)
    tau = np.asarray(levels)
    width = np.diff(tau)
    inner = ((loss[:, 1:] + loss[:, :-1]) / 2.0 * width).sum(axis=1)
    score: Floats = 2.0 * (inner + loss[:, 0] * tau[0] + loss[:, -1] * (1.0 - tau[-1]))
    return score


def coverage(target: Floats, quantiles: Floats, levels: Sequence[float], level: float) -> float:
    """The share of outcomes at or below the quantile of `level`, which is interpolated where it is not one of `levels`.

    Calibrated forecasts give `level`. NaN without rows.
    """
    if len(target) == 0:
        return float("nan")
    tau = np.asarray(levels)
    k = int(np.clip(np.searchsorted(tau, level), 1, len(tau) - 1))
    share = float(np.clip((level - tau[k - 1]) / (tau[k] - tau[k - 1]), 0.0, 1.0))
    at = quantiles[:, k - 1] + share * (quantiles[:, k] - quantiles[:, k - 1])
    return float(np.mean(target <= at))


def kendall_tau(a: Floats, b: Floats) -> float:
    """Kendall's rank correlation, tau-b, of two columns [rows] (Biometrika 30, 1938; ties as in tau-b of 1945).

    By counting inversions while sorting, O(n log n) (Knight, JASA 61, 1966). NaN where a column has one value only.
    """
    n = len(a)
    order = np.lexsort((b, a))
    a, b = a[order], b[order]
    ranks = np.unique(b, return_inverse=True)[1]
    discordant = _inversions(ranks.tolist())
    pairs = n * (n - 1) / 2.0
    ties_a, ties_b = _tied_pairs(a[:, None]), _tied_pairs(b[:, None])
    both = _tied_pairs(np.column_stack([a, b]))
    concordant_less_discordant = pairs - ties_a - ties_b + both - 2.0 * discordant
    scale = float(np.sqrt((pairs - ties_a) * (pairs - ties_b)))
    return concordant_less_discordant / scale if scale > 0.0 else float("nan")


def _tied_pairs(columns: Floats) -> float:
    counts = np.unique(columns, axis=0, return_counts=True)[1].astype(np.float64)
    return float((counts * (counts - 1.0) / 2.0).sum())


def _inversions(values: list[int]) -> int:
    """Pairs that are in the wrong order, by merge sort."""
    if len(values) < 2:
        return 0
    middle = len(values) // 2
    left, right = values[:middle], values[middle:]
    count = _inversions(left) + _inversions(right)
    left.sort()
    right.sort()
    place = 0
    for value in right:
        while place < len(left) and left[place] <= value:
            place += 1
        count += len(left) - place
    return count
