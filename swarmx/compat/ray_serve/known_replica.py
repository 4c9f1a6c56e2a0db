"""A replica as one router knows it: who it is, what of it this router uses, and how fast it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from swarmx.compat.ray_serve.pace import Pace
from swarmx.core.engine import EngineProfile
from swarmx.core.nouns import Replica

_NEWS = 0.05  # a pace that changed by less is not told


@dataclass(slots=True, kw_only=True)
class KnownReplica:
    """A replica with what was learnt of it; `area` is the integral of its calls in flight until `since_s`."""

    replica: Replica
    pace: Pace
    said_at_s: float = -math.inf  # by its own clock
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
        """How fast it is: by its own word, unless more was seen from here."""
        if self.told is not None and self.told_calls >= self.pace.calls:
            return self.told
        return self.pace.profile(1)

    def changed(self, by: int, now_s: float) -> float:
        """Count a call more, or fewer; returns the area until now."""
        self.area += self.in_flight * max(0.0, now_s - self.since_s)
        self.in_flight, self.since_s = max(0, self.in_flight + by), now_s
        return self.area


def differs(one: EngineProfile, other: EngineProfile) -> bool:
    """Whether a call would notice: a constant moved by more than a twentieth of the time of a step."""
    if one.max_batch != other.max_batch or one.device != other.device:
        return True
    scale = max(one.step_base_s + one.decode_seq_s, other.step_base_s + other.decode_seq_s, 1e-9)
    steps = (one.step_base_s - other.step_base_s, one.decode_seq_s - other.decode_seq_s)
    fixed = max(one.call_base_s, other.call_base_s, scale)
    return (
        any(abs(change) > _NEWS * scale for change in steps)
        or abs(one.call_base_s - other.call_base_s) > _NEWS * fixed
        or abs(one.prefill_token_s - other.prefill_token_s)
        > _NEWS * max(one.prefill_token_s, other.prefill_token_s, 1e-9)
    )
