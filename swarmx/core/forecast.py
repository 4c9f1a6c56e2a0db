"""Forecasts are distributions: K monotone quantiles, with the algebra that agents need on them."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import pairwise
from operator import le, lt, mul
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

Unit = Literal["tokens", "work", "s", "calls"]
Source = Literal["neural", "empirical", "prior"]

LEVELS: tuple[float, ...] = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)


class Forecast(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """A distribution given by its quantiles, linear in between.

    `quantiles[i]` is the value at probability `levels[i]`; both have shape [K], K >= 2, levels rise
    strictly within (0, 1), quantiles are finite, not negative and do not fall. Outside the outermost
    levels the distribution is taken as constant: the mass below `levels[0]` sits on `quantiles[0]`, the mass
    above `levels[-1]` on `quantiles[-1]`.

    Raises ValueError when a field breaks these rules.
    """

    levels: tuple[float, ...]
    quantiles: tuple[float, ...]
    unit: Unit
    source: Source
    version: str = ""
    age_s: float = 0.0

    def __post_init__(self) -> None:
        if len(self.levels) != len(self.quantiles) or len(self.levels) < 2:
            raise ValueError(
                f"a forecast needs as many quantiles as levels and at least two, got {len(self.levels)} levels "
                f"and {len(self.quantiles)} quantiles"
            )
        # The levels of the house need no check, and the comparisons find NaN, too: this runs for every call.
        p, q = self.levels, self.quantiles
        if p is not LEVELS and not (p[0] > 0.0 and p[-1] < 1.0 and all(map(lt, p, p[1:]))):
            raise ValueError(f"levels must rise strictly within (0, 1), got {self.levels}")
        if not (q[0] >= 0.0 and q[-1] < math.inf and all(map(le, q, q[1:]))):
            raise ValueError(f"quantiles must be finite, not negative and must not fall, got {self.quantiles}")

    @cached_property
    def mean(self) -> float:
        """Expected value of the piecewise linear distribution, in `unit`."""
        total: float = sum(map(mul, _parts(self.levels)[0], self.quantiles))
        return total

    @cached_property
    def variance(self) -> float:
        """Variance of the piecewise linear distribution, in `unit` squared.

        Between two quantiles the distribution is even, so that it varies less than one that is on the quantiles, by a
        sixth of the square of their distance.
        """
        mean, last, total = self.mean, self.quantiles[0], 0.0
        for mass, sixth, quantile in zip(*_parts(self.levels), self.quantiles, strict=True):
            off, step = quantile - mean, quantile - last
            total += mass * off * off - sixth * step * step
            last = quantile
        return max(0.0, total)

    def quantile(self, level: float) -> float:
        """The value at probability `level`, in `unit`; clamped to the outermost quantiles."""
        return _interpolate(level, self.levels, self.quantiles)

    def cdf(self, value: float) -> float:
        """P(X <= value): zero below the lowest quantile, one from the highest on."""
        p, q = self.levels, self.quantiles
        if value < q[0]:
            return 0.0
        if value >= q[-1]:
            return 1.0
        i = bisect_right(q, value) - 1
        return p[i] + (p[i + 1] - p[i]) * (value - q[i]) / (q[i + 1] - q[i])

    def mean_remaining(self, produced: float) -> float:
        """E[X - produced | X > produced], what a call that already has `produced` still needs.

        Beyond the highest quantile nothing is known; a tenth of what was produced is assumed, so that a call that
        runs on keeps a positive weight.
        """
        if produced <= 0.0:
            return self.mean
        p, q = self.levels, self.quantiles
        if produced >= q[-1]:
            return max(1.0, 0.1 * produced)
        below = self.cdf(produced)
        total = (1.0 - p[-1]) * (q[-1] - produced)
        for i in range(len(p) - 1):
            low, high = max(q[i], produced), q[i + 1]
            if high <= produced or q[i + 1] == q[i]:
                total += (p[i + 1] - p[i]) * max(0.0, q[i] - produced)
                continue
            mass = (p[i + 1] - p[i]) * (high - low) / (q[i + 1] - q[i])
            total += mass * ((low + high) / 2.0 - produced)
        if produced < q[0]:
            total += p[0] * (q[0] - produced)
        return total / (1.0 - below)

    def given(self, produced: float) -> Forecast:
        """The distribution of X given X > `produced`, in `unit` and at the same levels: what is known while it runs.

        From the highest quantile on nothing is known: the tenth of what was produced that `mean_remaining` assumes
        is then the mean of an exponential rest.
        """
        if produced < self.quantiles[0]:
            return self
        below = self.cdf(produced)
        if produced >= self.quantiles[-1] or below >= self.levels[-1]:
            rest = max(1.0, 0.1 * produced)
            quantiles = tuple(produced - rest * math.log1p(-level) for level in self.levels)
        else:
            quantiles = tuple(max(produced, self.quantile(below + level * (1.0 - below))) for level in self.levels)
        return msgspec.structs.replace(self, quantiles=quantiles)


@lru_cache(maxsize=16)
def masses_of(levels: tuple[float, ...]) -> NDArray[np.float64]:
    """How much probability each quantile stands for, [levels], so that their weighted sum is the mean of a forecast."""
    edges = np.array((0.0, *((a + b) / 2.0 for a, b in pairwise(levels)), 1.0))
    masses = np.diff(edges)
    masses.flags.writeable = False
    return masses


@lru_cache(maxsize=16)
def _parts(levels: tuple[float, ...]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """`masses_of` as numbers, and a sixth of the probability between each quantile and the one before it."""
    return tuple(masses_of(levels).tolist()), (0.0, *((b - a) / 6.0 for a, b in pairwise(levels)))


def from_samples(
    samples: Sequence[float], *, unit: Unit, source: Source = "empirical", levels: tuple[float, ...] = LEVELS
) -> Forecast:
    """Empirical quantiles of at least one sample (linear between order statistics)."""
    if not samples:
        raise ValueError("an empirical forecast needs at least one sample")
    ordered = sorted(samples)
    last = len(ordered) - 1
    values = []
    for level in levels:
        position = level * last
        i = int(position)
        upper = ordered[min(i + 1, last)]
        values.append(min(upper, ordered[i] + (upper - ordered[i]) * (position - i)))  # rounding must not overshoot
    return Forecast(levels=levels, quantiles=tuple(values), unit=unit, source=source)


def point(value: float, *, unit: Unit, source: Source = "prior") -> Forecast:
    """A forecast that is sure of one value (an image's work is known from its request)."""
    return Forecast(levels=(0.25, 0.75), quantiles=(value, value), unit=unit, source=source)


def _interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    if x <= xs[0]:
        return ys[0]
    if x >= xs[-1]:
        return ys[-1]
    i = bisect_right(xs, x) - 1
    return min(ys[i + 1], ys[i] + (ys[i + 1] - ys[i]) * (x - xs[i]) / (xs[i + 1] - xs[i]))
