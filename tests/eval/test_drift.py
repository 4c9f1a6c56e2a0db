from __future__ import annotations

import numpy as np
import pytest

from eval.drift import AIM_S, LEVEL, RATE, Arm, Drift, Seen, recovery_s, run_one, stream, summary
from eval.drift_grounds import Ground
from tests.neural.heads import a_head, a_table

KEY, OTHER = ("toy", "slowed"), ("toy", "steady")


def a_drift(factor: float) -> Drift:
    ground = Ground(head=a_head(), rows=a_table(rows=3000, factor=1.0), train=a_table(rows=500, factor=1.0, seed=2))
    return Drift(name="toy", ground=ground, changes={KEY: lambda y: y + np.log(factor)}, others=[OTHER])


def seen(covered: np.ndarray) -> Seen:
    at_s = (np.arange(len(covered)) - len(covered) // 3) / RATE
    return Seen(at_s=at_s, covered=covered.astype(np.float64), loss=np.zeros(len(covered)), swaps=0)


def test_the_same_seed_gives_the_same_stream_and_only_the_drifting_key_changes() -> None:
    calm, changed = stream(a_drift(1.0), 3), stream(a_drift(3.0), 3)
    assert np.array_equal(calm.row, changed.row)
    moved = changed.log_y - calm.log_y
    late = np.array([key == KEY for key in calm.key]) & (calm.at_s >= 0.0)
    assert moved[late] == pytest.approx(np.log(3.0))
    assert np.all(moved[~late] == 0.0)


def test_a_frozen_head_does_not_recover_and_tracking_does() -> None:
    drift = a_drift(3.0)
    frozen = [run_one("frozen", drift, seed, 1.0) for seed in range(2)]
    assert recovery_s(frozen, 200) == float("inf")
    arms: tuple[Arm, ...] = ("tracking", "tracking+leader")
    for arm in arms:
        row = summary(drift, arm, [run_one(arm, drift, seed, 1.0) for seed in range(2)])
        assert abs(float(row["coverage_201_to_400"]) - LEVEL) < 0.04
        assert float(row["loss_after"]) < 0.5 * float(summary(drift, "frozen", frozen)["loss_after"])


def test_retraining_is_asked_for_and_used() -> None:
    assert run_one("paper", a_drift(3.0), 0, 0.1).swaps >= 1
    assert run_one("tracking+leader+retrain", a_drift(3.0), 0, 0.1).swaps >= 1


def test_recovery_is_when_coverage_comes_back_for_good() -> None:
    rng = np.random.default_rng(0)
    runs = []
    for _ in range(200):
        covered = rng.random(1600) < LEVEL
        covered[533:573] = False  # ten seconds of misses after the drift
        runs.append(seen(covered))
    assert 30.0 < recovery_s(runs, 200) <= AIM_S  # when the last miss has left the window
    assert recovery_s([seen(np.ones(1600))], 200) == float("inf")
