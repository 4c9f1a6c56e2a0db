"""Whether a policy's answer can be used, and which replica came second in it."""

from __future__ import annotations

import operator

import numpy as np

from swarmx.core.fleet import Choice


def is_sound(choice: Choice, replicas: int) -> bool:
    """Whether the choice points at a replica and speaks about all of them."""
    columns = [*choice.terms_s.values()] if choice.cost_s is None else [choice.cost_s, *choice.terms_s.values()]
    return 0 <= operator.index(choice.index) < replicas and all(c.shape == (replicas,) for c in columns)


def second_of(choice: Choice) -> int | None:
    """The position with the least cost but for the chosen one; None where costs were not weighed."""
    if choice.cost_s is None or len(choice.cost_s) < 2:
        return None
    others = choice.cost_s.copy()
    others[choice.index] = np.inf
    second = int(others.argmin())
    return None if second == choice.index else second
