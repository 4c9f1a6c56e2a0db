"""dynamo_kv: the fewest KV blocks to prefill and to hold, cached ones counted in its favour."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from swarmx.agents.policies.ties import least
from swarmx.core.fleet import CallView, Choice, FleetView, Floats, Order

BLOCK_TOKENS = 64.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamoKv:
    """The fewest blocks of prefill backlog and own uncached prompt, scaled, plus those held by calls and by this one.

        raw     = prompts that wait for prefill there + own prompt
        credit  = overlap_score_credit * cached part of own prompt
        blocks  = prefill_load_scale * max(0, raw - credit) + context held there + own prompt
                  + decode_active_request_weight * calls in flight

    `overlap_score_credit_decay` d divides the credit by 1 + d * (backlog above the least / own prompt). The least wins,
    ties at random; with `router_temperature`, one is drawn by softmax over the costs scaled to [0, 1]. Source: NVIDIA
    Dynamo, lib/kv-router/src/scheduling/selector.rs (ai-dynamo/dynamo at 01690d4, defaults of its config.rs), the cost
    of "Routing Concepts" in the documentation of 1.2.1.

    The original indexes KV events of the engines; here `cached_tokens` is what this router sent. Its active blocks are
    prompts, shared ones counted once; here each call's context counts, output included (--router-track-output-blocks).
    Its backlog falls at the first token, or, without a stream, at the end, as here.
    A block has 64 tokens, and is not rounded up. Calls without a prompt, which the original never meets, go to the
    fewest in flight. Like it, this is blind to devices and to lengths.
    """

    name: ClassVar[str] = "dynamo_kv"
    order: ClassVar[Order] = "arrival"
    waits: ClassVar[bool] = False

    overlap_score_credit: float = 1.0
    overlap_score_credit_decay: float = 0.0
    prefill_load_scale: float = 1.0
    decode_active_request_weight: float = 0.0
    router_temperature: float = 0.0

    def choose(self, call: CallView, fleet: FleetView, rng: np.random.Generator) -> Choice:
        prompt = float(call.call.prompt_tokens)
        if prompt <= 0.0:
            return Choice(index=least(fleet.in_flight, rng))
        backlog = fleet.unread_tokens
        credit = self.overlap_score_credit * np.minimum(fleet.cached_tokens, prompt)
        if self.overlap_score_credit_decay > 0.0:
            excess = (backlog - backlog.min()) / max(prompt, BLOCK_TOKENS)
            credit /= 1.0 + self.overlap_score_credit_decay * excess
        prefill = self.prefill_load_scale * np.maximum(0.0, backlog + prompt - credit)
        blocks = (prefill + fleet.context_tokens + prompt) / BLOCK_TOKENS
        blocks += self.decode_active_request_weight * fleet.in_flight
        if self.router_temperature > 0.0:
            return Choice(index=_drawn(blocks, self.router_temperature, rng))
        return Choice(index=least(blocks, rng))


def _drawn(cost: Floats, temperature: float, rng: np.random.Generator) -> int:
    """A position, drawn by softmax over the costs, the less the likelier, after scaling them to [0, 1]."""
    span = cost.max() - cost.min()
    weights = np.exp(-(cost - cost.min()) / (span * temperature)) if span > 0.0 else np.ones(len(cost))
    bounds = np.cumsum(weights)
    return min(int(np.searchsorted(bounds, rng.random() * bounds[-1], side="right")), len(cost) - 1)
