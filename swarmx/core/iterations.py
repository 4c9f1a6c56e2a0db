"""Iterations of an engine whose batch does not change, summed in closed form."""

from __future__ import annotations

import math


class Iterations:
    """The first takes `first_s`, each later one `growth_s` more than the one before; `done` of `steps` are credited."""

    __slots__ = ("done", "end_s", "first_s", "growth_s", "start_s", "steps")

    def __init__(self, start_s: float, first_s: float, growth_s: float = 0.0) -> None:
        self.start_s = start_s
        self.first_s = first_s
        self.growth_s = growth_s
        self.done = 0
        self.steps = 1
        self.end_s = start_s + first_s

    def plan(self, steps: int) -> None:
        """End after so many steps."""
        self.steps = steps
        self.end_s = self.at_s(steps)

    def at_s(self, steps: int) -> float:
        """When so many steps have ended."""
        return self.start_s + (steps * self.first_s + self.growth_s * steps * (steps - 1) / 2.0)

    def ended_by(self, until_s: float) -> int:
        """How many steps have ended at `until_s`: the root of the arithmetic progression, then exact."""
        if self.end_s <= until_s:
            return self.steps
        if self.steps - self.done == 1:
            return self.done
        growth, first = self.growth_s / 2.0, self.first_s - self.growth_s / 2.0
        left_s = max(0.0, until_s - self.start_s)
        root = (math.sqrt(first * first + 4.0 * growth * left_s) - first) / (2.0 * growth) if growth else left_s / first
        steps = max(self.done, min(self.steps, int(root)))
        while steps < self.steps and self.at_s(steps + 1) <= until_s:
            steps += 1
        while steps > self.done and self.at_s(steps) > until_s:
            steps -= 1
        return steps
