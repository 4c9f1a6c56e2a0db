"""marginal: the candidate on which the call costs least, what it does to others included."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from swarmx.core.fleet import CallView, Choice, FleetView, Floats, Order

_MOST_SHARE = 0.8  # of a replica's time that prompts may take in the eyes of a policy
_LEAST_WEIGHT, _MOST_WEIGHT = 0.25, 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Marginal:
    """The candidate on which the call costs least: its own expected time, and the time that it takes from all others.

    With n calls there of which each still needs r, batch limit B, own work w, prompt p of which c is cached, and the
    constants of `core.engine`:

        step      = (step_base + decode_seq * min(n + 1, B) + decode_ctx_token * (context + p + w / 2))
                    / (1 - share), the share of the replica's time that went into prompts of late
        own       = slowdown * (wait + prefill of the backlog and of p - c + w * step)
        overlap   = n * w * r / (w + r)          steps that the call shares with them, if both are exponential
        others    = slowdown * (n * prefill of p - c
                    + overlap * (decode_seq + decode_ctx_token * (p + w / 2)) / (1 - share))
        cost      = lateness * own + externality * others

    `wait` is the time until a slot, and room in the KV cache, are free: completions that must come first, at the
    rate r * step / n, counting the calls that wait ahead. The call is held back when the cheapest replica has no room.
    `lateness` is what the workflow will have taken over its target, within [1/4, 4]; calls wait in the order of slack.
    Of a call whose siblings take longer, `siblings` of the time until the last of them ends is free. What both make of
    own time is the term `spared`, below zero where there is time to spare.

    Every ingredient is off at 0: `externality`, `prefix`, `slack` (both of its uses), `hold`, `kv`, `siblings`, `share`
    (prompts that interrupt), `learn` (from how long calls took).
    """

    name: ClassVar[str] = "marginal"

    externality: float = 1.0
    prefix: float = 1.0
    slack: float = 1.0
    hold: float = 1.0
    kv: float = 1.0
    siblings: float = 1.0
    share: float = 1.0
    learn: float = 1.0

    @property
    def order(self) -> Order:
        return "slack" if self.slack else "arrival"

    @property
    def waits(self) -> bool:
        return bool(self.hold)

    def choose(self, call: CallView, fleet: FleetView, rng: np.random.Generator) -> Choice:
        work = max(call.forecast.mean, 1e-9)
        prompt = float(call.call.prompt_tokens)
        cached = np.minimum(fleet.cached_tokens, prompt) * _within_one(self.prefix)
        prompt_s = fleet.prefill_token_s * (prompt - cached) + fleet.prefill_ctx_token_s * (
            (prompt * prompt - cached * cached) / 2.0
        )
        count = fleet.in_flight.astype(np.float64)
        own_context = prompt + work / 2.0
        slow = fleet.slowdown ** _within_one(self.learn)
        stretch = 1.0 / (1.0 - _within_one(self.share) * np.minimum(fleet.prefill_share, _MOST_SHARE))
        step_s = stretch * (
            fleet.step_base_s
            + fleet.decode_seq_s * np.minimum(count + 1.0, fleet.max_batch)
            + fleet.decode_ctx_token_s * (fleet.context_tokens + own_context)
        )
        some = np.maximum(count, 1.0)
        left = fleet.remaining_work / some
        first = self._must_end_first(call, fleet, count, left, cached)
        has_room = first <= 0.0
        wait_s = np.where(has_room, 0.0, (first + call.ahead) * (left * step_s + fleet.call_base_s) / some)
        prefill_s = fleet.call_base_s + fleet.prefill_token_s * fleet.prefill_tokens + prompt_s
        decode_s = work * step_s
        profile_s = wait_s + prefill_s + decode_s
        own_s = slow * profile_s
        overlap = count * work * left / np.maximum(work + left, 1e-9)
        slower_s = stretch * (fleet.decode_seq_s + fleet.decode_ctx_token_s * own_context)
        others_s = slow * (count * prompt_s + overlap * slower_s)
        felt_s = np.maximum(own_s - self.siblings * call.workflow.others_s, 0.1 * own_s)
        felt_s *= self._lateness(call)
        charged_s = self.externality * others_s
        cost_s = felt_s + charged_s
        cheapest = (cost_s <= cost_s.min() * (1.0 + 1e-9)).nonzero()[0]
        index = int(cheapest[0] if len(cheapest) == 1 else cheapest[rng.integers(len(cheapest))])
        return Choice(
            index=index,
            hold=bool(self.hold) and not bool(has_room[index]),
            urgency=round(call.now_s + call.workflow.slack_s, 3),  # milliseconds: the order of sums must not show
            expected_s=float(own_s[index]),
            profile_s=float(profile_s[index]),
            unit_s=float(step_s[index]),
            cost_s=cost_s,
            terms_s={
                "wait_s": slow * wait_s,
                "prefill_s": slow * prefill_s,
                "decode_s": slow * decode_s,
                "others_s": charged_s,
                "spared_s": felt_s - own_s,
            },
        )

    def _must_end_first(self, call: CallView, fleet: FleetView, count: Floats, left: Floats, cached: Floats) -> Floats:
        """Calls that must end before this one has a slot and, when all have grown by half of what they still need,
        room in the KV cache."""
        first = np.maximum(0.0, count + 1.0 - fleet.max_batch)
        if not self.kv:
            return first
        held = np.maximum(0.0, fleet.context_tokens - fleet.shared_tokens)
        peak = held + fleet.remaining_work / 2.0 + (call.call.prompt_tokens - cached) + call.forecast.mean
        short = np.maximum(0.0, peak - fleet.kv_capacity_tokens)
        frees = np.maximum(held / np.maximum(count, 1.0) + left, 1.0)
        return np.maximum(first, np.minimum(count, short / frees))

    def _lateness(self, call: CallView) -> float:
        workflow = call.workflow
        if not self.slack or workflow.target_s <= 0.0:
            return 1.0
        late = (workflow.age_s + workflow.remaining_s) / workflow.target_s
        return min(_MOST_WEIGHT, max(_LEAST_WEIGHT, late))


def _within_one(value: float) -> float:
    """An ingredient is there in part at most once."""
    return min(1.0, max(0.0, value))
