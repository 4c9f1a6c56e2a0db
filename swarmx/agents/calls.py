"""The router's memory of its calls: how far each has come, and the lines in which they wait for a replica."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from swarmx.agents.orders import Key
from swarmx.core.actions import StartTimer, StopTimer
from swarmx.core.forecast import Forecast
from swarmx.core.nouns import Call


@dataclass(slots=True, kw_only=True)
class CallState:
    """One call of the router: waiting while `replica_id` is None, else on that replica."""

    call: Call
    forecast: Forecast
    path: Forecast | None = None
    ready_at_s: float = 0.0
    attempt: int = 0
    replica_id: str | None = None
    dispatched_at_s: float = 0.0
    streamed: bool = False
    work_left: float = 0.0
    work_done: float = 0.0
    variance: float = 0.0
    context: float = 0.0
    tried: frozenset[str] = field(default_factory=frozenset)
    patience_until_s: float | None = None  # set when it first has no replica; retries do not extend it
    place: tuple[Key, int] | None = None  # in its line, while it waits


class WaitingCalls:
    """The calls of one model that wait: by key and then as they came, in one line for each set of replicas tried.

    The calls of a line wait for the same slots: where there is nothing for its first, there is nothing for the rest.
    `untimed` are the calls, by id, that have no patience timer running.
    """

    def __init__(self) -> None:
        self.untimed: dict[str, CallState] = {}
        self._lines: dict[frozenset[str], list[tuple[Key, int]]] = {}
        self._at: dict[tuple[Key, int], CallState] = {}
        self._count = 0

    def __iter__(self) -> Iterator[CallState]:
        return (self._at[place] for line in self._lines.values() for place in line)

    def __len__(self) -> int:
        return len(self._at)

    def lines(self) -> list[frozenset[str]]:
        """By the replicas that were tried; calls that were tried nowhere yet come last."""
        return sorted(self._lines, key=lambda tried: not tried)

    def first(self, tried: frozenset[str], count: int) -> list[CallState]:
        """Who is next in the line, at most so many."""
        return [self._at[place] for place in self._lines.get(tried, ())[:count]]

    def add(self, state: CallState, key: Key) -> None:
        """The call waits from now on, without a timer, behind all others of its line with this key."""
        self._count += 1
        state.place = (key, self._count)
        insort(self._lines.setdefault(state.tried, []), state.place)
        self._at[state.place] = state
        self.untimed[state.call.call_id] = state

    def remove(self, state: CallState) -> Sequence[StopTimer]:
        """The call waits no longer."""
        assert state.place is not None
        line = self._lines[state.tried]
        del line[bisect_left(line, state.place)], self._at[state.place]
        state.place = None
        if not line:
            del self._lines[state.tried]
        timed = self.untimed.pop(state.call.call_id, None) is None
        return (StopTimer(key=f"queue:{state.call.call_id}"),) if timed else ()

    def reorder(self, key_of: Callable[[CallState], Key]) -> None:
        """Give every call a new key; those with the same key stay in the order in which they came."""
        states = list(self._at.values())
        self._lines.clear()
        self._at.clear()
        for state in states:
            assert state.place is not None
            state.place = (key_of(state), state.place[1])
            insort(self._lines.setdefault(state.tried, []), state.place)
            self._at[state.place] = state

    def start_timers(self, now_s: float, patience_s: float) -> list[StartTimer]:
        """There is nobody to wait for: from now on every call has a timer."""
        timers: list[StartTimer] = []
        for call_id, state in self.untimed.items():
            if state.patience_until_s is None:
                state.patience_until_s = now_s + patience_s
            timers.append(StartTimer(key=f"queue:{call_id}", at_s=state.patience_until_s))
        self.untimed.clear()
        return timers
