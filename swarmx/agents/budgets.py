"""Tokens that a tenant may take a minute: one bucket a tenant that has such a bound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from swarmx.agents.router_settings import TenantSettings

MINUTE_S = 60.0
_ROUNDING = 1e-9  # who comes back at the very time that he was told is let in


@dataclass(frozen=True, slots=True, kw_only=True)
class OverBudget:
    """The bucket does not hold what the call is expected to need. It will after `retry_after_s`."""

    budget: float
    used: float
    retry_after_s: float


@dataclass(slots=True, kw_only=True)
class _Bucket:
    """`level` tokens may be taken at `at_s`, below zero after calls that took more than was expected.

    Calls that were refused were told to come back one after the other, the last of them at `promised_at_s`.
    """

    size: float
    level: float
    at_s: float = 0.0
    promised_at_s: float = 0.0

    def fill(self, now_s: float) -> None:
        self.level = min(self.size, self.level + (now_s - self.at_s) * self.size / MINUTE_S)
        self.at_s = now_s


class Budgets:
    """Token buckets that hold the tokens of one minute and are full at first.

    A call takes what it is expected to need when it is accepted, and the difference when it has ended. One that is
    expected to need more than a minute's tokens needs a full bucket.
    """

    def __init__(self, tenants: Mapping[str, TenantSettings]) -> None:
        self._buckets = {
            name: _Bucket(size=tenant.tokens_per_minute, level=tenant.tokens_per_minute)
            for name, tenant in tenants.items()
            if tenant.tokens_per_minute is not None
        }

    def __contains__(self, tenant: str) -> bool:
        """Whether the tenant has a bound."""
        return tenant in self._buckets

    def take(self, tenant: str, tokens: float, now_s: float) -> OverBudget | None:
        """Take so many tokens, unless there are not enough; a tenant without a bound always may.

        Those that are refused at about the same time are told different times, as far apart as their tokens take to
        flow in, but nobody is sent away for more than a minute longer than the bucket needs for him alone.
        """
        bucket = self._buckets.get(tenant)
        if bucket is None:
            return None
        bucket.fill(now_s)
        needed = min(tokens, bucket.size)
        if bucket.level >= needed - _ROUNDING * bucket.size:
            bucket.level -= tokens
            return None
        rate = bucket.size / MINUTE_S
        alone_s = now_s + (needed - bucket.level) / rate
        in_turn_s = bucket.promised_at_s + needed / rate if bucket.promised_at_s > now_s else alone_s
        bucket.promised_at_s = max(alone_s, min(in_turn_s, alone_s + MINUTE_S))
        return OverBudget(
            budget=bucket.size, used=bucket.size - bucket.level, retry_after_s=bucket.promised_at_s - now_s
        )

    def correct(self, tenant: str, tokens: float, now_s: float) -> None:
        """A call that was accepted came to so many more tokens, or fewer."""
        bucket = self._buckets.get(tenant)
        if bucket is not None:
            bucket.fill(now_s)
            bucket.level = min(bucket.size, bucket.level - tokens)
