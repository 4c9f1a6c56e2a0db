"""The router's memory of its calls: how far each has come, and the lines in which they wait for a replica."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from swarmx.core.actions import StartTimer, StopTimer
from swarmx.core.forecast import Forecast
from swarmx.core.nouns import Call


@dataclass(slots=True, kw_only=True)
class CallState:
    """One call of the router: waiting while `replica_id` is None, else on that replica."""

    call: Call
    forecast: Forecast
    attempt: int = 0
    replica_id: str | None = None
    streamed: bool = False
    work_left: float = 0.0
    work_done: float = 0.0
    context: float = 0.0
    tried: frozenset[str] = field(default_factory=frozenset)
    patience_until_s: float | None = None  # set when it first has no replica; retries do not extend it


class WaitingCalls:
    """The calls of one model that wait: first come first served, in one line for each set of replicas tried before.

    The calls of a line wait for the same slots: where there is nothing for its first, there is nothing for the rest.
    `untimed` are the calls, by id, that have no patience timer running.
    """

    def __init__(self) -> None:
        self.untimed: dict[str, CallState] = {}
        # Ordered, because the first key of a plain dict is slow to find after many before it were deleted.
        self._lines: dict[frozenset[str], OrderedDict[str, CallState]] = {}

    def __iter__(self) -> Iterator[CallState]:
        return (state for line in self._lines.values() for state in line.values())

    def lines(self) -> list[frozenset[str]]:
        """By the replicas that were tried; calls that were tried nowhere yet come last."""
        return sorted(self._lines, key=lambda tried: not tried)

    def first(self, tried: frozenset[str]) -> CallState | None:
        """Who is next in the line."""
        line = self._lines.get(tried)
        return None if line is None else next(iter(line.values()))

    def add(self, state: CallState) -> None:
        """The call waits from now on, without a timer, behind all others of its line."""
        self._lines.setdefault(state.tried, OrderedDict())[state.call.call_id] = state
        self.untimed[state.call.call_id] = state

    def remove(self, state: CallState) -> Sequence[StopTimer]:
        """The call waits no longer."""
        line = self._lines[state.tried]
        del line[state.call.call_id]
        if not line:
            del self._lines[state.tried]
        timed = self.untimed.pop(state.call.call_id, None) is None
        return (StopTimer(key=f"queue:{state.call.call_id}"),) if timed else ()

    def start_timers(self, now_s: float, patience_s: float) -> list[StartTimer]:
        """There is nobody to wait for: from now on every call has a timer."""
        timers: list[StartTimer] = []
        for call_id, state in self.untimed.items():
            if state.patience_until_s is None:
                state.patience_until_s = now_s + patience_s
            timers.append(StartTimer(key=f"queue:{call_id}", at_s=state.patience_until_s))
        self.untimed.clear()
        return timers
