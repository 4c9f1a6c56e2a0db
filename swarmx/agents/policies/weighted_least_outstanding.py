"""weighted_least_outstanding: the candidate with the fewest calls in flight for its speed."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from swarmx.agents.policies.ties import least
from swarmx.core.fleet import CallView, Choice, FleetView, Floats, Order


def typical_step_s(fleet: FleetView, batch: float, context_tokens: float, prompt_per_output: float) -> Floats:
    """Seconds of an iteration of each replica when it is busy as usual, the inverse of its speed, shape [replicas].

    Equation (1) of `core.engine` with `batch` calls, or as many as fit, of `context_tokens` each, for every one of
    which `prompt_per_output` prompt tokens are read while it puts out one.
    """
    calls = np.minimum(batch, fleet.max_batch)
    each_s = fleet.decode_seq_s + fleet.decode_ctx_token_s * context_tokens + fleet.prefill_token_s * prompt_per_output
    return fleet.step_base_s + each_s * calls


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedLeastOutstanding:
    """The candidate with the least (calls in flight + 1) / speed, ties broken at random. Blind to lengths.

    The speed is static, one number a device: iterations a second under a typical load of `batch` calls of
    `context_tokens`, with `prompt_per_output` uncached prompt tokens read for each token put out. This is the scheduler
    sed, shortest expected delay, of the Linux Virtual Server, (connections + 1) / weight, with the profile's speed as
    weight: of two idle replicas the faster one is taken.
    """

    name: ClassVar[str] = "weighted_least_outstanding"
    order: ClassVar[Order] = "arrival"
    waits: ClassVar[bool] = False

    batch: float = 16.0
    context_tokens: float = 2000.0
    prompt_per_output: float = 4.0

    def choose(self, call: CallView, fleet: FleetView, rng: np.random.Generator) -> Choice:
        step_s = typical_step_s(fleet, self.batch, self.context_tokens, self.prompt_per_output)
        return Choice(index=least((fleet.in_flight + 1) * step_s, rng))
