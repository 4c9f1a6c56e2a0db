"""How fast a replica works with so many calls on it: what makes devices comparable, and a demand a number of them."""

from __future__ import annotations

import math

from swarmx.core.engine import EngineProfile
from swarmx.core.errors import ConfigError

# The scaler is not told how long prompts are; a middling context keeps devices comparable.
_CONTEXT_TOKENS = 1000.0


def calls_at_once(profile: EngineProfile, wanted: float) -> float:
    """How many calls a replica is to hold at once: as wanted, but no more than fit into its batch."""
    return min(wanted, float(profile.max_batch))


def call_s(profile: EngineProfile, calls: float, work: float) -> float:
    """Seconds of a call of so much work (output tokens, or megapixel-steps) among `calls` in the batch."""
    context_tokens = calls * _CONTEXT_TOKENS
    step_s = profile.step_base_s + profile.decode_seq_s * calls + profile.decode_ctx_token_s * context_tokens
    return profile.call_base_s + work * step_s


def calls_per_s(profile: EngineProfile, wanted_at_once: float, work: float) -> float:
    """Calls of so much work that a replica ends in a second while it holds as many as wanted."""
    calls = calls_at_once(profile, wanted_at_once)
    return calls / max(call_s(profile, calls, work), 1e-9)


def check_at_least(name: str, value: float, least: float) -> None:
    """Raises ConfigError unless the parameter is a number of that size."""
    if not (math.isfinite(value) and value >= least):
        raise ConfigError(f"{name} is {value!r}, expected a number from {least:g} on.")
