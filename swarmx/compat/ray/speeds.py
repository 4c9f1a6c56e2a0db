"""How fast places are compared with each other, learnt from what their calls took."""

from __future__ import annotations

import math

_RATE = 0.2
_ENOUGH = 3  # calls until a place is believed
_MOST = math.log(1e4)


class Speeds:
    """A factor for each place: how many times as long as on an average one a call takes there.

    Exponentially forgetting means of logarithms, so that one slow call does not make a slow place. A place of which
    little is known counts as the fastest of those that are: else one that was guessed too slow would never be tried.
    """

    def __init__(self) -> None:
        self._logs: dict[str, float] = {}
        self._calls: dict[str, int] = {}

    def observe(self, place: str, seconds: float, expected: float) -> None:
        """A call took so long, of which so long was expected on an average place."""
        if not (seconds > 0.0 and expected > 0.0 and math.isfinite(seconds) and math.isfinite(expected)):
            return
        ratio = max(-_MOST, min(_MOST, math.log(seconds / expected)))
        calls = self._calls[place] = self._calls.get(place, 0) + 1
        value = self._logs.get(place, 0.0)
        self._logs[place] = value + max(_RATE, 1.0 / calls) * (ratio - value)
        mean = sum(self._logs.values()) / len(self._logs)
        for name in self._logs:  # an average place has 1: what is learnt of works and of places stays apart
            self._logs[name] -= 0.1 * mean

    def factor(self, place: str) -> float:
        """1 before anything is known."""
        known = [value for name, value in self._logs.items() if self._calls[name] >= _ENOUGH]
        if self._calls.get(place, 0) >= _ENOUGH:
            return math.exp(self._logs[place])
        return math.exp(min(known, default=0.0))

    def forget(self, place: str) -> None:
        self._logs.pop(place, None)
        self._calls.pop(place, None)
