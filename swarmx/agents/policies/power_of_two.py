"""power_of_two: the less loaded of two random candidates."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from swarmx.core.fleet import CallView, Choice, FleetView, Order


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerOfTwo:
    """Of two random candidates the one with fewer calls in flight (Mitzenmacher 2001; Ray Serve's default)."""

    name: ClassVar[str] = "power_of_two"
    order: ClassVar[Order] = "arrival"
    waits: ClassVar[bool] = False

    def choose(self, call: CallView, fleet: FleetView, rng: np.random.Generator) -> Choice:
        if len(fleet) == 1:
            return Choice(index=0)
        first = int(rng.integers(len(fleet)))
        second = int(rng.integers(len(fleet) - 1))
        second += second >= first
        return Choice(index=first if fleet.in_flight[first] <= fleet.in_flight[second] else second)
