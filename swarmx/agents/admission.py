"""Calls that had better be refused at once, and when to come back: over budget, too many, or sure to be late."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from swarmx.agents.budgets import OverBudget
from swarmx.agents.calls import CallState, WaitingCalls
from swarmx.core.actions import RefusalReason, Refuse
from swarmx.core.fleet import Choice
from swarmx.core.forecast import Forecast

_OPTIMISM = 0.1  # of ten calls, nine need more work than this quantile of their forecasts
_LEAST_LEVEL = 0.02  # and of fifty, forty-nine took longer than this quantile of what others took
_MOST_TOOK, _ENOUGH_TOOK = 256, 64
_UNKNOWN_RATIO = 0.25
_RATE_MEMORY_S = 60.0
_UNKNOWN_S = 5.0  # to come back after, where no call has ended lately
_LONGEST_S = 300.0
_TIMED = ("wait_s", "prefill_s", "decode_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a call is not taken, in a word and in a sentence; the fields are those of `Refuse`."""

    reason: RefusalReason
    detail: str
    retry_after_s: float | None = None


def refuse(state: CallState, refusal: Refusal) -> Refuse:
    """What the client is told."""
    return Refuse(
        call_id=state.call.call_id,
        reason=refusal.reason,
        attempts=state.attempt,
        detail=refusal.detail,
        retry_after_s=refusal.retry_after_s,
    )


@dataclass(slots=True)
class ServiceRate:
    """Work a second that calls of one model came to lately: sums that fade within a minute."""

    work: float = 0.0
    since_s: float | None = None
    at_s: float = 0.0

    def ended(self, work: float, now_s: float) -> None:
        """A call came to so much work."""
        if self.since_s is None:
            self.since_s = now_s
        self.work = self._faded(now_s) + work
        self.at_s = now_s

    def per_s(self, now_s: float) -> float:
        """Zero while nothing is known."""
        if self.since_s is None or now_s <= self.since_s:
            return 0.0
        seen_s = _RATE_MEMORY_S * -math.expm1(-(now_s - self.since_s) / _RATE_MEMORY_S)
        return self._faded(now_s) / seen_s

    def _faded(self, now_s: float) -> float:
        return self.work * math.exp(-(now_s - self.at_s) / _RATE_MEMORY_S)


class Punctuality:
    """How long the last calls of a model took from first to last, as ratios to what the policy expected at first.

    A policy's times are means, and may be far off where calls wait: others come, the order changes, batches shrink.
    """

    def __init__(self) -> None:
        self._ratios: deque[float] = deque(maxlen=_MOST_TOOK)

    def took(self, state: CallState, now_s: float) -> None:
        """The call has ended, at its first replica."""
        if state.attempt == 1 and state.foreseen_s:
            self._ratios.append((now_s - state.ready_at_s) / state.foreseen_s)

    def least_ratio(self) -> float:
        """What few calls stay below; a cautious guess while little is known."""
        if len(self._ratios) < _ENOUGH_TOOK:
            return _UNKNOWN_RATIO
        return float(np.quantile(np.array(self._ratios), _LEAST_LEVEL))


def over_budget(over: OverBudget) -> Refusal:
    """The budget of the tenant does not hold what the call should need."""
    return Refusal(
        reason="budget",
        detail=f"this tenant may use {over.budget:.0f} tokens a minute, {over.used:.0f} of them are used; "
        f"come back in {over.retry_after_s:.1f} s",
        retry_after_s=over.retry_after_s,
    )


def overload(model: str, waiting: WaitingCalls, rate: ServiceRate, now_s: float) -> Refusal:
    """Too many calls of the model wait; one might fit again when the work that waits has been done."""
    per_s = rate.per_s(now_s)
    retry_after_s = min(_LONGEST_S, waiting.work / per_s) if per_s > 0.0 else _UNKNOWN_S
    return Refusal(
        reason="overload",
        detail=f"{len(waiting)} calls for the model {model!r} wait, which is the most that may; "
        f"come back in {retry_after_s:.1f} s",
        retry_after_s=retry_after_s,
    )


def too_late(state: CallState, choice: Choice, past: Punctuality, now_s: float) -> Refusal | None:
    """Refuse a call that has a deadline and will hardly meet it on any candidate.

    Hardly: it would still be late were its work, and that of the calls before it, what nine of ten exceed, and if it
    took, for what the policy expects, as little as one call in fifty. Where the policy tells the parts of the time,
    the best candidate counts, which need not be the chosen one. A policy that does not know the time refuses nobody.
    """
    deadline_at_s = state.call.deadline_at_s
    if deadline_at_s is None or choice.expected_s is None:
        return None
    share, ratio = _least_share(state.forecast), past.least_ratio()
    allowed_s, usual_s, alone_s = deadline_at_s - state.ready_at_s, choice.expected_s, math.inf
    soonest_s = least_s = usual_s * min(share, ratio)
    if all(name in choice.terms_s for name in _TIMED):
        wait_s, prefill_s, decode_s = (choice.terms_s[name] for name in _TIMED)
        own_s = np.minimum(prefill_s + share * decode_s, ratio * (prefill_s + decode_s))
        soonest_s, least_s = float(np.min(min(share, ratio) * wait_s + own_s)), float(np.min(own_s))
        usual_s, alone_s = float(np.min(wait_s + prefill_s + decode_s)), float(np.min(prefill_s + decode_s))
    if not now_s + soonest_s > deadline_at_s or not math.isfinite(soonest_s):
        return None
    detail = f"{max(0.0, deadline_at_s - now_s):.1f} s are left and the answer takes {soonest_s:.1f} s at the least"
    if least_s > allowed_s:
        detail += f"; no replica can do it in {allowed_s:.1f} s"
        return Refusal(reason="deadline", detail=detail)
    queued_s = usual_s if alone_s <= allowed_s else soonest_s  # until that is short enough; it shrinks with time
    return Refusal(reason="deadline", detail=detail, retry_after_s=max(0.0, queued_s - allowed_s))


def _least_share(forecast: Forecast) -> float:
    """How much less than the mean the work may be, as a share of it."""
    return min(1.0, forecast.quantile(_OPTIMISM) / forecast.mean) if forecast.mean > 0.0 else 1.0
