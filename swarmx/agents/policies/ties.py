"""The candidate with the least of something, all that have it equally likely."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from swarmx.core.fleet import Floats, Ints


def least(values: Floats | Ints, rng: np.random.Generator, among: NDArray[np.bool_] | None = None) -> int:
    """A position of the least of the values, shape [replicas]; with `among`, of those where it is true, at least one.

    Equals are drawn at random: a fixed winner of ties is flooded by routers that all see an idle fleet.
    """
    if among is None:
        found = np.flatnonzero(values == values.min())
    else:
        open_to = np.flatnonzero(among)
        of_these = values[open_to]
        found = open_to[of_these == of_these.min()]
    return int(found[0] if len(found) == 1 else found[rng.integers(len(found))])
