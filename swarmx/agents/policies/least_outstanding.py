"""least_outstanding: the candidate with the fewest calls in flight."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from swarmx.core.fleet import CallView, Choice, FleetView, Order


@dataclass(frozen=True, slots=True, kw_only=True)
class LeastOutstanding:
    """The candidate with the fewest calls in flight, ties broken at random. Blind to devices and to lengths."""

    name: ClassVar[str] = "least_outstanding"
    order: ClassVar[Order] = "arrival"
    waits: ClassVar[bool] = False

    def choose(self, call: CallView, fleet: FleetView, rng: np.random.Generator) -> Choice:
        fewest = (fleet.in_flight == fleet.in_flight.min()).nonzero()[0]
        return Choice(index=int(fewest[rng.integers(len(fewest))]))
