"""Named points between two steps that must not be torn apart; a test makes the process die at one of them.

Nothing in a server sets `hit`: only a test's launcher replaces it, in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable


def _nothing(point: str) -> None:
    pass


hit: Callable[[str], None] = _nothing
"""Call it as `failpoints.hit("lane.committed")`, so that a replaced one is found."""
