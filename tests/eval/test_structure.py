"""The structure head against its baselines, on sessions small enough to know the answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from eval.structure import structure_rows
from eval.structure_baselines import Samples, Smoothing, best_smoothing, constant, empirical
from swarmx.core.forecast import LEVELS
from tests.neural.structures import counted_sessions, sessions_file


def samples(lengths: list[int], *, kind: int = 0, domain: int = 0) -> Samples:
    step = np.concatenate([np.arange(n + 1) for n in lengths])
    rest = np.concatenate([n - np.arange(n + 1.0) for n in lengths])
    return Samples(step, np.full(len(step), kind), np.full(len(step), domain), rest)


def both(a: Samples, b: Samples) -> Samples:
    return Samples(*(np.concatenate(pair) for pair in zip(a, b, strict=True)))


def test_the_empirical_baseline_knows_kind_and_steps() -> None:
    train = both(samples([5] * 20, kind=0), samples([9] * 20, kind=1))
    exact = Smoothing("kind", 0, 4)
    assert np.allclose(empirical(train, samples([5]), exact)[:, LEVELS.index(0.5)], [5, 4, 3, 2, 1, 0])
    assert np.allclose(empirical(train, samples([9], kind=1), exact)[3], 6.0)


def test_a_kind_without_experience_is_taken_like_its_domain_and_then_like_all() -> None:
    train = both(samples([5] * 20, kind=0, domain=0), samples([9] * 20, kind=1, domain=1))
    asked = samples([9], kind=7, domain=1)
    assert np.allclose(empirical(train, asked, Smoothing("kind", 0, 4))[0], 9.0)
    nobody = samples([9], kind=7, domain=7)
    assert empirical(train, nobody, Smoothing("kind", 0, 4))[0, 0] == pytest.approx(5.0)
    assert empirical(train, nobody, Smoothing("kind", 0, 4))[0, -1] == pytest.approx(9.0)


def test_the_constant_baseline_does_not_look_at_the_steps() -> None:
    quantiles = constant(samples([5] * 20), samples([5]))
    assert np.ptp(quantiles, axis=0).max() == 0.0


def test_validation_chooses_the_smoothing() -> None:
    train = samples([8] * 3)
    validation = samples([8] * 5)
    assert best_smoothing(train, validation, [Smoothing("kind", 5, 4), Smoothing("kind", 0, 2)]).window == 0


def test_the_comparison_makes_rows_and_claims(tmp_path: Path) -> None:
    steps = counted_sessions(60) + counted_sessions(40, seed=1, dataset="bank")
    rows, claims = structure_rows(sessions_file(tmp_path, steps), [0], quick=True)
    methods = {row["method"] for row in rows if row["experiment"] == "structure"}
    assert {"swarmx", "global", "per_kind", "empirical_kind_steps", "linear_quantile", "lightgbm"} <= methods
    assert {made.name for made in claims} == {
        "structure_pinball_vs_best",
        "structure_pinball_vs_best@empirical",
        "structure_pinball_vs_best@unseen_kind",
        "structure_pinball_vs_best@empirical-unseen_kind",
    }
    by_name = {made.name: made.value for made in claims}
    assert by_name["structure_pinball_vs_best@empirical"] < 0.8  # the prompts tell the length here, the steps do not
