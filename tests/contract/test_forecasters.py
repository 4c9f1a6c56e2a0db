"""What every forecaster has to keep to: finite, monotone, within the call's own limit; and it learns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.core.forecast import LEVELS, Forecast
from swarmx.core.nouns import Call
from swarmx.core.ports import Forecaster
from swarmx.neural.empirical import EmpiricalForecaster
from swarmx.neural.forecaster import NeuralForecaster
from swarmx.neural.leader import FollowTheLeader
from swarmx.neural.tracking import QuantileTracker
from tests.agents.worlds import PROMPT, a_call

FORECASTERS: dict[str, Callable[[], Forecaster]] = {
    "empirical": EmpiricalForecaster,
    "neural": lambda: NeuralForecaster.load(None, QuantileTracker(LEVELS), FollowTheLeader(LEVELS)),
}
EVERY = pytest.mark.parametrize("make", FORECASTERS.values(), ids=FORECASTERS.keys())


def ask(forecaster: Forecaster, call: Call) -> Forecast:
    return forecaster.forecast(call, forecaster.encode(call, PROMPT))


def learn(forecaster: Forecaster, call: Call, work_done: float) -> None:
    forecaster.observe(call, forecaster.encode(call, PROMPT), work_done)


@EVERY
@given(
    seen=st.lists(st.floats(0.0, 1e6), max_size=40),
    limit=st.floats(1.0, 1e6),
)
def test_a_forecast_is_finite_and_monotone_and_within_the_limit(
    make: Callable[[], Forecaster], seen: list[float], limit: float
) -> None:
    forecaster = make()
    for work_done in seen:
        learn(forecaster, a_call("c"), work_done)
    forecast = ask(forecaster, a_call("c", work_limit=limit))
    assert all(math.isfinite(q) and 0.0 <= q <= limit for q in forecast.quantiles)
    assert all(a <= b for a, b in itertools.pairwise(forecast.quantiles))
    assert math.isfinite(forecast.mean)


@EVERY
def test_a_forecaster_learns_what_a_role_produces(make: Callable[[], Forecaster]) -> None:
    forecaster, rng = make(), np.random.default_rng(0)
    for _ in range(200):
        learn(forecaster, a_call("c", role="planner", work_limit=4000.0), float(rng.normal(300.0, 10.0)))
        learn(forecaster, a_call("c", role="writer", work_limit=4000.0), float(rng.normal(2000.0, 50.0)))
    planner = ask(forecaster, a_call("c", role="planner", work_limit=4000.0))
    writer = ask(forecaster, a_call("c", role="writer", work_limit=4000.0))
    assert planner.quantile(0.5) == pytest.approx(300.0, rel=0.05)
    assert writer.quantile(0.5) == pytest.approx(2000.0, rel=0.05)


def test_plain_statistics_of_names_that_clients_make_up_stay_bounded() -> None:
    forecaster = EmpiricalForecaster(limit=50)
    for i in range(500):
        learn(forecaster, a_call("c", role=f"r{i}"), 10.0)
    assert len(forecaster._seen) == 50
    assert len(forecaster._fresh) <= 50


@EVERY
@pytest.mark.parametrize("nonsense", [math.nan, math.inf, -1.0])
def test_an_observation_that_is_no_amount_of_work_spoils_nothing(
    make: Callable[[], Forecaster], nonsense: float
) -> None:
    forecaster, spared = make(), make()
    for _ in range(20):
        learn(forecaster, a_call("c"), nonsense)
        learn(forecaster, a_call("c"), 50.0)
        learn(spared, a_call("c"), 50.0)
    assert ask(forecaster, a_call("c")) == ask(spared, a_call("c"))
    assert ask(forecaster, a_call("c")).quantile(0.5) == pytest.approx(50.0, rel=0.05)


@EVERY
def test_the_work_of_an_image_is_known_from_its_request(make: Callable[[], Forecaster]) -> None:
    forecaster = make()
    learn(forecaster, a_call("c", kind="image", work_limit=20.0), 20.0)
    forecast = ask(forecaster, a_call("c", kind="image", work_limit=30.0))
    assert (forecast.mean, forecast.unit) == (30.0, "work")


def observed(*, role: str, model: str, times: int, work_done: float) -> EmpiricalForecaster:
    forecaster = EmpiricalForecaster()
    for _ in range(times):
        learn(forecaster, a_call("c", role=role, model=model), work_done)
    return forecaster


def test_a_new_role_is_forecast_like_its_model() -> None:
    forecaster = observed(role="planner", model="m", times=20, work_done=77.0)
    assert ask(forecaster, a_call("c", role="unseen", model="m")).mean == pytest.approx(77.0)


def test_a_new_model_gets_the_prior() -> None:
    forecaster = observed(role="planner", model="m", times=20, work_done=77.0)
    assert ask(forecaster, a_call("c", role="planner", model="unseen")).source == "prior"


def test_fewer_than_eight_calls_are_not_enough_to_learn_from() -> None:
    assert ask(observed(role="r", model="m", times=7, work_done=77.0), a_call("c", role="r")).source == "prior"
    assert ask(observed(role="r", model="m", times=8, work_done=77.0), a_call("c", role="r")).source == "empirical"


def test_old_calls_are_forgotten() -> None:
    forecaster = observed(role="r", model="m", times=300, work_done=10.0)
    for _ in range(256):
        learn(forecaster, a_call("c", role="r"), 400.0)
    assert ask(forecaster, a_call("c", role="r")).mean == pytest.approx(400.0)


def test_the_work_of_a_tool_are_seconds_that_its_uses_teach() -> None:
    forecaster = EmpiricalForecaster()
    use = a_call("c", kind="tool", role="grep", model="tools", work_limit=30.0)
    prior = ask(forecaster, use)
    assert (prior.unit, prior.source, prior.quantile(0.99)) == ("s", "prior", 30.0)
    assert prior.quantile(0.05) < 0.1, "it may be over at once"
    for _ in range(8):
        learn(forecaster, use, 2.0)
    learned = ask(forecaster, use)
    assert (learned.unit, learned.source, learned.mean) == ("s", "empirical", 2.0)
    assert ask(forecaster, a_call("c", kind="tool", role="grep", model="tools", work_limit=0.5)).mean == 0.5
