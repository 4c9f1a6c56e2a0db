"""The calls that wait in a router, model by model: who may stay, who goes next, and when to look again."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from swarmx.agents.admission import Refusal, ServiceRate, overload
from swarmx.agents.calls import CallState, WaitingCalls
from swarmx.agents.placing import Placed, Placing
from swarmx.agents.pool import Pool
from swarmx.agents.router_settings import RouterSettings
from swarmx.agents.shares import Shares
from swarmx.core.actions import StartTimer, StopTimer

_NOBODY: frozenset[str] = frozenset()
_SOON_S = 0.001  # after a call that waited was placed, the others are asked about: by then it is on its way


@dataclass(frozen=True, slots=True, kw_only=True)
class Displaced:
    """The call that came waits, in the place of this one, which is refused."""

    state: CallState
    refusal: Refusal
    timers: Sequence[StartTimer | StopTimer]


class WaitingRoom:
    """Asks `placing` about calls as they come, and about those that wait when something has changed."""

    def __init__(self, settings: RouterSettings, placing: Placing, shares: Callable[[], Shares]) -> None:
        self._settings = settings
        self._placing = placing
        self._lines: defaultdict[str, WaitingCalls] = defaultdict(
            lambda: WaitingCalls(shares(), priority_age_s=settings.priority_age_s)
        )
        self._rates: defaultdict[str, ServiceRate] = defaultdict(ServiceRate)
        self._rest: set[str] = set()  # models of which one call was placed, and the others have not been asked about
        self._looks_again_at_s: dict[str, float] = {}  # by model: the timer for calls that are held back

    def __getitem__(self, model: str) -> WaitingCalls:
        return self._lines[model]

    @property
    def lines(self) -> dict[str, WaitingCalls]:
        """The calls that wait, by model."""
        return self._lines

    def enter(
        self, state: CallState, pool: Pool, now_s: float, *, queues: bool
    ) -> Placed | Refusal | Displaced | Sequence[StartTimer | StopTimer]:
        """What becomes of a call that has just come, or come back: it is placed, refused, or waits with these timers.

        Where calls of other tenants or priorities wait already, it `queues` for its turn, which `call_in` knows. Where
        all places are taken, it gets one only from a tenant that has more than its share of them, and then for its own.
        """
        waiting = self._lines[pool.model]
        if not queues:
            placed = self._placing.place(state, pool, len(waiting), now_s)
            if (found := placed or self._placing.hopeless(state, pool, len(waiting), now_s)) is not None:
                return found
        places, last = self._settings.max_waiting, None
        if state.attempt == 0 and len(waiting) >= places:
            refusal = overload(pool.model, waiting, self._rates[pool.model], now_s)
            if (last := waiting.displaced_by(state.call.tenant, places)) is None:
                return refusal
        left = [] if last is None else waiting.remove(last)
        timers = [*left, *waiting.add(state, self._placing.key(state, now_s)), *self.timers(pool, now_s)]
        return timers if last is None else Displaced(state=last, refusal=refusal, timers=timers)

    def call_in(self, pool: Pool, now_s: float) -> Iterator[tuple[CallState, Placed | Refusal, Sequence[StopTimer]]]:
        """Those whose turn it is, while there is room for them: each leaves the room, and has to be sent on its way
        before the next is asked about.

        Where the policy may hold calls back, one is all, and `timers` says when to ask about the others: most of them
        wait on, and to hear that of each would keep the one that goes.
        """
        waiting = self._lines[pool.model]
        for tried in waiting.lines():
            while len(pool.open(tried)) and (found := self._next(tried, pool, waiting, now_s)) is not None:
                state, placed = found
                yield state, placed, waiting.remove(state)
                if waiting and self._placing.may_hold:
                    self._rest.add(pool.model)
                    return
            if len(pool.open(_NOBODY)) == 0:
                break

    def timers(self, pool: Pool, now_s: float) -> Sequence[StartTimer | StopTimer]:
        """Calls wait without a timer while there is a replica that may take them later, and with one otherwise.

        Where the policy holds calls back although there is room, one timer a model says when to ask it again; it is
        started anew when an earlier time than the one that it stands at has come up.
        """
        model, waiting = pool.model, self._lines[pool.model]
        rest = model in self._rest
        self._rest.discard(model)
        if len(pool.eligible(_NOBODY)) == 0:
            return waiting.start_timers(now_s, self._settings.queue_timeout_s)
        stops = waiting.stop_timers()
        if not waiting or not self._placing.may_hold or len(pool.open(_NOBODY)) == 0:
            return stops
        until_s: float | None = now_s + _SOON_S
        if not rest:
            depth = self._settings.hold_depth
            held = [state for tried in waiting.lines() for state in waiting.first(tried, depth, now_s)]
            until_s = self._placing.held_until_s(held, now_s)
        if until_s is None or self._looks_again_at_s.get(model, math.inf) <= until_s:
            return stops
        self._looks_again_at_s[model] = until_s
        return [*stops, StartTimer(key=f"hold:{model}", at_s=until_s)]

    def looks_again(self, model: str) -> None:
        """The timer of the model has run out."""
        self._looks_again_at_s.pop(model, None)

    def ended(self, model: str, work: float, now_s: float) -> None:
        """A call of the model came to so much work."""
        self._rates[model].ended(work, now_s)

    def _next(
        self, tried: frozenset[str], pool: Pool, waiting: WaitingCalls, now_s: float
    ) -> tuple[CallState, Placed | Refusal] | None:
        """The first of the line's head that need not wait; None when all of them had better."""
        for ahead, state in enumerate(waiting.first(tried, self._settings.hold_depth, now_s)):
            if (placed := self._placing.place(state, pool, ahead, now_s)) is not None:
                return state, placed
        return None
