"""One model's replicas as the scaler counts them: which are there, which can be had, how long those take to start."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from swarmx.agents.scaling.speed import calls_per_s
from swarmx.core.engine import EngineProfile
from swarmx.core.nouns import Replica, ReplicaGroup, ReplicaState

Event = Literal["started", "failed", "lost"]

_MOST_STARTUPS = 20
_MOST_GONE = 256
_UNHEEDED_S = 10.0  # a drain that is heard of is so within a moment


@dataclass(slots=True, kw_only=True)
class Held:
    """A replica that is there or was asked for. Only one with a group is ours to drain."""

    replica_id: str
    profile: EngineProfile
    group: ReplicaGroup | None
    state: ReplicaState
    since_s: float
    is_heard_of: bool = True
    is_leaving: bool = False
    drained_at_s: float = -math.inf  # when it was last asked to go
    doomed_at_s: float | None = None  # when it was heard that its machine is to go, at `leaves_at_s`
    leaves_at_s: float = math.inf
    is_adopted: bool = False  # nobody here saw its start

    @property
    def counts(self) -> bool:
        """Whether it serves, or soon will, and can be counted on."""
        return self.state in ("starting", "ready") and not self.is_leaving and self.doomed_at_s is None


@dataclass(slots=True, kw_only=True)
class _Starts:
    """How the starts of a group went."""

    group: ReplicaGroup
    seconds: deque[float]
    failures: int = 0
    not_before_s: float = -math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """What makes replicas comparable: calls on each, and the work of an average call."""

    calls: float
    work: float

    def speed(self, profile: EngineProfile, reference: EngineProfile) -> float:
        """How many replicas of the reference it is worth."""
        own, other = (calls_per_s(p, self.calls, self.work) for p in (profile, reference))
        return own / other

    def price(self, profile: EngineProfile) -> float:
        """Cost of a call: the device's weight over its speed."""
        return profile.cost_weight / calls_per_s(profile, self.calls, self.work)


