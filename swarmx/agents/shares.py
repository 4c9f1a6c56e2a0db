"""How much service of one model each tenant got so far, and who is to get some next."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

MOST_TENANTS = 10_000  # those that were served last; another one starts anew, as one that was idle


class Shares:
    """Virtual token counters: "Fairness in Serving Large Language Models" (VTC), Sheng et al., OSDI 2024, algorithm 2.

    A tenant's counter is the service that it was charged, divided by its weight; among tenants whose calls wait, the
    least counter goes first. A tenant that had nothing waiting is lifted to the least counter of those that have, or,
    where nobody waits, to that of the tenant that was served last: time in which it asked for nothing is not saved up.
    Counters of tenants that keep waiting then stay within a bound of each other that does not grow with time
    (theorem 4.4). Service is counted in uncached prompt tokens and output tokens, each with its weight.
    """

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        *,
        prompt_token_weight: float = 1.0,
        output_token_weight: float = 2.0,
    ) -> None:
        self._weights = dict(weights or {})
        self._prompt_weight, self._output_weight = prompt_token_weight, output_token_weight
        self._counters: OrderedDict[str, float] = OrderedDict()
        self.last = ""

    def __len__(self) -> int:
        return len(self._counters)

    def counter(self, tenant: str) -> float:
        """Weighted service so far."""
        return self._counters.get(tenant, 0.0)

    def weighed(self, prompt_tokens: float, output_tokens: float) -> float:
        """The service that these uncached prompt tokens and output tokens are, in weighted tokens."""
        return self._prompt_weight * prompt_tokens + self._output_weight * output_tokens

    def weight_of(self, tenant: str) -> float:
        """How much the tenant is owed, next to others."""
        return self._weights.get(tenant, 1.0)

    def share_of(self, tenant: str, tokens: float) -> float:
        """What so many tokens add to the tenant's counter."""
        return tokens / self.weight_of(tenant)

    def joins(self, tenant: str, waiting: Iterable[str]) -> None:
        """The tenant, of which nothing waits, has a call; `waiting` are the tenants that have some waiting."""
        least = min(map(self.counter, waiting), default=None)
        self._set(tenant, max(self.counter(tenant), self.counter(self.last) if least is None else least))

    def charge(self, tenant: str, tokens: float) -> None:
        """A call of the tenant is served, and should come to so many weighted tokens."""
        if tenant != self.last:
            self._set(tenant, self.counter(tenant))
            self.last = tenant
        self._counters[tenant] = self.counter(tenant) + self.share_of(tenant, tokens)

    def correct(self, tenant: str, tokens: float) -> None:
        """It came to so many more, or fewer."""
        counter = self._counters.get(tenant)
        if counter is not None:
            self._counters[tenant] = max(0.0, counter + self.share_of(tenant, tokens))

    def _set(self, tenant: str, counter: float) -> None:
        self._counters[tenant] = counter
        self._counters.move_to_end(tenant)
        while len(self._counters) > MOST_TENANTS:
            self._counters.popitem(last=False)
