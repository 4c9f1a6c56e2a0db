"""A forecaster that never fails: a plain one stands in for one that is wrong or slow, and operators are told."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from swarmx.core.forecast import Forecast, Unit
from swarmx.core.messages import AlertRaised, Message
from swarmx.core.nouns import Call, CallKind
from swarmx.core.ports import Forecaster
from swarmx.core.prompts import Encoding, PromptText
from swarmx.runtime.clock import Clock

log = logging.getLogger(__name__)

Fault = Literal["raised", "unsound", "slow"]

_LOOKS_BACK = 32  # calls
_MOST_FAULTS = 8  # of these
_MOST_OVERTIME_S = 1.0  # of these together, by the wall: a few that block for long are as bad as many that are slow
_COMPLAINS_EVERY_S = 60.0

_UNITS: dict[CallKind, Unit] = {"llm": "tokens", "image": "work"}
_UNREAD = Encoding(encoder="", vector=np.zeros(0, dtype=np.float32))


class _Time(NamedTuple):
    """Seconds by the wall, and of this thread's own."""

    wall: float
    busy: float


_NO_TIME = _Time(0.0, 0.0)


class GuardedForecaster:
    """Implements `core.ports.Forecaster` with `primary`, and with `fallback` where that does not do.

    A call for which `primary` raises, or answers what is no forecast of its work, gets that of `fallback` at once. When
    8 of the last 32 calls had a fault, or the last 32 took a second more than they may, `primary` rests for `rest_s`,
    and AlertRaised names it. To need more than `budget_s` is a fault as well, though the forecast counts; what counts
    there is the thread's own time (`busy_s`): that a busy machine lets all of us wait is not the predictor's fault.
    Both learn from every observation, unless `primary` is told not to (`learns`). `fallback` has to work without an
    encoding, and is trusted.

    `on_forecast` hears the source of each forecast and the seconds that it took; `on_rest` why the primary rests.
    """

    def __init__(
        self,
        primary: Forecaster,
        fallback: Forecaster,
        *,
        name: str,
        budget_s: float,
        clock: Clock,
        post: Callable[[Message], None],
        rest_s: float = 30.0,
        learns: bool = True,
        busy_s: Callable[[], float] = time.thread_time,
        on_forecast: Callable[[str, float], None] = lambda source, seconds: None,
        on_rest: Callable[[Fault], None] = lambda fault: None,
    ) -> None:
        self.name = name
        self._primary = primary
        self._fallback = fallback
        self._budget_s = budget_s
        self._clock = clock
        self._post = post
        self._rest_s = rest_s
        self._learns = learns
        self._busy_s = busy_s
        self._on_forecast = on_forecast
        self._on_rest = on_rest
        self._faults: deque[bool] = deque(maxlen=_LOOKS_BACK)
        self._overtime_s: deque[float] = deque(maxlen=_LOOKS_BACK)
        self._rests_until_s = -math.inf
        self._encode_s = _NO_TIME
        self._complained_s = -math.inf

    @property
    def resting(self) -> bool:
        """Whether the fallback answers all calls now."""
        return self._clock.now_s() < self._rests_until_s

    def encode(self, call: Call, prompt: PromptText) -> Encoding:
        """The primary's encoding; one without an encoder where it has none to give."""
        begun = self._now()
        self._encode_s = _NO_TIME
        if begun.wall < self._rests_until_s:
            return _UNREAD
        encoding: object = None
        fault: Fault = "unsound"
        try:
            encoding = self._primary.encode(call, prompt)
        except Exception as error:  # noqa: BLE001  # weights are data: whatever they lead to must not stop a call
            fault = "raised"
            self._complain("encode", error)
        self._encode_s = self._since(begun)
        if isinstance(encoding, Encoding):
            return encoding
        self._mark(fault, self._encode_s.wall)
        return _UNREAD

    def forecast(self, call: Call, encoding: Encoding) -> Forecast:
        """The primary's forecast, or the fallback's; its `source` tells."""
        begun = self._now()
        encode_s, self._encode_s = self._encode_s, _NO_TIME
        found: Forecast | None = None
        if encoding is not _UNREAD and begun.wall >= self._rests_until_s:
            fault: Fault | None = None
            try:
                found = self._primary.forecast(call, encoding)
            except Exception as error:  # noqa: BLE001
                fault = "raised"
                self._complain("forecast", error)
            else:
                if not is_sound(found, call):
                    found, fault = None, "unsound"
            spent = self._since(begun)
            if fault is None and encode_s.busy + spent.busy > self._budget_s:
                fault = "slow"
            self._mark(fault, encode_s.wall + spent.wall)
        if found is None:
            found = self._fallback.forecast(call, encoding)
        self._on_forecast(found.source, encode_s.wall + self._since(begun).wall)
        return found

    def observe(self, call: Call, encoding: Encoding, work_done: float) -> None:
        """Both learn. Of a call that came while the primary rested, it has no encoding and learns nothing."""
        self._fallback.observe(call, encoding, work_done)
        if not self._learns:
            return
        try:
            self._primary.observe(call, encoding, work_done)
        except Exception as error:  # noqa: BLE001
            self._complain("observe", error)

    def _now(self) -> _Time:
        return _Time(self._clock.now_s(), self._busy_s())

    def _since(self, begun: _Time) -> _Time:
        return _Time(self._clock.now_s() - begun.wall, self._busy_s() - begun.busy)

    def _mark(self, fault: Fault | None, wall_s: float) -> None:
        self._faults.append(fault is not None)
        self._overtime_s.append(max(0.0, wall_s - self._budget_s))
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

    def _complain(self, step: str, error: Exception) -> None:
        """The log is not for every call."""
        now_s = self._clock.now_s()
        if now_s - self._complained_s >= _COMPLAINS_EVERY_S:
            self._complained_s = now_s
            log.error("the predictor %s failed in %s", self.name, step, exc_info=error)


def is_sound(forecast: object, call: Call) -> bool:
    """Whether this is a forecast of the call's work; that its quantiles are finite and rise, `Forecast` sees to."""
    return isinstance(forecast, Forecast) and forecast.unit == _UNITS[call.kind] and math.isfinite(forecast.mean)
