from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from swarmx.core.errors import PredictorError
from swarmx.core.forecast import LEVELS
from swarmx.neural.refit import RefitSettings, _parts, _quantiles, _through_steps, refit, weighted_loss
from tests.neural.heads import a_head, a_table


def test_a_refit_follows_lengths_that_have_tripled() -> None:
    head, table = a_head(shifts={"": np.full(len(LEVELS), 0.05, dtype=np.float32)}), a_table(rows=600, factor=3.0)
    better = refit(head, table)
    fresh = a_table(rows=600, factor=3.0, seed=9)
    assert weighted_loss(better, fresh) < 0.4 * weighted_loss(head, fresh)
    q = better.log_quantiles(fresh.features, fresh.anchor)
    covered = float(np.mean(np.log(fresh.target + 1.0) <= q[:, LEVELS.index(0.9)]))
    assert covered == pytest.approx(0.9, abs=0.06)


def test_the_same_data_gives_the_same_weights() -> None:
    first, second = (refit(a_head(), a_table(rows=200, factor=2.0)) for _ in range(2))
    assert all(np.array_equal(a.out, b.out) for a, b in zip(first.nets, second.nets, strict=True))


def test_a_head_that_fits_already_is_hardly_moved() -> None:
    head = refit(a_head(), a_table(rows=600, factor=1.0))
    fresh = a_table(rows=600, factor=1.0, seed=9)
    assert weighted_loss(head, fresh) < 1.05 * weighted_loss(a_head(), fresh)


def test_the_hidden_layer_stays_as_it_is() -> None:
    before, after = a_head(), refit(a_head(), a_table(rows=200, factor=2.0))
    assert np.array_equal(before.nets[0].hidden, after.nets[0].hidden)


def test_censored_rows_pull_upwards_only() -> None:
    table = a_table(rows=400, factor=1.0)
    cut = replace(table, target=table.target / 50.0, censored=table.split == "train")
    head = refit(a_head(), cut, RefitSettings(steps=50))
    middle = LEVELS.index(0.5)
    before = a_head().log_quantiles(table.features, table.anchor)[:, middle].mean()
    assert head.log_quantiles(table.features, table.anchor)[:, middle].mean() >= before - 0.05


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(PredictorError, match="at least 32 rows"):
        refit(a_head(), a_table(rows=20, factor=1.0))


def test_quantiles_are_those_of_the_network() -> None:
    head, table = a_head(), a_table(rows=50, factor=1.0)
    (net,) = head.nets
    x = head.standardised(table.features)
    out, skip, bias = _parts(net)
    z = np.maximum(x @ net.hidden + net.hidden_bias, 0.0) @ out + x @ skip + bias
    assert np.allclose(_quantiles(z, net.middle), net(x), atol=1e-4)


def test_the_gradient_is_that_of_finite_differences() -> None:
    rng = np.random.default_rng(0)
    z, slope, middle = rng.normal(size=(1, 8)), rng.normal(size=(1, 8)), 3
    gradient = _through_steps(z, middle, slope)
    for k in range(8):
        moved = z.copy()
        moved[0, k] += 1e-6
        numeric = float(((_quantiles(moved, middle) - _quantiles(z, middle)) * slope).sum() / 1e-6)
        assert gradient[0, k] == pytest.approx(numeric, abs=1e-4)
