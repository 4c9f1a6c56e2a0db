"""murakkab_mean: least mean queue plus mean latency."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from swarmx.agents.policies.serial_view import serial_view
from swarmx.agents.policies.ties import least
from swarmx.core.fleet import CallView, Choice, FleetView, Order


@dataclass(frozen=True, slots=True, kw_only=True)
class MurakkabMean:
    """The candidate with the least mean queue plus mean latency of the call, by device.

    Murakkab (arXiv 2508.18298) plans with profiles; the SwarmX paper (arXiv 2606.21401) has it route by a point
    estimate, the mean latency of a role on a device, and so does this. The original sees no prompt. That has to come
    from outside: give the router forecasts that are means of the role, as the evaluation does, for here the mean of
    whatever forecast it is handed is used. The length of the prompt is known here, which is more than it had.

    `share` 0: calls run one by one, as the published code of SwarmX assumes of its `min_expected_time`; 1: the queue is
    divided by its batch. Its placement by a solver (which models on which devices) is not part of a routing policy.
    """

    name: ClassVar[str] = "murakkab_mean"
    order: ClassVar[Order] = "arrival"
    waits: ClassVar[bool] = False

    share: float = 1.0

    def choose(self, call: CallView, fleet: FleetView, rng: np.random.Generator) -> Choice:
        view = serial_view(call, fleet, self.share)
        latency_s = view.fixed_s + view.per_work_s * call.forecast.mean
        cost_s = view.queue_s + latency_s
        terms_s = {"queue_s": view.queue_s, "latency_s": latency_s}
        return Choice(index=least(cost_s, rng), cost_s=cost_s, terms_s=terms_s)
