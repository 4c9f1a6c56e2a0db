"""What a policy sees: the call at hand and the candidate replicas as arrays."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from swarmx.core.forecast import Forecast
from swarmx.core.nouns import Call

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallView:
    """The call that wants a replica, with the forecast of its work (output tokens, or megapixel-steps)."""

    call: Call
    forecast: Forecast


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetView:
    """The replicas that may take the call, never none; every array has shape [replicas].

    `in_flight` counts this router's own calls, exactly; `last_chosen` is the number of the decision
    that last chose the replica, 0 before the first. `remaining_work` is the expected work that they still need,
    `context_tokens` the context they hold, `prefill_tokens` prompts of theirs that no first token answered yet. The
    profile columns are those of `EngineProfile`. The signal columns are the engine's own word, NaN where it never
    spoke, `signal_age_s` old.
    """

    in_flight: Ints
    last_chosen: Ints
    remaining_work: Floats
    context_tokens: Floats
    prefill_tokens: Floats
    max_batch: Ints
    kv_capacity_tokens: Floats
    call_base_s: Floats
    step_base_s: Floats
    decode_seq_s: Floats
    decode_ctx_token_s: Floats
    prefill_token_s: Floats
    prefill_ctx_token_s: Floats
    running: Floats
    waiting: Floats
    kv_usage: Floats
    signal_age_s: Floats

    def __len__(self) -> int:
        return len(self.in_flight)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A policy's answer: a position in the view, and how it came about.

    `cost_s` and each array of `terms_s` have shape [replicas]; None where a policy does not weigh costs.
    """

    index: int
    cost_s: Floats | None = None
    terms_s: dict[str, Floats] = field(default_factory=dict)
