"""The calls that wait for the same slots, and who of them is next: by priority, fairly among tenants, in order."""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

from swarmx.agents.orders import Key
from swarmx.agents.shares import Shares

Place = tuple[Key, int]
"""What the policy's order compares, and then the number of the call as it came."""


@dataclass(slots=True)
class _Queue:
    """The calls of one tenant and priority: in the order of the policy, and by the time since which they wait."""

    places: list[Place] = field(default_factory=list)
    since: list[tuple[float, Place]] = field(default_factory=list)


class Line:
    """Tenants and priorities in one line of waiting calls; who has waited for long counts as more urgent.

    A call counts as one priority higher for each `age_s` that it has waited, up to the highest priority in the line:
    there it competes with those that were born to it. Among tenants, the one with the least `Shares` counter is next;
    of its calls the one with the lowest place. With one tenant and one priority, the line is in the order of places.
    """

    def __init__(self, age_s: float) -> None:
        self._age_s = age_s
        self._queues: dict[tuple[int, str], _Queue] = {}

    def __bool__(self) -> bool:
        return bool(self._queues)

    def __iter__(self) -> Iterator[Place]:
        return (place for queue in self._queues.values() for place in queue.places)

    def is_all_of(self, priority: int, tenant: str) -> bool:
        """Whether only calls of this priority and tenant wait here."""
        return not self._queues or (len(self._queues) == 1 and (priority, tenant) in self._queues)

    def add(self, priority: int, tenant: str, place: Place, since_s: float) -> None:
        """A call that has been ready since then begins to wait."""
        queue = self._queues.setdefault((priority, tenant), _Queue())
        insort(queue.places, place)
        insort(queue.since, (since_s, place))

    def remove(self, priority: int, tenant: str, place: Place, since_s: float) -> None:
        """It waits no longer."""
        queue = self._queues[priority, tenant]
        del queue.places[bisect_left(queue.places, place)]
        del queue.since[bisect_left(queue.since, (since_s, place))]
        if not queue.places:
            del self._queues[priority, tenant]

    def last_of(self, tenant: str) -> Place | None:
        """The tenant's call of the lowest priority that was ready last; None where it has none here."""
        lowest = min((priority for priority, name in self._queues if name == tenant), default=None)
        return None if lowest is None else self._queues[lowest, tenant].since[-1][1]

    def first(self, count: int, now_s: float, shares: Shares, cost_of: Callable[[Place], float]) -> Iterable[Place]:
        """Who is next, at most so many; `cost_of` a call is the service that it will be charged."""
        if len(self._queues) == 1:
            (queue,) = self._queues.values()
            return queue.places[:count]
        return list(islice(self._in_turn(now_s, shares, cost_of), count))

    def _in_turn(self, now_s: float, shares: Shares, cost_of: Callable[[Place], float]) -> Iterator[Place]:
        seen: set[Place] = set()
        for level in sorted({priority for priority, _ in self._queues}, reverse=True):
            of_tenant: dict[str, list[Iterable[Place]]] = {}
            for (priority, tenant), queue in self._queues.items():
                if priority <= level:
                    of_tenant.setdefault(tenant, []).append(self._competing(queue, priority, level, now_s))
            for place in _fairly(of_tenant, shares, cost_of):
                if place not in seen:
                    seen.add(place)
                    yield place

    def _competing(self, queue: _Queue, priority: int, level: int, now_s: float) -> Iterable[Place]:
        """Those of the queue that count as much as the level by now; of those below it the ones that waited longest."""
        if priority == level:
            return queue.places
        before_s = now_s - (level - priority) * self._age_s
        old = bisect_right(queue.since, before_s, key=lambda entry: entry[0])
        return (place for _, place in islice(queue.since, old))


def _fairly(
    of_tenant: Mapping[str, list[Iterable[Place]]], shares: Shares, cost_of: Callable[[Place], float]
) -> Iterator[Place]:
    """The places of all tenants, as they would be served one after the other."""
    heads: list[tuple[float, Place, str, Iterator[Place]]] = []
    for tenant, queues in of_tenant.items():
        places = iter(queues[0]) if len(queues) == 1 else heapq.merge(*queues)
        if (place := next(places, None)) is not None:
            heads.append((shares.counter(tenant), place, tenant, places))
    heapq.heapify(heads)
    while heads:
        counter, place, tenant, places = heads[0]
        yield place
        following = next(places, None)
        if following is None:
            heapq.heappop(heads)
        else:
            heapq.heapreplace(heads, (counter + shares.share_of(tenant, cost_of(place)), following, tenant, places))
