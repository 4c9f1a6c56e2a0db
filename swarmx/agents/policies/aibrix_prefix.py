"""aibrix_prefix: the longest cached prefix among replicas that are not busier than usual."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from swarmx.agents.policies.ties import least
from swarmx.core.fleet import CallView, Choice, FleetView, Order


@dataclass(frozen=True, slots=True, kw_only=True)
class AibrixPrefix:
    """The longest cached prefix among replicas that are not much busier than the mean; else the fewest in flight.

    A replica counts that caches some of the prompt and has at most mean + `deviations` standard deviations calls in
    flight. Of those, the highest whole percentage of the prompt wins, then the fewest in flight, then chance.
    When most - fewest > `imbalance_count` calls are in flight, only the replicas with the fewest count. If none does:
    the fewest in flight. Source: prefix-cache of AIBrix (vllm-project/aibrix at e3e10f9,
    pkg/plugins/gateway/algorithms/prefix_cache.go, whose defaults are 8 and 1).

    The original knows the running requests of its gateway and a table of block hashes that it sent; both are this
    router's own count and index here.
    """

    name: ClassVar[str] = "aibrix_prefix"
    order: ClassVar[Order] = "arrival"
    waits: ClassVar[bool] = False

    imbalance_count: float = 8.0
    deviations: float = 1.0

    def choose(self, call: CallView, fleet: FleetView, rng: np.random.Generator) -> Choice:
        busy = fleet.in_flight
        prompt = max(1.0, float(call.call.prompt_tokens))
        percent = np.floor(100.0 * np.minimum(fleet.cached_tokens, prompt) / prompt)
        spread = busy.std(ddof=1) if len(fleet) > 1 else 0.0
        matched = (fleet.cached_tokens > 0.0) & (busy <= busy.mean() + self.deviations * spread)
        fewest = busy.min()
        if busy.max() - fewest > self.imbalance_count:
            matched &= busy == fewest
        if not matched.any():
            return Choice(index=least(busy, rng))
        return Choice(index=least(busy, rng, matched & (percent == percent[matched].max())))
