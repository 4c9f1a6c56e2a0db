from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.core.forecast import LEVELS, Forecast, from_samples, masses_of, point

values = st.lists(st.floats(0.0, 1e6), min_size=2, max_size=9).map(sorted)
# A thousandth apart at least: between neighbouring floats there is no level to interpolate at.
levels = st.lists(st.integers(1, 999), min_size=9, max_size=9, unique=True).map(lambda n: [i / 1000 for i in sorted(n)])


@st.composite
def forecasts(draw: st.DrawFn, *, distinct: bool = False) -> Forecast:
    if distinct:
        quantiles = list(itertools.accumulate(draw(st.lists(st.floats(0.1, 1e4), min_size=2, max_size=9))))
    else:
        quantiles = draw(values)
    return Forecast(
        levels=tuple(draw(levels)[: len(quantiles)]), quantiles=tuple(quantiles), unit="tokens", source="prior"
    )


@given(forecasts())
def test_the_mean_lies_between_the_outermost_quantiles(forecast: Forecast) -> None:
    slack = 1e-9 * (1.0 + forecast.quantiles[-1])
    assert forecast.quantiles[0] - slack <= forecast.mean <= forecast.quantiles[-1] + slack


@given(forecasts(distinct=True), st.floats(0.0, 1.0))
def test_cdf_undoes_quantile(forecast: Forecast, position: float) -> None:
    low, high = forecast.levels[0], forecast.levels[-1]
    level = low + (high - low) * position * 0.999
    assert forecast.cdf(forecast.quantile(level)) == pytest.approx(level, abs=1e-6)


@given(forecasts(), st.floats(0.0, 2e6), st.floats(0.0, 2e6))
def test_the_cdf_never_falls(forecast: Forecast, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert 0.0 <= forecast.cdf(low) <= forecast.cdf(high) <= 1.0


@given(forecasts(), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_quantiles_never_fall(forecast: Forecast, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert forecast.quantiles[0] <= forecast.quantile(low) <= forecast.quantile(high) <= forecast.quantiles[-1]


@given(forecasts(), st.floats(0.0, 1.0))
def test_produced_and_remaining_work_together_never_shrink(forecast: Forecast, share: float) -> None:
    """E[X | X > t] rises with t, and is at least t."""
    later = forecast.quantiles[-1] * 0.999 * share
    sooner = later * 0.5
    expected = [t + forecast.mean_remaining(t) for t in (0.0, sooner, later)]
    slack = 1e-6 * (1.0 + forecast.quantiles[-1])
    assert expected[0] - slack <= expected[1] <= expected[2] + slack
    assert expected[2] >= later - slack


@given(st.floats(1.0, 1e6), st.floats(0.0, 0.99), st.floats(0.0, 0.99))
def test_the_remaining_work_of_a_sure_forecast_shrinks_as_it_is_produced(work: float, a: float, b: float) -> None:
    low, high = sorted((a, b))
    forecast = point(work, unit="work")
    assert forecast.mean_remaining(low * work) == pytest.approx(work - low * work)
    assert forecast.mean_remaining(high * work) <= forecast.mean_remaining(low * work)


@given(forecasts())
def test_what_each_quantile_stands_for_adds_up_to_the_mean(forecast: Forecast) -> None:
    masses = masses_of(forecast.levels)
    assert float(masses.sum()) == pytest.approx(1.0)
    assert float(masses @ np.array(forecast.quantiles)) == pytest.approx(forecast.mean, rel=1e-9, abs=1e-9)


@given(forecasts())
def test_the_variance_is_that_of_the_distribution(forecast: Forecast) -> None:
    p, q = forecast.levels, forecast.quantiles
    second = p[0] * q[0] ** 2 + (1.0 - p[-1]) * q[-1] ** 2
    for (low_p, low), (high_p, high) in itertools.pairwise(zip(p, q, strict=True)):
        second += (high_p - low_p) * (low * low + low * high + high * high) / 3.0
    assert forecast.variance == pytest.approx(second - forecast.mean**2, rel=1e-6, abs=1e-9 * second)


def test_the_remaining_work_is_the_conditional_mean() -> None:
    uniform = Forecast(levels=(0.0001, 0.9999), quantiles=(0.0, 100.0), unit="tokens", source="prior")
    assert uniform.mean == pytest.approx(50.0, abs=0.1)
    assert uniform.mean_remaining(60.0) == pytest.approx(20.0, abs=0.1)


@given(forecasts(), st.floats(1.0, 100.0))
def test_a_call_that_runs_on_beyond_its_forecast_keeps_a_weight(forecast: Forecast, factor: float) -> None:
    assert forecast.mean_remaining(max(1.0, forecast.quantiles[-1]) * factor) >= 0.1


@pytest.mark.parametrize(
    ("levels", "quantiles"),
    [
        ((0.5,), (1.0,)),
        ((0.1, 0.9), (1.0,)),
        ((0.0, 0.9), (1.0, 2.0)),
        ((0.1, 1.0), (1.0, 2.0)),
        ((0.5, 0.5), (1.0, 2.0)),
        ((0.9, 0.1), (1.0, 2.0)),
        ((0.1, 0.9), (2.0, 1.0)),
        ((0.1, 0.9), (-1.0, 1.0)),
        ((0.1, 0.9), (1.0, math.inf)),
        ((0.1, 0.9), (math.nan, 1.0)),
        ((0.1, math.nan), (1.0, 1.0)),
    ],
)
def test_what_is_no_distribution_is_rejected(levels: tuple[float, ...], quantiles: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"levels|quantiles"):
        Forecast(levels=levels, quantiles=quantiles, unit="tokens", source="prior")


@given(st.lists(st.floats(0.0, 1e9), min_size=1, max_size=300))
def test_any_samples_make_a_forecast_within_their_range(samples: list[float]) -> None:
    forecast = from_samples(samples, unit="tokens")
    assert forecast.levels == LEVELS
    assert min(samples) <= forecast.quantiles[0] <= forecast.quantiles[-1] <= max(samples)


def test_the_quantiles_of_samples_are_those_between_their_order_statistics() -> None:
    forecast = from_samples([float(value) for value in range(101)], unit="tokens")
    assert forecast.quantiles == pytest.approx((5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0))


def test_no_samples_make_no_forecast() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        from_samples([], unit="tokens")


def test_a_point_is_sure() -> None:
    forecast = point(30.0, unit="work")
    assert (forecast.mean, forecast.quantile(0.01), forecast.quantile(0.99)) == (30.0, 30.0, 30.0)


@given(forecasts(distinct=True), st.floats(0.0, 2e6))
def test_given_what_was_produced_a_forecast_lies_beyond_it_and_stays_one(forecast: Forecast, produced: float) -> None:
    left = forecast.given(produced)
    assert left.levels == forecast.levels
    assert left.quantiles[0] >= min(produced, forecast.quantiles[0])
    assert all(a <= b for a, b in itertools.pairwise(left.quantiles))
    if produced < forecast.quantiles[0]:
        assert left == forecast


@given(forecasts(distinct=True), st.floats(0.0, 0.9), st.floats(0.0, 0.9))
def test_given_more_every_quantile_is_later(forecast: Forecast, low: float, high: float) -> None:
    a, b = (forecast.given(forecast.quantile(level)) for level in sorted((low, high)))
    assert all(x <= y * (1.0 + 1e-9) for x, y in zip(a.quantiles, b.quantiles, strict=True))
