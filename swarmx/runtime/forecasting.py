"""A forecaster that never fails: a plain one stands in for one that is wrong or slow, and operators are told."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np

from swarmx.core.forecast import Forecast, Unit
from swarmx.core.messages import Message
from swarmx.core.nouns import Call, CallKind
from swarmx.core.ports import Forecaster
from swarmx.core.prompts import Encoding, PromptText
from swarmx.runtime.clock import Clock
from swarmx.runtime.reliance import NOTHING, Fault, Reliance

_UNITS: dict[CallKind, Unit] = {"llm": "tokens", "image": "work", "tool": "s"}
_UNREAD = Encoding(encoder="", vector=np.zeros(0, dtype=np.float32))


class GuardedForecaster:
    """Implements `core.ports.Forecaster` with `primary`, and with `fallback` where that does not do.

    A call for which `primary` raises, or answers what is no forecast of its work, gets that of `fallback` at once. One
    that took more than `budget_s` is a fault as well, though the forecast counts. With too many of them `primary` rests
    (`runtime.reliance`). Both learn from every observation, unless `primary` is told not to (`learns`). `fallback` has
    to work without an encoding, and is trusted. Tools are its business alone: `primary` reads prompts, and what a tool
    is given is none.

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
        self._learns = learns
        self._on_forecast = on_forecast
        self._reliance = Reliance(
            name, budget_s=budget_s, clock=clock, post=post, rest_s=rest_s, busy_s=busy_s, on_rest=on_rest
        )
        self._encoding_took = NOTHING

    @property
    def resting(self) -> bool:
        """Whether the fallback answers all calls now."""
        return self._reliance.rests(self._reliance.now().wall)

    def encode(self, call: Call, prompt: PromptText) -> Encoding:
        """The primary's encoding; one without an encoder where it has none to give."""
        reliance = self._reliance
        begun = reliance.now()
        self._encoding_took = NOTHING
        if call.kind == "tool" or reliance.rests(begun.wall):
            return _UNREAD
        encoding: object = None
        fault: Fault = "unsound"
        try:
            encoding = self._primary.encode(call, prompt)
        except Exception as error:  # noqa: BLE001  # weights are data: whatever they lead to must not stop a call
            fault = "raised"
            reliance.complain("encode", error)
        self._encoding_took = reliance.since(begun)
        if isinstance(encoding, Encoding):
            return encoding
        reliance.mark(fault, self._encoding_took)
        return _UNREAD

    def forecast(self, call: Call, encoding: Encoding) -> Forecast:
        """The primary's forecast, or the fallback's; its `source` tells."""
        reliance = self._reliance
        begun = reliance.now()
        encoding_took, self._encoding_took = self._encoding_took, NOTHING
        found: Forecast | None = None
        if encoding is not _UNREAD and not reliance.rests(begun.wall):
            fault: Fault | None = None
            try:
                found = self._primary.forecast(call, encoding)
            except Exception as error:  # noqa: BLE001
                fault = "raised"
                reliance.complain("forecast", error)
            else:
                if not is_sound(found, call):
                    found, fault = None, "unsound"
            reliance.mark(fault, encoding_took.plus(reliance.since(begun)))
        if found is None:
            found = self._fallback.forecast(call, encoding)
        self._on_forecast(found.source, encoding_took.plus(reliance.since(begun)).wall)
        return found

    def observe(self, call: Call, encoding: Encoding, work_done: float) -> None:
        """Both learn. Of a call that came while the primary rested, it has no encoding and learns nothing."""
        self._fallback.observe(call, encoding, work_done)
        if not self._learns:
            return
        try:
            self._primary.observe(call, encoding, work_done)
        except Exception as error:  # noqa: BLE001
            self._reliance.complain("observe", error)


def is_sound(forecast: object, call: Call) -> bool:
    """Whether this is a forecast of the call's work; that its quantiles are finite and rise, `Forecast` sees to."""
    return isinstance(forecast, Forecast) and forecast.unit == _UNITS[call.kind] and math.isfinite(forecast.mean)
