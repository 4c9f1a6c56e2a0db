"""swarmx_paper_repo: the routing algorithm of SwarmX as its published code has it."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar

import numpy as np

from swarmx.agents.policies.serial_view import gamma_quantiles, serial_view
from swarmx.core.fleet import CallView, Choice, FleetView, Floats, Order


def _scores(levels: Floats) -> Floats:
    return np.array([[NormalDist().inv_cdf(level)] for level in levels.tolist()])


_COARSE = np.array([0.5, 0.9, 0.95, 0.99])
_FINE = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99])
_GRIDS = ((_COARSE, _scores(_COARSE)), (_FINE, _scores(_FINE)))


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmXPaperRepo:
    """Draws one level for all candidates and for queue and call alike; takes who is least at most levels.

    `probabilistic` of SwarmPilot, the published code behind the SwarmX paper: `draws` levels u, uniform; the total of
    a candidate at u is its queue's quantile at u plus the call's quantile at u (comonotonic addition); the least wins,
    the first among equals, and who wins most levels is chosen. Quantiles are kept at 0.5, 0.9, 0.95 and 0.99 and
    clamped: half of the levels are the median (`fine` 1: at 0.1 to 0.9 and 0.99, the grid of one of its experiments).

    What differs: there, queues never shrink when a call completes; here they do, and calls that run count with what
    they need still. There, a queue is the comonotonic sum of its calls' quantiles. The router keeps the sum V of the
    variances of n calls: the deviations of calls that add up comonotonically add up, to at most sqrt(n V), which is
    reached when the calls are alike and is taken here; a gamma distribution gives the quantiles.
    `share`: 0, calls run one by one, as there; 1, a queue is divided by its batch.
    """

    name: ClassVar[str] = "swarmx_paper_repo"
    order: ClassVar[Order] = "arrival"
    waits: ClassVar[bool] = False

    draws: float = 10.0
    fine: float = 0.0
    share: float = 1.0

    def choose(self, call: CallView, fleet: FleetView, rng: np.random.Generator) -> Choice:
        levels, scores = _GRIDS[self.fine > 0.0]
        view = serial_view(call, fleet, self.share)
        work = np.interp(levels, call.forecast.levels, call.forecast.quantiles)
        queue_s = gamma_quantiles(view.queue_s, view.queue_sd_s * np.sqrt(fleet.in_flight), scores)
        at_levels_s = queue_s + view.fixed_s + view.per_work_s * work[:, None]
        drawn_s = _between(levels, rng.random(max(1, int(self.draws)))) @ at_levels_s
        wins = np.bincount(drawn_s.argmin(axis=1), minlength=len(fleet))
        own_s = view.fixed_s + view.per_work_s * call.forecast.mean
        terms_s = {"queue_s": view.queue_s, "own_s": own_s}
        return Choice(index=int(wins.argmax()), cost_s=view.queue_s + own_s, terms_s=terms_s)


def _between(levels: Floats, u: Floats) -> Floats:
    """Weights of the quantiles at `levels` in those at `u`, shape [u, levels]: linear in between, clamped outside."""
    rank = np.interp(u, levels, np.arange(len(levels)))
    return np.maximum(0.0, 1.0 - np.abs(rank[:, None] - np.arange(len(levels))))
