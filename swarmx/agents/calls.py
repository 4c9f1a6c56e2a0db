"""The router's memory of its calls: how far each has come, and the lines in which they wait for a replica."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import msgspec

from swarmx.agents.line import Line, Place
from swarmx.agents.orders import Key
from swarmx.agents.shares import Shares
from swarmx.core.actions import StartTimer, StopTimer
from swarmx.core.fleet import Choice
from swarmx.core.forecast import Forecast
from swarmx.core.nouns import Call

_NOWHERE: frozenset[str] = frozenset()
_LEAST_S = 1e-3  # what should take less says nothing about the replica


class CallState(msgspec.Struct, kw_only=True, eq=False):
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
    unread: float = 0.0  # tokens of its prompt that the replica has to read and has not answered yet
    shared: float = 0.0  # tokens of its prompt that were in the replica's cache
    profile_s: float | None = None  # from dispatch to end, as the replica's profile has it
    unit_s: float = 0.0
    weight: float = 1.0  # what a second of it is worth to the policy
    tried: frozenset[str] = _NOWHERE
    foreseen_s: float | None = None  # from ready to the end, by the policy's first word
    place: Place | None = None  # in its line, while it waits
    joined: bool = False  # it waited for this attempt, so its tenant's share was brought up to date when it came
    priority: int = 0  # what its tenant may have of the one that it asks for
    charged: float = 0.0  # weighted tokens, for this attempt
    budgeted: float = 0.0  # tokens, for the whole call

    def sent(self, replica_id: str, choice: Choice, cached_tokens: float, now_s: float) -> None:
        """One more attempt begins, at the replica that the policy chose."""
        self.attempt += 1
        self.replica_id, self.dispatched_at_s = replica_id, now_s
        self.work_left, self.work_done, self.variance = self.forecast.mean, 0.0, self.forecast.variance
        self.context = float(self.call.prompt_tokens)
        self.shared = min(cached_tokens, self.context)
        self.unread = self.context - self.shared
        self.profile_s, self.unit_s, self.weight = choice.profile_s, choice.unit_s, choice.weight

    @property
    def movable(self) -> bool:
        """Whether another replica may be tried while nobody knows what this one has done."""
        return not (self.streamed or self.call.once)

    def slowness(self, work_done: float, now_s: float) -> float | None:
        """How many times what the profile says the call took, given its work; None where nobody knows either."""
        if self.profile_s is None or work_done <= 0.0:
            return None
        expected_s = self.profile_s + (work_done - self.forecast.mean) * self.unit_s
        return (now_s - self.dispatched_at_s) / expected_s if expected_s > _LEAST_S else None


class WaitingCalls:
    """The calls of one model that wait, in one line for each set of replicas tried; `work` is what they should need.

    The calls of a line wait for the same slots: where there is nothing for its first, there is nothing for the rest.
    `untimed` are the calls, by id, that have no patience timer running. `shares` say which tenant is next.
    """

    def __init__(self, shares: Shares | None = None, *, priority_age_s: float = 30.0) -> None:
        self.untimed: dict[str, CallState] = {}
        self.shares = Shares() if shares is None else shares
        self.work = 0.0
        self._age_s = priority_age_s
        self._lines: dict[frozenset[str], Line] = {}
        self._at: dict[Place, CallState] = {}
        self._of_tenant: dict[str, int] = {}
        self._count = 0

    def __iter__(self) -> Iterator[CallState]:
        return (self._at[place] for line in self._lines.values() for place in line)

    def __len__(self) -> int:
        """How many wait."""
        return len(self._at)

    def lines(self) -> list[frozenset[str]]:
        """By the replicas that were tried; calls that were tried nowhere yet come last."""
        return sorted(self._lines, key=lambda tried: not tried)

    def first(self, tried: frozenset[str], count: int, now_s: float) -> list[CallState]:
        """Who is next in the line, at most so many."""
        line = self._lines.get(tried)
        if line is None:
            return []
        return [self._at[place] for place in line.first(count, now_s, self.shares, self._expected)]

    def must_queue(self, state: CallState) -> bool:
        """Whether calls of other tenants or priorities wait for what this call wants, so that it is not simply next."""
        line = self._lines.get(state.tried)
        return line is not None and not line.is_all_of(state.priority, state.call.tenant)

    def add(self, state: CallState, key: Key) -> Sequence[StartTimer]:
        """The call waits from now on, until its deadline if it has one, behind all of its line with this key."""
        self._count += 1
        tenant, state.joined = state.call.tenant, True
        if tenant not in self._of_tenant:
            self.shares.joins(tenant, self._of_tenant)
        self._of_tenant[tenant] = self._of_tenant.get(tenant, 0) + 1
        state.work_left = state.forecast.mean
        self.work += state.work_left
        self.untimed[state.call.call_id] = state
        self._stand(state, (key, self._count))
        if state.call.deadline_at_s is None:
            return ()
        return (StartTimer(key=f"deadline:{state.call.call_id}", at_s=state.call.deadline_at_s),)

    def remove(self, state: CallState) -> Sequence[StopTimer]:
        """The call waits no longer."""
        assert state.place is not None
        tenant, line = state.call.tenant, self._lines[state.tried]
        line.remove(state.priority, tenant, state.place, state.ready_at_s)
        del self._at[state.place]
        state.place = None
        if not line:
            del self._lines[state.tried]
        self._of_tenant[tenant] -= 1
        if not self._of_tenant[tenant]:
            del self._of_tenant[tenant]
        self.work = self.work - state.work_left if self._at else 0.0
        call_id = state.call.call_id
        timers = [] if self.untimed.pop(call_id, None) is not None else [StopTimer(key=f"queue:{call_id}")]
        if state.call.deadline_at_s is not None:
            timers.append(StopTimer(key=f"deadline:{call_id}"))
        return tuple(timers)

    def refined(self, state: CallState) -> None:
        """There is a better forecast of a call that waits."""
        self.work += state.forecast.mean - state.work_left
        state.work_left = state.forecast.mean

    def serve(self, state: CallState, tokens: float) -> None:
        """The call is served, for so many weighted tokens; it does not wait, or not any more."""
        tenant = state.call.tenant
        if not state.joined and tenant not in self._of_tenant and tenant != self.shares.last:
            self.shares.joins(tenant, self._of_tenant)
        state.joined = False
        self.shares.charge(tenant, tokens)

    def reorder(self, key_of: Callable[[CallState], Key]) -> None:
        """Give every call a new key; those with the same key stay in the order in which they came."""
        states = list(self._at.values())
        self._lines.clear()
        self._at.clear()
        for state in states:
            assert state.place is not None
            self._stand(state, (key_of(state), state.place[1]))

    def start_timers(self, now_s: float, patience_s: float) -> list[StartTimer]:
        """There is nobody to wait for: from now on every call has a timer."""
        timers = [StartTimer(key=f"queue:{call_id}", at_s=now_s + patience_s) for call_id in self.untimed]
        self.untimed.clear()
        return timers

    def stop_timers(self) -> list[StopTimer]:
        """There is somebody to wait for again: no call has a timer, and its patience is whole once more."""
        if len(self.untimed) == len(self._at):
            return []
        timed = [state for state in self._at.values() if state.call.call_id not in self.untimed]
        self.untimed.update((state.call.call_id, state) for state in timed)
        return [StopTimer(key=f"queue:{state.call.call_id}") for state in timed]

    def displaced_by(self, tenant: str, places: int) -> CallState | None:
        """Who has to go where all places are taken and the tenant has less than its share of them, by weight.

        It is the last call, of those that were tried nowhere, of the tenant that is furthest above its share; None
        where nobody is further above it than this tenant would be with one call more.
        """
        weights = {name: self.shares.weight_of(name) for name in (*self._of_tenant, tenant)}
        each = places / sum(weights.values())
        above = {name: self._of_tenant.get(name, 0) - each * weight for name, weight in weights.items()}
        most = max(above, key=lambda name: above[name])
        line = self._lines.get(_NOWHERE)
        if line is None or above[tenant] >= 0.0 or above[tenant] + 1.0 >= above[most]:
            return None
        place = line.last_of(most)
        return None if place is None else self._at[place]

    def _stand(self, state: CallState, place: Place) -> None:
        state.place = place
        self._at[place] = state
        line = self._lines.get(state.tried)
        if line is None:
            line = self._lines[state.tried] = Line(self._age_s)
        line.add(state.priority, state.call.tenant, place, state.ready_at_s)

    def _expected(self, place: Place) -> float:
        state = self._at[place]
        return self.shares.weighed(state.call.prompt_tokens, state.forecast.mean)
