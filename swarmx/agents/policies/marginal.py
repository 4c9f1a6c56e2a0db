"""marginal: the candidate on which the call costs least, what it does to others included."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from swarmx.core.fleet import CallView, Choice, FleetView, Order


@dataclass(frozen=True, slots=True, kw_only=True)
class Marginal:
    """The candidate on which the call costs least: its own expected time, and the time that it takes from all others.

    With n calls there of which each still needs r, batch limit B, own work w, prompt p of which c is cached, and the
    constants of `core.engine`:

        step      = step_base + decode_seq * min(n + 1, B) + decode_ctx_token * (context + p + w / 2)
        own       = wait + prefill of the backlog and of p - c + w * step
        overlap   = n * w * r / (w + r)          steps that the call shares with them, if both are exponential
        others    = n * prefill of p - c + overlap * (decode_seq + decode_ctx_token * (p + w / 2))
        cost      = own + externality * others

    `wait` is the time until a slot, and room in the KV cache, are free: completions that must come first, at the
    rate r * step / n, counting the calls that wait ahead. The call is held back when the cheapest replica has no room.
    Calls wait in the order of their workflows' slack. Of a call with siblings that take longer, `siblings` of the time
    until the last of them ends is free.

    Every ingredient can be switched off: `externality`, `prefix`, `slack`, `hold`, `kv`, `siblings` at 0.
    """

    name: ClassVar[str] = "marginal"

    externality: float = 1.0
    prefix: float = 1.0
    slack: float = 1.0
    hold: float = 1.0
    kv: float = 1.0
    siblings: float = 0.0

    @property
    def order(self) -> Order:
        return "slack" if self.slack else "arrival"

    @property
    def waits(self) -> bool:
        return bool(self.hold)

    def choose(self, call: CallView, fleet: FleetView, rng: np.random.Generator) -> Choice:
        work = max(call.forecast.mean, 1e-9)
        prompt = float(call.call.prompt_tokens)
        cached = np.minimum(fleet.cached_tokens, prompt) * self.prefix
        fresh_s = fleet.prefill_token_s * (prompt - cached) + fleet.prefill_ctx_token_s * (
            (prompt * prompt - cached * cached) / 2.0
        )
        count = fleet.in_flight.astype(np.float64)
        batch = np.minimum(count + 1.0, fleet.max_batch)
        own_context = prompt + work / 2.0
        step_s = (
            fleet.step_base_s
            + fleet.decode_seq_s * batch
            + fleet.decode_ctx_token_s * (fleet.context_tokens + own_context)
        )
        some = np.maximum(count, 1.0)
        left = fleet.remaining_work / some
        completion_s = (left * step_s + fleet.call_base_s) / some
        first = np.maximum(0.0, count + 1.0 - fleet.max_batch)
        if self.kv:
            peak = fleet.context_tokens + fleet.remaining_work / 2.0 + prompt + work
            short = np.maximum(0.0, peak - fleet.kv_capacity_tokens)
            first = np.maximum(first, np.minimum(count, short / np.maximum(fleet.context_tokens / some + left, 1.0)))
        has_room = first <= 0.0
        wait_s = np.where(has_room, 0.0, (first + call.ahead) * completion_s)
        prefill_s = fleet.call_base_s + fleet.prefill_token_s * fleet.prefill_tokens + fresh_s
        own_s = wait_s + prefill_s + work * step_s
        free_s = self.siblings * call.workflow.others_s
        overlap = count * work * left / np.maximum(work + left, 1e-9)
        others_s = count * fresh_s + overlap * (fleet.decode_seq_s + fleet.decode_ctx_token_s * own_context)
        cost_s = np.maximum(own_s - free_s, 0.1 * own_s) + self.externality * others_s
        cheapest = (cost_s <= cost_s.min() * (1.0 + 1e-9)).nonzero()[0]
        index = int(cheapest[0] if len(cheapest) == 1 else cheapest[rng.integers(len(cheapest))])
        return Choice(
            index=index,
            hold=bool(self.hold) and not bool(has_room[index]),
            urgency=call.now_s + call.workflow.slack_s,
            expected_s=float(own_s[index]),
            cost_s=cost_s,
            terms_s={"wait_s": wait_s, "prefill_s": prefill_s, "decode_s": work * step_s, "others_s": others_s},
        )
