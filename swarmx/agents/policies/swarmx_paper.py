"""swarmx_paper: the routing algorithm of the SwarmX paper, as its text reads."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar

import numpy as np

from swarmx.agents.policies.serial_view import SerialView, gamma_quantiles, gamma_scores, serial_view
from swarmx.agents.policies.ties import least
from swarmx.core.fleet import CallView, Choice, FleetView, Floats, Order

_GRID = np.array([*(i / 20 for i in range(1, 20)), 0.99])
_CELLS = (np.arange(256) + 0.5) / 256  # a draw is one of 256 equally likely cells of a sketch
_NORMAL = NormalDist()
_SCORES = np.clip([_NORMAL.inv_cdf(u) for u in _CELLS], _NORMAL.inv_cdf(_GRID[0]), _NORMAL.inv_cdf(_GRID[-1]))
_STEPS = 64  # to which a tail quantile is found
_SCORE_GRID = np.linspace(-8.0, 8.0, 321)
_EXCEED = np.array([_NORMAL.cdf(-z) for z in _SCORE_GRID])


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmXPaper:
    """Draws latencies from each candidate's queue and call sketches, and takes the one that wins most draws.

    Algorithm 1 of SwarmX (arXiv 2606.21401, section 3.2): D_g, the latency quantiles of the call on g; S_g, the queue
    sketches with D_g added to that of g; c_g = C_tail(S_g); draw from the c_g and dispatch to the least. What the paper
    leaves open is read thus:
    - sketches have 20 levels, 0.05 to 0.95 and 0.99, and are clamped outside;
    - a replica's sketch is the independent sum of what its calls need still, given what they have produced: a gamma
      distribution of the mean and variance that the router keeps (decremented at completion), as sums of sums are not
      kept by quantiles here;
    - the sum with D_g is independent: drawing both terms by themselves draws from it exactly;
    - `tail` 0: C_tail is the worst of all replicas. It is max(Q[g] + D_g, the others' worst), so all candidates that
      would not be the worst tie; ties are broken by Q[g] + D_g, and then the least drawn C_tail is the least drawn
      Q[g] + D_g. Of `draws` draws, who wins most is chosen, ties at random;
    - `tail` in (0, 1): C_tail is that quantile of the mixture of all calls in flight, each with its replica's sketch.
      A number: nothing is drawn. Equals (to a 64th of the range) are decided by the expected completion.
    `share`: 0, calls run one by one, as the paper has it; 1, a queue is divided by its batch.
    """

    name: ClassVar[str] = "swarmx_paper"
    order: ClassVar[Order] = "arrival"
    waits: ClassVar[bool] = False

    draws: float = 10.0
    tail: float = 0.0
    share: float = 1.0

    def choose(self, call: CallView, fleet: FleetView, rng: np.random.Generator) -> Choice:
        view = serial_view(call, fleet, self.share)
        own_s = view.fixed_s + view.per_work_s * call.forecast.mean
        expected_s = view.queue_s + own_s
        if self.tail > 0.0:
            tail_s = self._tail_s(call, fleet, view)
            index = least(expected_s, rng, tail_s == tail_s.min())
        else:
            quantiles = np.interp(_GRID, call.forecast.levels, call.forecast.quantiles)
            work = np.interp(_CELLS, _GRID, quantiles)
            cells = rng.integers(0, 256, (2, max(1, int(self.draws)), len(fleet)), dtype=np.uint8)
            drawn_s = gamma_quantiles(view.queue_s, view.queue_sd_s, _SCORES[cells[0]])
            drawn_s += view.fixed_s + view.per_work_s * work[cells[1]]
            wins = np.bincount(drawn_s.argmin(axis=1), minlength=len(fleet))
            index = least(-wins, rng)
        return Choice(index=index, cost_s=expected_s, terms_s={"queue_s": view.queue_s, "own_s": own_s})

    def _tail_s(self, call: CallView, fleet: FleetView, view: SerialView) -> Floats:
        """The tail quantile of the completions of all calls, this one among them at each replica in turn."""
        calls = fleet.in_flight.astype(np.float64)
        with_it_s = view.queue_s + view.fixed_s + view.per_work_s * call.forecast.mean
        spread_s = np.hypot(view.queue_sd_s, view.per_work_s * np.sqrt(call.forecast.variance))
        # no further than the best of them can come to: beyond, all are equally bad
        far_s = max(((view.queue_s + 4.0 * view.queue_sd_s) * (calls > 0.0)).max(), (with_it_s + 4.0 * spread_s).min())
        at_s = np.linspace(0.0, far_s, _STEPS + 1)[1:]
        here = calls * _exceed(view.queue_s, view.queue_sd_s, at_s[:, None])
        late = here.sum(axis=1)[:, None] - here + (calls + 1.0) * _exceed(with_it_s, spread_s, at_s[:, None])
        too_many = late > (1.0 - self.tail) * (calls.sum() + 1.0)
        tail_s: Floats = at_s[np.minimum(too_many.sum(axis=0), _STEPS - 1)]
        return tail_s


def _exceed(mean: Floats, sd: Floats, value: Floats) -> Floats:
    """P(X > value) of gamma distributions."""
    exceed: Floats = np.interp(gamma_scores(mean, sd, value), _SCORE_GRID, _EXCEED)
    return exceed
