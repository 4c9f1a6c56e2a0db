"""Tokens that a tenant may take a minute: one bucket a tenant that has such a bound."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from swarmx.agents.router_settings import TenantSettings

MINUTE_S = 60.0
GRACE_S = 60.0  # who has not come back by then after the time that he was told does not come
_LEAST_S = 1e-3
_ALIKE = 0.8  # calls that differ by less in what they need may be the same one, offered again under another id
_ROUNDING = 1e-9  # who comes back at the very time that he was told is let in


@dataclass(frozen=True, slots=True, kw_only=True)
class OverBudget:
    """The bucket does not hold what the call is expected to need. It will after `retry_after_s`."""

    budget: float
    used: float
    retry_after_s: float


@dataclass(slots=True, kw_only=True)
class _Promise:
    """A call that was refused may have what it needs from `due_at_s` on, until `until_s`.

    It comes back at `told_at_s`, which is later where there was not enough when it came before.
    """

    call_id: str
    needed: float
    due_at_s: float
    told_at_s: float
    until_s: float

    def is_for(self, call_id: str, needed: float) -> bool:
        return (call_id != "" and call_id == self.call_id) or _ALIKE * self.needed <= needed <= self.needed / _ALIKE


@dataclass(slots=True, kw_only=True)
class _Bucket:
    """`level` tokens may be taken at `at_s`, below zero after calls that took more than was expected.

    Calls that were refused were told to come back one after the other, the last of them at `promised_at_s`. There is
    one of `promises` for all that need about as much, so there are few.
    """

    size: float
    level: float
    at_s: float = 0.0
    promised_at_s: float = 0.0
    promises: list[_Promise] = field(default_factory=list)

    def ahead(self, call_id: str, needed: float, now_s: float) -> _Promise | None:
        """The promise to a larger call that is due and has been so for the longest."""
        self.promises = [promise for promise in self.promises if promise.until_s > now_s + _LEAST_S]
        due = (p for p in self.promises if p.due_at_s <= now_s and p.needed > needed and not p.is_for(call_id, needed))
        return min(due, key=lambda promise: promise.due_at_s, default=None)

    def keep_promise(self, call_id: str, needed: float) -> None:
        """The call has got what it needs."""
        kept = next((promise for promise in self.promises if promise.is_for(call_id, needed)), None)
        if kept is not None:
            self.promises.remove(kept)

    def promise(self, call_id: str, needed: float, alone_s: float, now_s: float) -> float:
        """When the call is to come back: after all that were refused before it, unless it is back from there."""
        known = next((promise for promise in self.promises if promise.is_for(call_id, needed)), None)
        if known is not None and known.told_at_s <= now_s + _LEAST_S:
            back_at_s = known.told_at_s = alone_s
            self.promised_at_s = max(self.promised_at_s, back_at_s)
        else:
            in_turn_s = self.promised_at_s + needed * MINUTE_S / self.size if self.promised_at_s > now_s else alone_s
            back_at_s = self.promised_at_s = max(alone_s, min(in_turn_s, alone_s + MINUTE_S))
        until_s = back_at_s + GRACE_S
        if known is None:
            new = _Promise(call_id=call_id, needed=needed, due_at_s=back_at_s, told_at_s=back_at_s, until_s=until_s)
            self.promises.append(new)
        else:  # due as it was
            known.needed = needed if call_id and call_id == known.call_id else max(known.needed, needed)
            known.until_s = max(known.until_s, until_s)
        return back_at_s

    def fill(self, now_s: float) -> None:
        self.level = min(self.size, self.level + (now_s - self.at_s) * self.size / MINUTE_S)
        self.at_s = now_s


class Budgets:
    """Token buckets that hold the tokens of one minute and are full at first.

    A call takes what it is expected to need when it is accepted, and the difference when it has ended. One that is
    expected to need more than a minute's tokens needs a full bucket.

    A call that was refused, and has not got its tokens at the time that it was told, is owed them: smaller ones have to
    leave enough for it until it comes, or a minute longer than that. Otherwise they would always take them first.
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

    def take(self, tenant: str, tokens: float, now_s: float, call_id: str = "") -> OverBudget | None:
        """Take so many tokens, unless there are not enough; a tenant without a bound always may.

        Those that are refused at about the same time are told different times, as far apart as their tokens take to
        flow in, but nobody is sent away for more than a minute longer than the bucket needs for him alone.
        """
        bucket = self._buckets.get(tenant)
        if bucket is None:
            return None
        bucket.fill(now_s)
        needed, rate = min(tokens, bucket.size), bucket.size / MINUTE_S
        ahead = bucket.ahead(call_id, needed, now_s)
        owed = 0.0 if ahead is None else ahead.needed
        if bucket.level >= needed + owed - _ROUNDING * bucket.size:
            bucket.level -= tokens
            bucket.keep_promise(call_id, needed)
            return None
        alone_s = now_s + max(0.0, needed - bucket.level) / rate
        if ahead is not None:  # until the bucket holds both, if it ever does, or nobody waits for the promise
            both_s = now_s + (needed + owed - bucket.level) / rate if needed + owed <= bucket.size else math.inf
            alone_s = min(both_s, max(alone_s, ahead.until_s))
        retry_after_s = bucket.promise(call_id, needed, alone_s, now_s) - now_s
        return OverBudget(budget=bucket.size, used=bucket.size - bucket.level, retry_after_s=retry_after_s)

    def correct(self, tenant: str, tokens: float, now_s: float) -> None:
        """A call that was accepted came to so many more tokens, or fewer."""
        bucket = self._buckets.get(tenant)
        if bucket is not None:
            bucket.fill(now_s)
            bucket.level = min(bucket.size, bucket.level - tokens)