@dataclass(slots=True)
class Supply:
    """The replicas of one model, and its groups with what was learned about their starts."""

    groups: Sequence[ReplicaGroup]
    startups: Mapping[str, Iterable[float]]
    held: dict[str, Held] = field(default_factory=dict)
    _starts: dict[str, _Starts] = field(init=False)
    _gone: dict[str, ReplicaGroup] = field(default_factory=dict)  # ours that are gone; one may come back

    def __post_init__(self) -> None:
        self._starts = {
            group.group_id: _Starts(
                group=group, seconds=deque(self.startups.get(group.group_id, ()), maxlen=_MOST_STARTUPS)
            )
            for group in self.groups
        }

    def asked_for(self, replica_id: str, group: ReplicaGroup, now_s: float) -> None:
        """A start was ordered; until it is heard of, it counts as starting."""
        self.held[replica_id] = Held(
            replica_id=replica_id,
            profile=group.profile,
            group=group,
            state="starting",
            since_s=now_s,
            is_heard_of=False,
        )

    def changed(
        self, replica: Replica, state: ReplicaState, now_s: float, *, group_id: str | None = None
    ) -> Event | None:
        """Take a change in; tells when a start of ours came to its end, or a replica that served is gone.

        With `group_id`, one that is not known yet is ours from now on.
        """
        replica_id = replica.replica_id
        held = self.held.get(replica_id)
        if state == "gone":
            if held is None:
                return None
            self.forget(replica_id)
            if held.is_leaving or held.state == "draining":
                return None
            if held.state == "starting":
                return "failed" if held.group is not None else None
            return "lost"
        if held is None:
            group = next((g for g in self.groups if g.group_id == group_id), self._gone.pop(replica_id, None))
            self.held[replica_id] = Held(
                replica_id=replica_id,
                profile=replica.profile,
                group=group,
                state=state,
                since_s=now_s,
                is_adopted=group_id is not None,
            )
            return None
        held.is_heard_of = True
        if state == held.state:
            return None
        came_up = held.state == "starting" and state == "ready"
        started = came_up and held.group is not None and not (held.is_leaving or held.is_adopted)
        if started and held.group is not None:
            self._starts[held.group.group_id].seconds.append(now_s - held.since_s)
        held.state, held.since_s = state, now_s
        return "started" if started else None

    def noticed(self, replica_id: str, deadline_at_s: float | None, now_s: float) -> None:
        """The machine of a replica is to go; without a deadline, as soon as something stands in for it."""
        held = self.held[replica_id]
        held.leaves_at_s = math.inf if deadline_at_s is None else deadline_at_s
        held.doomed_at_s = now_s if held.doomed_at_s is None else held.doomed_at_s

    def forget(self, replica_id: str) -> None:
        """It is gone; should it come back, it is still known whether it is ours."""
        held = self.held.pop(replica_id)
        if held.group is not None:
            self._gone[replica_id] = held.group
            if len(self._gone) > _MOST_GONE:
                del self._gone[next(iter(self._gone))]

    def count(self) -> int:
        """Replicas that serve or soon will."""
        return sum(held.counts for held in self.held.values())

    def is_starting(self) -> bool:
        return any(held.counts and held.state == "starting" for held in self.held.values())

    def capacity(self, reference: EngineProfile, measure: Measure) -> float:
        """The same, each weighted by its speed."""
        return sum(measure.speed(held.profile, reference) for held in self.held.values() if held.counts)

    def cost(self) -> float:
        """Device weights of everything of ours, on its way out or not."""
        return sum(held.profile.cost_weight for held in self.held.values() if held.group is not None)

    def cheapest(self, measure: Measure) -> list[ReplicaGroup]:
        """The groups, best price for a call first."""
        return sorted(self.groups, key=lambda group: (measure.price(group.profile), group.group_id))

    def has_room(self, group: ReplicaGroup) -> bool:
        """One that is to go anyway takes no place: what stands in for it has to start before it is gone."""
        return sum(held.group is group and held.doomed_at_s is None for held in self.held.values()) < group.limit

    def is_backing_off(self, group: ReplicaGroup, now_s: float) -> bool:
        return now_s < self._starts[group.group_id].not_before_s

    def leavers(self, measure: Measure) -> list[Held]:
        """Ours, in the order in which they should go: those that start, then the worst price, then the youngest."""
        ours = [held for held in reversed(self.held.values()) if held.group is not None and held.counts]
        return sorted(ours, key=lambda held: (held.state != "starting", -measure.price(held.profile), -held.since_s))

    def overdue(self, now_s: float, *, patience: float, floor_s: float) -> list[Held]:
        """Starts that took longer than they may, also of those that nobody began before they were to end.

        Somebody else's replica that is still silent is among them: it counts once it answers.
        """
        return [
            held
            for held in self.held.values()
            if held.state == "starting"
            and not (held.is_leaving and held.is_heard_of)
            and now_s - held.since_s > max(floor_s, patience * self.startup_s(held.group) if held.group else 0.0)
        ]

    def due(self, now_s: float, *, drain_s: float) -> list[Held]:
        """Ours that are to be drained now: by a notice, or again.

        With a notice they go once another has come up, and in time to let calls end. Those that were to go a while ago
        and still serve are asked again: the audit log could not be written, say.
        """
        return [
            held for held in self.held.values() if self._unheeded(held, now_s) or self._must_go(held, now_s + drain_s)
        ]

    def _unheeded(self, held: Held, now_s: float) -> bool:
        return held.is_leaving and held.state in ("ready", "cordoned") and now_s - held.drained_at_s > _UNHEEDED_S

    def _must_go(self, held: Held, gone_at_s: float) -> bool:
        """Whether a replica of ours whose machine is to go had better be drained by now, to be gone at that time."""
        noticed_s = held.doomed_at_s
        if noticed_s is None or held.group is None or held.is_leaving or held.state in ("draining", "gone"):
            return False
        if held.state == "starting" or gone_at_s >= held.leaves_at_s:
            return True
        return any(
            other.state == "ready" and other.counts and other.since_s > noticed_s for other in self.held.values()
        )

    def startup_s(self, group: ReplicaGroup) -> float:
        """P90 of the start-up times that were seen; the group's own guess before the first."""
        seconds = sorted(self._starts[group.group_id].seconds)
        return seconds[math.ceil(0.9 * len(seconds)) - 1] if seconds else group.start_s

    def failed(self, group: ReplicaGroup, now_s: float, *, first_s: float, most_s: float) -> None:
        """No further start in the group for a while, twice as long after each failure in a row."""
        starts = self._starts[group.group_id]
        starts.not_before_s = now_s + min(most_s, first_s * 2.0 ** min(starts.failures, 30))
        starts.failures += 1

    def started(self, group: ReplicaGroup) -> None:
        starts = self._starts[group.group_id]
        starts.failures, starts.not_before_s = 0, -math.inf
