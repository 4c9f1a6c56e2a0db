"""What the routers said last about the demand for one model, summed over them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np

from swarmx.core.messages import DemandReported


class Reports:
    """The last report of each router.

    Reports do not name their sender, but a router's own last one is always a whole window older: what came within the
    last window comes from different routers and adds up.
    """

    def __init__(self) -> None:
        self._last: deque[tuple[float, DemandReported]] = deque(maxlen=64)
        self._bursts: deque[float] = deque(maxlen=8)

    def add(self, report: DemandReported, now_s: float) -> None:
        while self._last and self._last[0][0] <= now_s - 0.9 * report.window_s:
            self._last.popleft()
        self._last.append((now_s, report))

    def sample(self) -> None:
        """Take the rate of this moment into `arrivals_per_s`; called at regular times."""
        self._bursts.append(self.burst_per_s)

    @property
    def in_flight(self) -> int:
        return sum(report.in_flight for _, report in self._last)

    @property
    def waiting(self) -> int:
        return sum(report.waiting for _, report in self._last)

    @property
    def work_left(self) -> float:
        return sum(report.work_left for _, report in self._last)

    @property
    def work_per_call(self) -> float:
        """Weighted by how many calls each router speaks of; the plain mean where there are none."""
        weights = [report.arrived + report.in_flight + report.waiting for _, report in self._last]
        values = [report.work_per_call for _, report in self._last]
        if not values:
            return 0.0
        if not any(weights):
            return sum(values) / len(values)
        return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)

    @property
    def burst_per_s(self) -> float:
        return sum(report.arrived / report.window_s for _, report in self._last if report.window_s > 0.0)

    @property
    def arrivals_per_s(self) -> float:
        return sum(self._bursts) / len(self._bursts) if self._bursts else self.burst_per_s

    def upcoming(self, horizon_s: float) -> tuple[float, float]:
        """Mean and P90 of the further calls of running workflows; routers are independent of each other."""
        means = [_at(horizon_s, report.horizons_s, report.upcoming_mean) for _, report in self._last]
        p90s = [_at(horizon_s, report.horizons_s, report.upcoming_p90) for _, report in self._last]
        spread = math.sqrt(sum((p90 - mean) ** 2 for mean, p90 in zip(means, p90s, strict=True)))
        return sum(means), sum(means) + spread

    def fresh(self, horizon_s: float) -> float:
        """Mean of the calls of workflows that are not submitted yet."""
        return sum(_at(horizon_s, report.horizons_s, report.fresh_mean) for _, report in self._last)


def _at(horizon_s: float, horizons_s: Sequence[float], values: Sequence[float]) -> float:
    """Linear between the horizons of the report, from nothing at 0; the last value beyond them."""
    return float(np.interp(horizon_s, [0.0, *horizons_s], [0.0, *values]))
