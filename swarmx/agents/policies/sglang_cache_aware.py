"""sglang_cache_aware: the longest cached prefix while the fleet is balanced, else the fewest calls in flight."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from swarmx.agents.policies.ties import least
from swarmx.core.fleet import CallView, Choice, FleetView, Order


@dataclass(frozen=True, slots=True, kw_only=True)
class SglangCacheAware:
    """The longest cached prefix if it covers enough of the prompt and the fleet is balanced; else the fewest in flight.

    The fleet is out of balance when most - fewest > `balance_abs_threshold` and most > `balance_rel_threshold` * fewest
    calls are in flight. Otherwise the replica with the longest match is taken, if that is more than `cache_threshold`
    of the prompt. Source: sgl-project/sglang, sgl-model-gateway/src/policies/cache_aware.rs at 053b63f; the defaults
    are those that sglang-router 0.3.2 and vllm-router 0.1.17 ship with (router_args.py of both wheels).

    The original knows its own calls in flight and an approximate radix tree of the texts that it sent, cut back to a
    size; here the tree is that of `agents.prefix_index`, cut back to the KV capacity of each replica. It gives ties to
    the first worker, which floods that one (sglang issue 14532); here they are drawn, equal matches by load first.
    Earlier versions sent a miss to the smallest tree; this one, as here, to the fewest calls in flight.
    """

    name: ClassVar[str] = "sglang_cache_aware"
    order: ClassVar[Order] = "arrival"
    waits: ClassVar[bool] = False

    cache_threshold: float = 0.3
    balance_abs_threshold: float = 64.0
    balance_rel_threshold: float = 1.5

    def choose(self, call: CallView, fleet: FleetView, rng: np.random.Generator) -> Choice:
        fewest, most = int(fleet.in_flight.min()), int(fleet.in_flight.max())
        longest = fleet.cached_tokens.max()
        unbalanced = most - fewest > self.balance_abs_threshold and most > self.balance_rel_threshold * fewest
        if unbalanced or longest <= self.cache_threshold * call.call.prompt_tokens:
            return Choice(index=least(fleet.in_flight, rng))
        return Choice(index=least(fleet.in_flight, rng, fleet.cached_tokens == longest))
