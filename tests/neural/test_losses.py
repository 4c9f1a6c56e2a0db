"""Scores of quantile forecasts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau

from swarmx.neural.losses import coverage, crps, kendall_tau, pinball


def test_pinball_punishes_what_lies_on_the_wrong_side() -> None:
    loss = pinball(np.array([10.0]), np.array([[8.0, 12.0]]), (0.5, 0.9))
    assert loss[0].tolist() == pytest.approx([0.5 * 2.0, 0.1 * 2.0])


def test_the_true_quantiles_score_best() -> None:
    rng = np.random.default_rng(0)
    y, levels = rng.normal(size=20_000), (0.1, 0.5, 0.9)
    true = np.quantile(y, levels)
    best = pinball(y, np.tile(true, (len(y), 1)), levels).mean()
    for moved in (true + 0.2, true - 0.2, true * 1.3, true * 0.7):
        assert pinball(y, np.tile(moved, (len(y), 1)), levels).mean() > best
        assert crps(y, np.tile(moved, (len(y), 1)), levels).mean() > crps(y, np.tile(true, (len(y), 1)), levels).mean()


def test_coverage_is_the_share_at_or_below_also_between_levels() -> None:
    y = np.arange(1.0, 101.0)
    q = np.tile([50.0, 90.0], (100, 1))
    assert coverage(y, q, (0.5, 0.9), 0.9) == 0.9
    assert coverage(y, q, (0.5, 0.9), 0.7) == 0.7
    assert np.isnan(coverage(y[:0], q[:0], (0.5, 0.9), 0.5))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=60))
def test_rank_correlation_is_that_of_scipy(pairs: list[tuple[int, int]]) -> None:
    a, b = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    assert kendall_tau(a, b) == pytest.approx(kendalltau(a, b).statistic, nan_ok=True)
