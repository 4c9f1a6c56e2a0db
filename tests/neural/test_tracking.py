from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from swarmx.core.forecast import LEVELS
from swarmx.neural.head import Floats
from swarmx.neural.tracking import QuantileTracker, TrackerSettings

Z = np.array([-1.645, -1.2816, -0.6745, 0.0, 0.6745, 1.2816, 1.645, 2.3263])
HIGH = LEVELS.index(0.9)
SPREAD = 0.4


def said(rng: np.random.Generator) -> Floats:
    """What a calibrated head says of log y, which is normal around something between 4 and 6."""
    return rng.uniform(4.0, 6.0) + SPREAD * Z


class Stream:
    """Outcomes of one (class, device): what the head says, and what comes, moved and stretched."""

    def __init__(self, tracker: QuantileTracker, *, seed: int = 0, key: tuple[str, str] = ("chat", "h100")) -> None:
        self.tracker, self.key = tracker, key
        self.rng = np.random.default_rng(seed)

    def run(self, count: int, *, shift: float = 0.0, stretch: float = 1.0) -> float:
        """Feeds so many outcomes; returns the coverage of the corrected 90 % quantile."""
        covered = 0
        for _ in range(count):
            q = said(self.rng)
            y = float(q[3] + shift + stretch * SPREAD * self.rng.normal())
            covered += y <= self.tracker.correct(*self.key, q)[HIGH]
            self.tracker.observe(*self.key, q, y)
        return covered / count


def a_tracker(**about: float) -> QuantileTracker:
    return QuantileTracker(LEVELS, TrackerSettings(**about))  # type: ignore[arg-type]


def test_before_the_first_outcome_nothing_is_corrected() -> None:
    q = 5.0 + SPREAD * Z
    assert np.array_equal(a_tracker().correct("chat", "h100", q), q)


@pytest.mark.parametrize("shift", [math.log(3.0), -math.log(3.0), math.log(1.0 / 0.29)])
def test_a_shift_is_followed_within_forty_observations(shift: float) -> None:
    covered = []
    for seed in range(10):
        stream = Stream(a_tracker(), seed=seed)
        stream.run(200)
        stream.run(40, shift=shift)
        covered.append(stream.run(50, shift=shift))
        assert stream.tracker.shift(*stream.key) == pytest.approx(shift, abs=0.2)
    assert np.mean(covered) == pytest.approx(0.9, abs=0.04)


def test_a_wider_spread_is_followed() -> None:
    covered = []
    for seed in range(10):
        stream = Stream(a_tracker(), seed=seed)
        stream.run(200)
        stream.run(150, stretch=2.0)
        covered.append(stream.run(100, stretch=2.0))
    assert np.mean(covered) == pytest.approx(0.9, abs=0.04)


def test_forecasts_that_are_right_are_hardly_touched() -> None:
    for seed in range(5):
        stream = Stream(a_tracker(), seed=seed)
        covered = stream.run(600)
        assert covered == pytest.approx(0.9, abs=0.04)
        assert abs(stream.tracker.shift(*stream.key)) < SPREAD / 2.0


def test_a_correction_that_is_no_longer_needed_fades() -> None:
    stream = Stream(a_tracker())
    stream.run(200, shift=1.0)
    stream.run(300)
    assert abs(stream.tracker.shift(*stream.key)) < 0.1


def test_a_young_device_follows_its_class_and_a_young_class_its_device() -> None:
    tracker = a_tracker()
    for i, device in enumerate(("h100", "l40s")):
        Stream(tracker, seed=i, key=("chat", device)).run(100, shift=1.0)
    assert tracker.shift("chat", "unseen") == pytest.approx(1.0, abs=0.15)
    tracker = a_tracker()
    for i, prompt_class in enumerate(("chat", "code")):
        Stream(tracker, seed=i, key=(prompt_class, "slow")).run(100, shift=1.0)
        Stream(tracker, seed=9 + i, key=(prompt_class, "h100")).run(100)
    assert tracker.shift("unseen", "slow") == pytest.approx(1.0, abs=0.15)


def test_a_class_that_drifts_leaves_the_others_alone() -> None:
    tracker = a_tracker()
    drifting, steady = Stream(tracker, key=("chat", "")), Stream(tracker, seed=1, key=("code", ""))
    for _ in range(200):
        drifting.run(1)
        steady.run(1)
    covered = []
    for _ in range(200):
        drifting.run(1, shift=1.0)
        covered.append(steady.run(1))
    assert np.mean(covered) == pytest.approx(0.9, abs=0.05)
    assert abs(tracker.shift("code", "")) < 0.1


def test_after_a_reset_nothing_is_corrected() -> None:
    stream = Stream(a_tracker())
    stream.run(50, shift=1.0)
    stream.tracker.reset()
    assert (stream.tracker.keys, stream.tracker.shift(*stream.key)) == (0, 0.0)


def test_numbers_that_are_not_finite_are_not_learnt_from() -> None:
    tracker, q = a_tracker(), 5.0 + SPREAD * Z
    for y in (math.nan, math.inf, -math.inf):
        tracker.observe("chat", "", q, y)
    tracker.observe("chat", "", np.full(len(LEVELS), math.nan), 5.0)
    assert tracker.keys == 0


def test_one_absurd_outcome_moves_little() -> None:
    stream = Stream(a_tracker())
    stream.run(100)
    before = stream.tracker.correct(*stream.key, 5.0 + SPREAD * Z)
    stream.tracker.observe(*stream.key, 5.0 + SPREAD * Z, 30.0)
    after = stream.tracker.correct(*stream.key, 5.0 + SPREAD * Z)
    assert np.abs(after - before).max() < 0.15


FINITE = st.floats(-40.0, 40.0)
OUTCOMES = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c", ""]),
        st.sampled_from(["", "x", "y", "z"]),
        arrays(np.float64, len(LEVELS), elements=FINITE).map(np.sort),
        FINITE,
    ),
    max_size=60,
)


@given(OUTCOMES)
def test_whatever_comes_quantiles_rise_are_finite_and_keys_are_bounded(
    outcomes: list[tuple[str, str, Floats, float]],
) -> None:
    tracker, twin = a_tracker(most_keys=5, alarm=3.0), a_tracker(most_keys=5, alarm=3.0)
    for prompt_class, device, q, y in outcomes:
        corrected = tracker.correct(prompt_class, device, q)
        assert np.isfinite(corrected).all()
        assert (np.diff(corrected) >= 0.0).all()
        assert np.array_equal(corrected, twin.correct(prompt_class, device, q))
        for each in (tracker, twin):
            each.observe(prompt_class, device, q, y)
        assert tracker.keys <= 5
