"""least_work: the candidate on which the call is expected to complete first."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from swarmx.core.fleet import CallView, Choice, FleetView, Order


@dataclass(frozen=True, slots=True, kw_only=True)
class LeastWork:
    """The candidate on which the call is expected to complete first, given each device's speed and expected work left.

    With n calls ahead, expected work W left in them, batch limit B, and step time s(b, c) of `core.engine`:

        batch b   = min(n + 1, B),  s = s(b, context of the calls in flight + own)
        wait      = max(0, n + 1 - B) * (W / n) * s / B     completions that must come first, at the batch's rate
        prefill   = own prompt, and prompts of others that are not answered yet, at the device's prefill rate
        decode    = E[own work] * s

    This is least-work-left (Harchol-Balter, Performance Modeling 2013, ch. 24) carried over from serial servers,
    where B = 1 makes wait = W * s, to batching engines. Selfish: what the call does to others is not counted.
    """

    name: ClassVar[str] = "least_work"
    order: ClassVar[Order] = "arrival"
    waits: ClassVar[bool] = False

    def choose(self, call: CallView, fleet: FleetView, rng: np.random.Generator) -> Choice:
        own_work = call.forecast.mean
        prompt = call.call.prompt_tokens
        ahead = fleet.in_flight
        batch = np.minimum(ahead + 1, fleet.max_batch)
        step_s = (
            fleet.step_base_s
            + fleet.decode_seq_s * batch
            + fleet.decode_ctx_token_s * (fleet.context_tokens + prompt + own_work / 2.0)
        )
        excess = np.maximum(0, ahead + 1 - fleet.max_batch)
        mean_left = fleet.remaining_work / np.maximum(ahead, 1)
        wait_s = excess * (mean_left * step_s + fleet.call_base_s) / fleet.max_batch
        prefill_s = (
            fleet.call_base_s
            + fleet.prefill_token_s * (fleet.prefill_tokens + prompt)
            + fleet.prefill_ctx_token_s * (prompt * prompt / 2.0)
        )
        decode_s = own_work * step_s
        cost_s = wait_s + prefill_s + decode_s
        cheapest = (cost_s <= cost_s.min() * (1.0 + 1e-9)).nonzero()[0]
        index = int(cheapest[0] if len(cheapest) == 1 else cheapest[rng.integers(len(cheapest))])
        return Choice(
            index=index,
            expected_s=float(cost_s[index]),
            cost_s=cost_s,
            terms_s={"wait_s": wait_s, "prefill_s": prefill_s, "decode_s": decode_s},
        )
