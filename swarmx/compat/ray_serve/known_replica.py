"""A replica as one router knows it: who it is, what of it this router uses, and how fast it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

from swarmx.compat.ray_serve.pace import Pace
from swarmx.core.engine import EngineProfile
from swarmx.core.nouns import Replica

_FAR_MORE = 2.0  # times the calls that were seen from here: they came from other routers
_DRIFT_S = 1e-4  # of clocks, from one word to the next
_NEWS = 0.05  # a pace that changed by less is not told
_PROMPTS, _WORKS = (0.0, 2000.0), (30.0, 500.0)  # of a short call and a long one


@dataclass(slots=True, kw_only=True)
class KnownReplica:
    """A replica with what was learnt of it; `area` is the integral of its calls in flight until `since_s`."""

    replica: Replica
    pace: Pace
    said_at_s: float = -math.inf  # by its own clock
    lag_s: float = math.inf  # of its clock behind this one, and of the fastest way from there
    told: EngineProfile | None = None  # its own word on its speed, from `told_calls`
    told_calls: int = 0
    in_flight: int = 0
    area: float = 0.0
    since_s: float = 0.0

    @property
    def calls(self) -> int:
        """From how many calls it is known how fast it is."""
        return max(self.told_calls, self.pace.calls)

    def profile(self) -> EngineProfile:
        """How fast it is, as seen from here, the way there and back included; by its own word where that knows more."""
        if self.told is not None and self.told_calls > _FAR_MORE * self.pace.calls:
            return self.told
        return self.pace.profile(1)

    def said(self, at_s: float, now_s: float) -> float:
        """When it said by this clock what it says it said at `at_s` by its own.

        Nobody knows how far the clocks are apart, but the fastest of its words lately took next to no time.
        """
        lag_s = now_s - at_s
        self.said_at_s, self.lag_s = at_s, min(lag_s, self.lag_s + _DRIFT_S)
        return now_s - (lag_s - self.lag_s)

    def changed(self, by: int, now_s: float) -> float:
        """Count a call more, or fewer; returns the area until now."""
        self.area += self.in_flight * max(0.0, now_s - self.since_s)
        self.in_flight, self.since_s = max(0, self.in_flight + by), now_s
        return self.area


def differs(one: EngineProfile, other: EngineProfile) -> bool:
    """Whether a call would notice, short or long, alone or in a full batch.

    Not whether constants moved: what a fit takes from one of them it gives to another.
    """
    if one.max_batch != other.max_batch or one.device != other.device:
        return True
    return any(
        abs(_seconds(one, *call) - _seconds(other, *call)) > _NEWS * _seconds(one, *call)
        for call in product(_PROMPTS, _WORKS, (1, one.max_batch))
    )


def _seconds(profile: EngineProfile, prompt_tokens: float, work: float, batch: int) -> float:
    step_s = profile.step_base_s + profile.decode_seq_s * batch
    return profile.call_base_s + profile.prefill_token_s * prompt_tokens + work * step_s
