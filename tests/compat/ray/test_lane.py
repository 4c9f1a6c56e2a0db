"""Service times read from when calls are sent and end."""

import pytest

from swarmx.compat.ray.lane import Lane
from swarmx.compat.ray.speeds import Speeds


def test_a_call_that_waits_is_worked_on_from_the_end_of_the_one_before() -> None:
    lane = Lane(1)
    lane.sent("a", 0.0)
    lane.sent("b", 1.0)
    assert lane.ended("a", 5.0) == 5.0
    assert lane.ended("b", 7.0) == 2.0
    assert len(lane) == 0


def test_as_many_run_as_there_are_slots() -> None:
    lane = Lane(2)
    for name in "abc":
        lane.sent(name, 0.0)
    assert lane.ended("b", 3.0) == 3.0
    assert lane.ended("c", 4.0) == 1.0
    assert lane.ended("a", 4.0) == 4.0


def test_an_end_out_of_turn_tells_no_time() -> None:
    lane = Lane(1)
    lane.sent("a", 0.0)
    lane.sent("b", 0.0)
    assert lane.ended("b", 1.0) is None
    assert lane.ended("a", 2.0) == 2.0


def test_speeds_are_factors_of_an_average_and_the_unknown_counts_as_the_fastest() -> None:
    speeds = Speeds()
    assert speeds.factor("a") == 1.0
    for _ in range(60):
        speeds.observe("a", 1.0, 2.0)
        speeds.observe("b", 8.0, 2.0)
    assert speeds.factor("b") / speeds.factor("a") == pytest.approx(8.0, rel=0.05)
    assert speeds.factor("new") == speeds.factor("a")
    speeds.forget("a")
    assert speeds.factor("new") == speeds.factor("b")


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_numbers_that_cannot_be_are_not_learnt_from(seconds: float) -> None:
    speeds = Speeds()
    for _ in range(5):
        speeds.observe("a", seconds, 1.0)
        speeds.observe("a", 1.0, seconds)
    assert speeds.factor("a") == 1.0
