"""Scores of forecasts by label."""

from __future__ import annotations

import numpy as np
import pytest

from swarmx.core.forecast import LEVELS
from swarmx.neural.scores import FEWEST, OTHER, score_set, scores_of


def rows(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Uniform outcomes, and the true quantiles of their distribution in every row."""
    target = np.random.default_rng(0).permutation(np.linspace(0.0, 100.0, count))
    return target, np.tile(100.0 * np.array(LEVELS), (count, 1))


def test_the_true_quantiles_are_covered_as_their_levels_say() -> None:
    found = scores_of(*rows(2001), LEVELS)
    assert found.coverage == pytest.approx({"0.5": 0.5, "0.8": 0.8, "0.9": 0.9, "0.99": 0.99}, abs=1e-3)
    assert found.kendall_tau is None, "a forecast that is always the same ranks nothing"


def test_medians_that_rise_with_the_outcomes_have_a_tau_of_one() -> None:
    target, quantiles = rows(50)
    assert scores_of(target, quantiles + target[:, None], LEVELS).kendall_tau == pytest.approx(1.0)


def test_labels_with_few_rows_are_scored_together_and_no_row_is_lost() -> None:
    target, quantiles = rows(100)
    models = np.array(["often"] * (100 - FEWEST) + [f"rare{i}" for i in range(FEWEST)])
    parts = score_set("s", "a", target, quantiles, LEVELS, {"model": models}).by["model"]
    assert {name: scores.rows for name, scores in parts.items()} == {"often": 100 - FEWEST, OTHER: FEWEST}


def test_one_row_has_scores() -> None:
    found = scores_of(np.array([5.0]), np.full((1, len(LEVELS)), 5.0), LEVELS)
    assert (found.rows, found.pinball, found.kendall_tau) == (1, 0.0, None)
