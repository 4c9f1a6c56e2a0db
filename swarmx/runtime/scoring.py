"""How the forecast of a call did, once its outcome is known."""

from __future__ import annotations

import math
import re

from swarmx.core.forecast import Forecast
from swarmx.core.messages import ForecastScored
from swarmx.core.nouns import Call

LENGTH_HEAD = "length"
OTHER = "other"
_LEVEL = 0.9
_ODD = re.compile(r"[^A-Za-z0-9_.-]+")
_MOST_CHARACTERS = 32


class PromptClasses:
    """Names the class of a call, "workflow kind/role"; after `limit` different ones every new one is "other".

    Clients choose both words, so neither their number nor their letters can be trusted: what is not a letter, a digit
    or one of _ . - becomes _, and each has 32 characters at most.
    """

    def __init__(self, *, limit: int = 200) -> None:
        self._limit = limit
        self._names: dict[tuple[str, str], str] = {}

    def __len__(self) -> int:
        return len(self._names)

    def of(self, call: Call) -> str:
        key = (call.workflow_kind, call.role)
        name = self._names.get(key)
        if name is None:
            if len(self._names) >= self._limit:
                return OTHER
            name = self._names[key] = f"{_plain(call.workflow_kind)}/{_plain(call.role)}"
        return name


def scored(forecast: Forecast, work_done: float, *, head: str, prompt_class: str, device: str = "") -> ForecastScored:
    """The pinball loss at level 0.9 of log(1 + work), and whether the outcome was at or below that quantile.

    Half as much and twice as much count alike, whatever the unit.
    """
    high = forecast.quantile(_LEVEL)
    over = math.log1p(work_done) - math.log1p(high)
    return ForecastScored(
        head=head,
        version=forecast.version,
        prompt_class=prompt_class,
        device=device,
        loss=max(_LEVEL * over, (_LEVEL - 1.0) * over),
        covered=work_done <= high,
    )


def _plain(word: str) -> str:
    return _ODD.sub("_", word[:_MOST_CHARACTERS])
