"""preble: the replica that holds most of the prompt if that is the larger part, else the one with the least load."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from swarmx.agents.policies.ties import least
from swarmx.core.fleet import CallView, Choice, FleetView, Order


@dataclass(frozen=True, slots=True, kw_only=True)
class Preble:
    """Exploit the longest cached prefix if it is longer than the rest of the prompt, else explore the least load.

        load     = prefill of the backlog + expected work left * step
        explore  = load + prefill of the own uncached prompt

    Several holders: the least load of them. A holder whose load is above `rebalance` times the least is left for the
    replica with the least explore, if it stays the busier one without the call. Source: E2, "exploit and explore", of
    Preble (arXiv 2407.00023; WukLab/preble at 8e7906a, preble/global_scheduler_with_time.py: runtime_selector,
    get_node_cost, HIGH_LOAD_THRESHOLD 1.5).

    The original sums load over the prefixes that were sent in the last three minutes (miss rate * count * prefill
    time, and active calls * mean output of the prefix * time per output token, measured), adds the cost of what would
    be evicted, not what the own prompt needs, and rebalances by moving the cheapest prefixes for good. A policy has no
    memory here: load is that of the calls in flight, by profile and expected work; evictions are left out; the own
    prompt counts, since devices differ; rebalancing moves this call, and with it its prefix. Like the original it knows
    expected outputs, so it is not blind to lengths.
    """

    name: ClassVar[str] = "preble"
    order: ClassVar[Order] = "arrival"
    waits: ClassVar[bool] = False

    exploit_threshold: float = 0.5
    rebalance: float = 1.5

    def choose(self, call: CallView, fleet: FleetView, rng: np.random.Generator) -> Choice:
        prompt = float(call.call.prompt_tokens)
        cached = np.minimum(fleet.cached_tokens, prompt)
        batch = np.minimum(np.maximum(fleet.in_flight, 1), fleet.max_batch)
        step_s = fleet.step_base_s + fleet.decode_seq_s * batch + fleet.decode_ctx_token_s * fleet.context_tokens
        load_s = fleet.prefill_token_s * fleet.prefill_tokens + fleet.remaining_work * step_s
        fresh_s = fleet.prefill_token_s * (prompt - cached) + fleet.prefill_ctx_token_s * (
            (prompt * prompt - cached * cached) / 2.0
        )
        explore_s = load_s + fresh_s
        terms_s = {"load_s": load_s, "prefill_s": fresh_s}
        index = least(explore_s, rng)
        longest = cached.max()
        if longest > self.exploit_threshold * prompt:
            holder = least(load_s, rng, cached == longest)
            heavy = load_s[holder] > self.rebalance * load_s.min() and load_s[holder] > explore_s[index]
            index = index if heavy else holder
        return Choice(index=index, cost_s=explore_s, terms_s=terms_s)
