"""llmd_sticky: the replicas that hold the prompt until they are saturated, by uncached tokens in flight."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from swarmx.agents.policies.ties import least
from swarmx.core.fleet import CallView, Choice, FleetView, Order


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmdSticky:
    """Of the replicas that cache most of the prompt the fewest uncached tokens in flight; of all when those lag behind.

    Sticky replicas cache at least `affinity_threshold` of the prompt. All others come in, too, when the best sticky one
    needs more than `max_ttft_penalty_s` longer for its prompts in flight than the best of the others (0 sticks for
    ever). Among what is left, the least (uncached tokens in flight + own uncached prompt + `call_tokens` * calls in
    flight) wins, ties at random. Source: "Sticky until saturated" (llm-d blog, 17 Aug 2026) as llm-d-router ebab687
    has it: prefix-cache-affinity-filter (0.8, 18 s), token-load-scorer, max-score-picker. `call_tokens` is 0 there;
    very large, it is the active-request-scorer, which the blog takes for decode-bound traffic.

    The original turns tokens into seconds by one calibrated rate for its pool, B / T(B) with B tokens an iteration
    (15,928/s for Qwen3-32B on two H100, so that 18 s are 286,704 tokens, the blog's threshold). The same recipe is
    applied to each replica's profile here, so the gate knows devices; the score is in tokens, as there, and does not.
    Its tokens in flight fall at the first token of a stream, else at the end, as here. A call without a prompt (an
    image) goes to the fewest calls in flight, since tokens say nothing about it.
    """

    name: ClassVar[str] = "llmd_sticky"
    order: ClassVar[Order] = "arrival"
    waits: ClassVar[bool] = False

    affinity_threshold: float = 0.8
    max_ttft_penalty_s: float = 18.0
    call_tokens: float = 0.0

    def choose(self, call: CallView, fleet: FleetView, rng: np.random.Generator) -> Choice:
        prompt = float(call.call.prompt_tokens)
        if prompt <= 0.0:
            return Choice(index=least(fleet.in_flight, rng))
        cached = np.minimum(fleet.cached_tokens, prompt)
        load = fleet.unread_tokens + (prompt - cached) + self.call_tokens * fleet.in_flight
        sticky = cached >= self.affinity_threshold * prompt
        if not sticky.any() or sticky.all() or self._saturated(fleet, sticky):
            return Choice(index=least(load, rng))
        return Choice(index=least(load, rng, sticky))

    def _saturated(self, fleet: FleetView, sticky: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> bool:
        """Whether the prompts in flight take too much longer at the best sticky replica than at the best other one."""
        chunk = np.maximum(1.0, fleet.max_step_tokens)
        chunk_s = fleet.step_base_s + fleet.prefill_token_s * chunk + fleet.prefill_ctx_token_s * (chunk * chunk / 2.0)
        ttft_s = fleet.unread_tokens * chunk_s / chunk
        lag_s = ttft_s[sticky].min() - ttft_s[~sticky].min()
        return bool(self.max_ttft_penalty_s > 0.0 and lag_s > self.max_ttft_penalty_s)
