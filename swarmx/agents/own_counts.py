"""What this router had on a replica a moment ago: old signals of an engine count its calls of that time."""

from __future__ import annotations

from collections import deque

KEPT_S = 30.0


class OwnCounts:
    """The number of own calls on one replica over the last `KEPT_S` seconds, as steps."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, int]] = deque()
        self._before = 0

    def changed(self, count: int, now_s: float) -> None:
        """From now on there are this many."""
        self._steps.append((now_s, count))
        while self._steps[0][0] < now_s - KEPT_S:
            self._before = self._steps.popleft()[1]

    def at(self, at_s: float) -> int:
        """How many there were at that time."""
        for since_s, count in reversed(self._steps):
            if since_s <= at_s:
                return count
        return self._before
