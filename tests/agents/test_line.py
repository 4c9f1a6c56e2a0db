"""Who is next in a line: priority with ageing first, then fairness among tenants, then the policy's order."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from swarmx.agents.line import Line, Place
from swarmx.agents.shares import Shares


@dataclass
class Waits:
    """A line with its shares; each call costs 100 tokens."""

    line: Line = field(default_factory=lambda: Line(30.0))
    shares: Shares = field(default_factory=Shares)
    calls: dict[Place, tuple[int, str, float]] = field(default_factory=dict)

    def add(self, name: int, *, priority: int = 0, tenant: str = "t", key: float = 0.0, since_s: float = 0.0) -> None:
        place = ((key, 0.0), name)
        self.calls[place] = priority, tenant, since_s
        self.line.add(priority, tenant, place, since_s)

    def first(self, count: int, now_s: float = 0.0) -> list[int]:
        return [name for _, name in self.line.first(count, now_s, self.shares, lambda _: 100.0)]

    def serve(self, now_s: float = 0.0) -> tuple[int, str]:
        (place,) = self.line.first(1, now_s, self.shares, lambda _: 100.0)
        priority, tenant, since_s = self.calls.pop(place)
        self.line.remove(priority, tenant, place, since_s)
        self.shares.charge(tenant, 100.0)
        return place[1], tenant


def test_a_line_of_one_tenant_is_in_the_order_of_the_policy() -> None:
    waits = Waits()
    for name, key in ((1, 3.0), (2, 1.0), (3, 2.0)):
        waits.add(name, key=key)
    assert waits.first(9) == [2, 3, 1]


def test_a_higher_priority_goes_first_whatever_the_policy_says() -> None:
    waits = Waits()
    waits.add(1, key=1.0)
    waits.add(2, key=2.0, priority=3)
    waits.add(3, key=0.0, priority=-4)
    assert waits.first(9) == [2, 1, 3]


def test_tenants_take_turns_and_each_ones_calls_are_in_the_order_of_the_policy() -> None:
    waits = Waits()
    for name in range(1, 5):
        waits.add(name, tenant="a", key=float(name))
    waits.add(5, tenant="b", key=9.0)
    waits.add(6, tenant="b", key=8.0)
    assert waits.first(9) == [1, 6, 2, 5, 3, 4]


def test_a_tenant_of_three_times_the_weight_is_served_three_times_as_often() -> None:
    waits = Waits(shares=Shares({"heavy": 3.0}))
    for name in range(100):
        waits.add(2 * name, tenant="heavy")
        waits.add(2 * name + 1, tenant="light")
    served = [waits.serve()[1] for _ in range(80)]
    assert served.count("heavy") == 60


def test_a_call_counts_as_one_priority_higher_for_each_half_minute_that_it_waited() -> None:
    waits = Waits()
    waits.add(1, priority=0, since_s=0.0, key=5.0)
    waits.add(2, priority=2, since_s=50.0, key=9.0)
    assert waits.first(1, now_s=59.0) == [2]
    assert waits.first(1, now_s=60.0) == [1]


def test_ageing_changes_nothing_among_calls_of_one_priority() -> None:
    waits = Waits()
    waits.add(1, since_s=0.0, key=5.0)
    waits.add(2, since_s=1e6, key=1.0)
    assert waits.first(2, now_s=1e6) == [2, 1]
    waits.add(3, since_s=1e6, key=9.0, tenant="u")
    assert waits.first(3, now_s=1e6) == [2, 3, 1]


def test_of_those_below_the_ones_that_waited_longest_rise_first() -> None:
    waits = Waits()
    waits.add(1, priority=0, since_s=20.0, key=1.0)
    waits.add(2, priority=0, since_s=10.0, key=2.0)
    waits.add(3, priority=1, since_s=41.0, key=9.0)
    assert waits.first(3, now_s=45.0) == [2, 3, 1]


def test_a_flood_of_urgent_calls_does_not_starve_one_that_is_not() -> None:
    waits = Waits()
    waits.add(0, priority=-10, since_s=0.0, key=0.0)
    now_s, number, served = 0.0, 0, -1
    while served != 0:
        number += 1
        now_s += 1.0
        waits.add(number, priority=10, since_s=now_s, key=now_s)
        served, _ = waits.serve(now_s)
        assert now_s <= 601.0
    assert now_s == 600.0


@given(
    calls=st.lists(
        st.tuples(st.integers(-2, 2), st.sampled_from("abc"), st.floats(0.0, 9.0), st.floats(0.0, 200.0)), max_size=30
    )
)
def test_everybody_is_in_the_line_once(calls: list[tuple[int, str, float, float]]) -> None:
    waits = Waits()
    for name, (priority, tenant, key, since_s) in enumerate(calls):
        waits.add(name, priority=priority, tenant=tenant, key=key, since_s=since_s)
    assert sorted(waits.first(100, now_s=200.0)) == list(range(len(calls)))
    assert waits.first(3, now_s=200.0) == waits.first(100, now_s=200.0)[:3]
    for _ in calls:
        waits.serve(now_s=200.0)
    assert not waits.line
