"""round_robin: the candidates in turn."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from swarmx.core.fleet import CallView, Choice, FleetView, Order


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRobin:
    """The candidates in turn: the one that this router chose longest ago, the first row among equals."""

    name: ClassVar[str] = "round_robin"
    order: ClassVar[Order] = "arrival"
    waits: ClassVar[bool] = False

    def choose(self, call: CallView, fleet: FleetView, rng: np.random.Generator) -> Choice:
        return Choice(index=int(np.argmin(fleet.last_chosen)))
