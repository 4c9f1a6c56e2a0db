"""Whether a predictor can be relied on now: one that fails or is slow rests for a while, and operators are told."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Literal, NamedTuple

from swarmx.core.messages import AlertRaised, Message
from swarmx.runtime.clock import Clock

log = logging.getLogger(__name__)

Fault = Literal["raised", "unsound", "slow"]

_LOOKS_BACK = 32  # calls
_MOST_FAULTS = 8  # of these
_MOST_OVERTIME_S = 1.0  # of these together, by the wall: a few that block for long are as bad as many that are slow
_COMPLAINS_EVERY_S = 60.0


class Spent(NamedTuple):
    """Seconds by the wall, and of this thread's own."""

    wall: float
    busy: float

    def plus(self, other: Spent) -> Spent:
        """Both together."""
        return Spent(self.wall + other.wall, self.busy + other.busy)


NOTHING = Spent(0.0, 0.0)


class Reliance:
    """Counts the faults of the predictor `name`, which may take `budget_s` for a call.

    When 8 of the last 32 calls had a fault, or the last 32 took a second more than they may, it rests for `rest_s`, and
    AlertRaised names it. What counts for the budget is the thread's own time (`busy_s`): that a busy machine lets all
    of us wait is not the predictor's fault. `on_rest` hears why it rests.
    """

    def __init__(
        self,
        name: str,
        *,
        budget_s: float,
        clock: Clock,
        post: Callable[[Message], None],
        rest_s: float = 30.0,
        busy_s: Callable[[], float] = time.thread_time,
        on_rest: Callable[[Fault], None] = lambda fault: None,
    ) -> None:
        self.name = name
        self._budget_s = budget_s
        self._clock = clock
        self._post = post
        self._rest_s = rest_s
        self._busy_s = busy_s
        self._on_rest = on_rest
        self._faults: deque[bool] = deque(maxlen=_LOOKS_BACK)
        self._overtime_s: deque[float] = deque(maxlen=_LOOKS_BACK)
        self._rests_until_s = -math.inf
        self._complained_s = -math.inf

    def rests(self, now_s: float) -> bool:
        """Whether it is not to be asked now."""
        return now_s < self._rests_until_s

    def now(self) -> Spent:
        """Where both clocks stand."""
        return Spent(self._clock.now_s(), self._busy_s())

    def since(self, begun: Spent) -> Spent:
        """What went by on both."""
        return Spent(self._clock.now_s() - begun.wall, self._busy_s() - begun.busy)

    def mark(self, fault: Fault | None, spent: Spent) -> None:
        """A call took so long, and went wrong in this way; to take too long is a fault as well."""
        if fault is None and spent.busy > self._budget_s:
            fault = "slow"
        self._faults.append(fault is not None)
        self._overtime_s.append(max(0.0, spent.wall - self._budget_s))
        if sum(self._overtime_s) >= _MOST_OVERTIME_S:
            fault = fault or "slow"
        elif fault is None or sum(self._faults) < _MOST_FAULTS:
            return
        self._faults.clear()
        self._overtime_s.clear()
        self._rests_until_s = self._clock.now_s() + self._rest_s
        log.warning("the predictor %s rests for %g s (%s); plain statistics stand in", self.name, self._rest_s, fault)
        self._on_rest(fault)
        self._post(AlertRaised(kind="predictor_fallback", subject=self.name, value=self._rest_s))

    def complain(self, step: str, error: Exception) -> None:
        """It raised; the log is not for every call."""
        now_s = self._clock.now_s()
        if now_s - self._complained_s >= _COMPLAINS_EVERY_S:
            self._complained_s = now_s
            log.error("the predictor %s failed in %s", self.name, step, exc_info=error)
