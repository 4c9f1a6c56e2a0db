"""speed_edf: the fewest calls in flight for its speed, and the earliest deadline first among calls that wait."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from swarmx.agents.policies.ties import least
from swarmx.agents.policies.weighted_least_outstanding import typical_step_s
from swarmx.core.fleet import CallView, Choice, FleetView, Order


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedEdf:
    """The candidate of weighted_least_outstanding; calls that wait in the router go by their workflow's deadline.

    Earliest deadline first (Liu & Layland 1973) over replicas that are chosen by calls in flight and device speed: the
    strongest policy that needs no forecast. It works with late binding, which keeps calls in the router until a replica
    has room; with early binding there is no queue to order, and it is weighted_least_outstanding. The deadline is the
    time at which the whole workflow was submitted, plus its target.
    """

    name: ClassVar[str] = "speed_edf"
    order: ClassVar[Order] = "deadline"
    waits: ClassVar[bool] = False

    batch: float = 16.0
    context_tokens: float = 2000.0
    prompt_per_output: float = 4.0

    def choose(self, call: CallView, fleet: FleetView, rng: np.random.Generator) -> Choice:
        step_s = typical_step_s(fleet, self.batch, self.context_tokens, self.prompt_per_output)
        return Choice(index=least((fleet.in_flight + 1) * step_s, rng))
