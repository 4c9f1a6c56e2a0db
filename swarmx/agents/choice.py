"""Whether a policy's answer can be used, and which replica came second in it."""

from __future__ import annotations

import math
import operator

import numpy as np

from swarmx.core.fleet import Choice, Terms


def is_sound(choice: Choice, replicas: int) -> bool:
    """Whether the choice points at a replica, speaks about all of them, and gives numbers where it gives any.

    A replica may cost more than any number, and need not have a cost at all unless it is the chosen one.
    """
    if not 0 <= operator.index(choice.index) < replicas or not math.isfinite(choice.urgency):
        return False
    if not 0.0 < choice.weight < math.inf:
        return False
    if choice.expected_s is not None and not math.isfinite(choice.expected_s):
        return False
    if choice.cost_s is not None and (
        choice.cost_s.shape != (replicas,) or math.isnan(choice.cost_s.item(choice.index))
    ):
        return False
    if isinstance(choice.terms_s, Terms):
        return choice.terms_s.table.shape == (1 + len(choice.terms_s.names), replicas)
    return all(term.shape == (replicas,) for term in choice.terms_s.values())


def second_of(choice: Choice) -> int | None:
    """The position with the least cost but for the chosen one; None where costs were not weighed."""
    if choice.cost_s is None or len(choice.cost_s) < 2:
        return None
    others = choice.cost_s.copy()
    others[choice.index] = math.inf
    second = int(others.argmin())
    if math.isnan(others.item(second)):
        second = int(np.nan_to_num(others, nan=np.inf, posinf=np.inf).argmin())
    return None if second == choice.index else second
