"""The first forecaster: quantiles of what earlier calls of the same kind, role and model came to."""

from __future__ import annotations

import math
from collections import OrderedDict, deque

import msgspec
import numpy as np

from swarmx.core.forecast import LEVELS, Forecast, Unit, from_samples, point
from swarmx.core.nouns import Call
from swarmx.core.prompts import Encoding, PromptText

_WINDOW = 256
_ENOUGH = 8
_REFRESH = 8

# Guesses, and wide on purpose: from a short reply to a long one, from a sum to a crawl. Eight observations replace
# them.
_WIDE_TOKENS = (10.0, 20.0, 80.0, 220.0, 450.0, 900.0, 1300.0, 2500.0)
_WIDE_S = (0.02, 0.03, 0.1, 0.5, 2.0, 8.0, 15.0, 30.0)

_UNREAD = Encoding(encoder="", vector=np.zeros(0, dtype=np.float32))

_Group = tuple[str, ...]


class EmpiricalForecaster:
    """Implements `core.ports.Forecaster` without learning.

    A call is compared with the last 256 calls of the same (workflow kind, role, model); while there are fewer than 8,
    with those of the same (role, model), then of the model, and at last with a wide prior that is capped by the call's
    own limit. The work of an image is known from its request; that of a tool, whose role is its name and whose model
    is its pool, are the seconds that it took. Quantiles are recomputed every 8 observations. Clients name kinds and
    roles, so the `limit` groups that were seen last are kept, and no more.
    """

    name = "empirical"
    version = "empirical-1"

    def __init__(self, *, limit: int = 10_000) -> None:
        self._limit = limit
        self._seen: OrderedDict[_Group, deque[float]] = OrderedDict()
        self._cached: dict[_Group, Forecast] = {}
        self._fresh: dict[_Group, int] = {}

    def encode(self, call: Call, prompt: PromptText) -> Encoding:
        """Nothing, by no encoder: the prompt is not read."""
        return _UNREAD

    def forecast(self, call: Call, encoding: Encoding) -> Forecast:
        """Shape [8]: the quantiles at `core.forecast.LEVELS`, in output tokens, megapixel-steps or seconds."""
        if call.kind == "image":
            return point(call.work_limit, unit="work")
        for group in _groups(call):
            cached = self._cached.get(group)
            if cached is not None:
                return _capped(cached, call.work_limit)
        return _prior(call)

    def observe(self, call: Call, encoding: Encoding, work_done: float) -> None:
        """Remember what the call came to; a number that cannot be an amount of work is not learned from."""
        if call.kind == "image" or not (math.isfinite(work_done) and work_done >= 0.0):
            return
        for group in _groups(call):
            seen = self._seen.setdefault(group, deque(maxlen=_WINDOW))
            seen.append(work_done)
            self._seen.move_to_end(group)
            self._fresh[group] = self._fresh.get(group, 0) + 1
            if len(seen) >= _ENOUGH and (group not in self._cached or self._fresh[group] >= _REFRESH):
                found = from_samples(seen, unit=_unit(call))
                self._cached[group] = msgspec.structs.replace(found, version=self.version)
                self._fresh[group] = 0
        while len(self._seen) > self._limit:
            gone, _ = self._seen.popitem(last=False)
            self._cached.pop(gone, None)
            self._fresh.pop(gone, None)


def _groups(call: Call) -> tuple[_Group, ...]:
    return (call.workflow_kind, call.role, call.model), (call.role, call.model), (call.model,)


def _capped(forecast: Forecast, limit: float) -> Forecast:
    if forecast.quantiles[-1] <= limit:
        return forecast
    return msgspec.structs.replace(forecast, quantiles=tuple(min(q, limit) for q in forecast.quantiles))


def _unit(call: Call) -> Unit:
    return "s" if call.kind == "tool" else "tokens"


def _prior(call: Call) -> Forecast:
    wide = _WIDE_S if call.kind == "tool" else _WIDE_TOKENS
    quantiles = tuple(min(q, call.work_limit) for q in wide)
    return Forecast(levels=LEVELS, quantiles=quantiles, unit=_unit(call), source="prior")
