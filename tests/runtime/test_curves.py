"""Service curves are published when something has changed, and not more often than allowed."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.core.messages import Message, PredictorReady, ServiceCurvePublished, SignalReported
from swarmx.core.nouns import Replica, ReplicaState
from swarmx.runtime.curves import CurvePublisher, curve_status
from tests.agents.worlds import changed

EVERY_S = 1.0


def signal(replica_id: str = "a", **about: Any) -> SignalReported:
    return SignalReported(
        **({"replica_id": replica_id, "running": 1, "waiting": 0, "kv_usage": 0.1, "measured_at_s": 0.0} | about)
    )


def a_curve(replica_id: str = "a", *, at_s: float = 0.0) -> ServiceCurvePublished:
    """Two lengths, three prompt sizes, three levels; the numbers count up."""
    return ServiceCurvePublished(
        replica_id=replica_id,
        work=(64.0, 512.0),
        uncached=(0.0, 1000.0, 8000.0),
        levels=(0.1, 0.5, 0.9),
        completion_s=tuple(float(i) for i in range(18)),
        ttft_s=tuple(float(i) for i in range(9)),
        measured_at_s=at_s,
        version="latency-1",
    )


class Bench:
    """A publisher whose curves are empty, on a clock that the test moves."""

    def __init__(self) -> None:
        self.at_s = 100.0
        self.posted: list[Message] = []
        self.computed: list[tuple[str, int | None]] = []
        self.broken = False
        self.publisher = CurvePublisher(self.compute, post=self.posted.append, clock=self, every_s=EVERY_S)

    def now_s(self) -> float:
        return self.at_s

    def compute(self, replica: Replica, last: SignalReported | None, now_s: float) -> ServiceCurvePublished:
        self.computed.append((replica.replica_id, None if last is None else last.running))
        if self.broken:
            raise ZeroDivisionError
        return a_curve(replica.replica_id, at_s=now_s)

    def hear(self, *messages: Message) -> None:
        for message in messages:
            self.publisher.observe(message, self.at_s)

    def step(self) -> list[str]:
        """Publish what is due; which replicas that were."""
        due = self.publisher.due()
        for replica_id in due:
            self.publisher.publish(replica_id)
        return due


def test_a_replica_has_a_curve_before_its_first_signal_and_after_each_change() -> None:
    bench = Bench()
    bench.hear(changed("a"))
    assert bench.step() == ["a"]
    bench.at_s += EVERY_S
    assert bench.step() == []
    bench.hear(signal(running=3))
    assert bench.step() == ["a"]
    assert bench.computed == [("a", None), ("a", 3)]
    assert [message.measured_at_s for message in bench.posted if isinstance(message, ServiceCurvePublished)] == [
        100.0,
        101.0,
    ]


def test_signals_that_say_the_same_lead_to_no_new_curve() -> None:
    bench = Bench()
    bench.hear(changed("a"), signal())
    bench.step()
    bench.at_s += EVERY_S
    bench.hear(signal(kv_usage=0.105, measured_at_s=5.0))
    assert bench.step() == []
    bench.hear(signal(kv_usage=0.12, measured_at_s=6.0))
    assert bench.step() == ["a"]


def test_small_steps_of_the_cache_add_up_to_a_change() -> None:
    bench = Bench()
    bench.hear(changed("a"), signal(kv_usage=0.0))
    bench.step()
    bench.at_s += EVERY_S
    bench.hear(*(signal(kv_usage=0.004 * step) for step in range(4)))
    assert bench.step() == ["a"]


def test_changes_in_quick_succession_lead_to_one_curve_with_the_last_of_them() -> None:
    bench = Bench()
    bench.hear(changed("a"), signal(running=1))
    bench.step()
    for running in (2, 3, 4):
        bench.hear(signal(running=running))
        assert bench.step() == []
    bench.at_s += EVERY_S
    assert bench.step() == ["a"]
    assert bench.computed[-1] == ("a", 4)


def test_who_has_waited_for_longest_comes_first() -> None:
    bench = Bench()
    bench.hear(changed("a"), changed("b"))
    bench.publisher.publish("b")
    bench.at_s += EVERY_S
    bench.publisher.publish("a")
    bench.at_s += EVERY_S
    bench.hear(signal("a"), signal("b"))
    assert bench.step() == ["b", "a"]


def test_new_weights_make_every_curve_old() -> None:
    bench = Bench()
    bench.hear(changed("a"), changed("b"))
    bench.step()
    bench.at_s += EVERY_S
    bench.hear(PredictorReady(head="latency", version="2", previous="1"))
    assert bench.step() == ["a", "b"]


@pytest.mark.parametrize("state", ["gone", "starting"])
def test_a_replica_that_takes_no_calls_has_no_curve(state: ReplicaState) -> None:
    bench = Bench()
    bench.hear(changed("a"), changed("a", state), signal())
    assert bench.step() == []
    bench.publisher.publish("a")
    assert bench.computed == []


def test_a_curve_that_cannot_be_computed_is_left_out_until_the_next_change() -> None:
    bench = Bench()
    bench.broken = True
    bench.hear(changed("a"), changed("b"))
    assert bench.step() == ["a", "b"]
    bench.at_s += EVERY_S
    assert bench.step() == bench.posted == []
    bench.broken = False
    bench.hear(signal("b"))
    assert bench.step() == ["b"]
    assert len(bench.posted) == 1


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(0, 2), st.sampled_from([0.0, 0.3, 2.0])),
        max_size=40,
    )
)
def test_no_replica_has_more_than_one_curve_in_the_time_of_one(steps: list[tuple[str, int, float]]) -> None:
    bench = Bench()
    bench.hear(changed("a"), changed("b"))
    for replica_id, running, passes_s in steps:
        bench.hear(signal(replica_id, running=running))
        bench.step()
        bench.at_s += passes_s
    for replica_id in "ab":
        times = [
            m.measured_at_s for m in bench.posted if isinstance(m, ServiceCurvePublished) and m.replica_id == replica_id
        ]
        assert all(later - earlier >= EVERY_S for earlier, later in itertools.pairwise(times))


def test_a_curve_in_short_is_its_point_nearest_to_a_typical_call() -> None:
    status = curve_status(a_curve(at_s=90.0), "llm", 100.0)
    assert (status.age_s, status.version, status.work, status.uncached) == (10.0, "latency-1", 64.0, 1000.0)
    assert (status.p50_s, status.p90_s) == (4.0, 5.0)
