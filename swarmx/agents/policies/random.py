"""random: any candidate, all equally likely."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from swarmx.core.fleet import CallView, Choice, FleetView, Order


@dataclass(frozen=True, slots=True, kw_only=True)
class Random:
    """Any candidate, all equally likely. The floor that every other policy has to beat."""

    name: ClassVar[str] = "random"
    order: ClassVar[Order] = "arrival"
    waits: ClassVar[bool] = False

    def choose(self, call: CallView, fleet: FleetView, rng: np.random.Generator) -> Choice:
        return Choice(index=int(rng.integers(len(fleet))))
