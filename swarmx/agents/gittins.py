"""The Gittins index of a job of which the service so far is known, and the service of others like it."""

from __future__ import annotations

import numpy as np

from swarmx.core.fleet import Floats

_UNKNOWN = 1e-3  # of a kind of which nothing is known: as if its mean rest were a thousand seconds


def gittins_index(past_s: Floats, attained_s: float) -> float:
    """max over d of P(X - a <= d | X > a) / E[min(X - a, d) | X > a], in 1/s; `past_s` are samples of X, sorted.

    Gittins, Multi-armed Bandit Allocation Indices (1989); as used by Hermes (arXiv 2506.14851). A job that has run
    longer than all that are known goes as if its rest had the length of what it had already.
    """
    rest: Floats = past_s[np.searchsorted(past_s, attained_s, side="right") :] - attained_s
    if len(rest) == 0:
        return 1.0 / attained_s if len(past_s) and attained_s > 0.0 else _UNKNOWN
    count = np.arange(1, len(rest) + 1)
    served = np.cumsum(rest) + (len(rest) - count) * rest
    return float((count / np.maximum(served, 1e-9)).max())
