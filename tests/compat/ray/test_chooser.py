"""Choosing places for calls of a Ray program, in simulated time: no Ray is needed."""

import heapq
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pytest

from swarmx.agents.router import RouterAgent
from swarmx.compat.ray.chooser import Chooser, NoPlace, Sent
from swarmx.compat.ray.options import RoutingOptions
from swarmx.core.errors import ConfigError
from swarmx.runtime.journal import FileJournal, replay


class Hand:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.at_s = 1000.0

    def now_s(self) -> float:
        return self.at_s


class Places:
    """Serial places of different speed; `run` sends calls at fixed times and lets each place work in order."""

    def __init__(self, speeds: dict[str, float]) -> None:
        self.clock = Hand()
        self.speeds = speeds
        self.chooser = Chooser("m", RoutingOptions(), clock=self.clock)
        self.chooser.places(dict.fromkeys(speeds, 1))
        self.shares: Counter[str] = Counter()
        self.took_s: list[float] = []

    def run(self, calls: int, every_s: float, *, turns: bool = False) -> None:
        rng = np.random.default_rng(3)
        free_at = dict.fromkeys(self.speeds, self.clock.at_s)
        ends: list[tuple[float, int, Sent]] = []
        for number in range(calls):
            at_s = 1000.0 + number * every_s
            self._end(ends, at_s)
            self.clock.at_s = at_s
            size = int(rng.integers(1, 5))
            sent = self.chooser.send("work", size)
            place = list(self.speeds)[number % len(self.speeds)] if turns else sent.place
            self.shares[place] += 1
            end_s = free_at[place] = max(at_s, free_at[place]) + 2.0**size / 8.0 / self.speeds[place]
            self.took_s.append(end_s - at_s)
            heapq.heappush(ends, (end_s, number, sent))
        self._end(ends, float("inf"))

    def _end(self, ends: list[tuple[float, int, Sent]], until_s: float) -> None:
        while ends and ends[0][0] <= until_s:
            self.clock.at_s, _, sent = heapq.heappop(ends)
            self.chooser.ended(sent)


def test_speeds_and_durations_are_learnt_and_the_tail_is_shorter_than_with_turns() -> None:
    speeds = {"fast": 4.0, "usual": 1.0, "slow": 0.5}
    ours, turns = Places(speeds), Places(speeds)
    ours.run(600, 0.25)
    turns.run(600, 0.25, turns=True)
    assert ours.shares["fast"] > ours.shares["usual"] > ours.shares["slow"]
    assert np.quantile(ours.took_s[100:], 0.95) < 0.5 * np.quantile(turns.took_s[100:], 0.95)
    assert ours.chooser.in_flight() == dict.fromkeys(speeds, 0)
    assert ours.chooser.faults == 0


def test_a_place_that_is_gone_gets_no_call_and_without_any_there_is_none() -> None:
    places = Places({"a": 1.0, "b": 1.0})
    sent = [places.chooser.send("work", 1) for _ in range(4)]
    places.chooser.lost("a")
    assert {places.chooser.send("work", 1).place for _ in range(4)} == {"b"}
    for one in sent:
        places.chooser.ended(one)  # also those that were at the place that is gone
    places.chooser.places({})
    with pytest.raises(NoPlace):
        places.chooser.send("work", 1)
    assert places.chooser.faults == 0


def test_a_call_that_ends_twice_counts_once() -> None:
    places = Places({"a": 1.0})
    sent = places.chooser.send("work", 1)
    places.chooser.ended(sent, "rejected")
    places.chooser.ended(sent)
    assert places.chooser.in_flight() == {"a": 0}


def test_memory_does_not_grow_with_the_calls() -> None:
    places = Places({"a": 1.0, "b": 2.0})
    places.run(1500, 0.5)
    assert len(places.chooser._due) < 300
    assert not places.chooser._there


def test_what_was_decided_is_replayed(tmp_path: Path) -> None:
    options, clock = RoutingOptions(policy="power_of_two", seed=5), Hand()
    config = {RouterAgent.name: msgspec.to_builtins(Chooser.settings("m", options))}
    journal = FileJournal(tmp_path / "j.jsonl", config)
    chooser = Chooser("m", options, clock=clock, journal=journal)
    chooser.places({"a": 1, "b": 1})
    for _ in range(20):
        clock.at_s += 1.0
        chooser.ended(chooser.send("work", 3))
    journal.close()
    result = replay(journal.path)
    assert result.divergence is None
    assert result.decisions == 20


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((), {}, 0),
        ((True, None), {}, 0),
        ((5,), {}, 3),
        (("abcdefgh",), {}, 4),
        ((np.zeros(100),), {}, 10),
        ((float("nan"), float("inf")), {"x": -3.0}, 60),
        ((object(),), {"items": [1, 2, 3]}, 2),
    ],
)
def test_the_size_of_a_call_is_read_from_what_its_arguments_tell(
    args: tuple[object, ...], kwargs: dict[str, object], expected: int
) -> None:
    assert RoutingOptions().class_of(args, kwargs) == expected


def test_a_size_can_be_said_by_the_program() -> None:
    assert RoutingOptions(size=lambda text, steps: steps).class_of(("long text",), {"steps": 8}) == 4


def test_options_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="slots is 0"):
        RoutingOptions(slots=0)
    with pytest.raises(ConfigError, match="no_such"):
        RoutingOptions(policy="no_such")
