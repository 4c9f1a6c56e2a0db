"""What every scaling policy has to keep to, and the sentence that is true of each."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmx.agents.scaling import (
    DEFAULT_SCALING_POLICY,
    SCALING_POLICIES,
    describe_scaling,
    make_scaling_policy,
    scaling_parameters_of,
)
from swarmx.core.engine import EngineProfile
from swarmx.core.errors import ConfigError
from swarmx.core.scaling import ScaleView
from tests.agents.worlds import a_profile

EVERY = pytest.mark.parametrize("name", SCALING_POLICIES)
SERIAL = EngineProfile(model="image", device="d", step_base_s=0.25, call_base_s=1.0, max_batch=1)


def a_view(**about: Any) -> ScaleView:
    """An idle model; work is in tokens of 10 ms each, whatever the batch."""
    idle = {field.name: 0 for field in dataclasses.fields(ScaleView)}
    flat = a_profile(step_base_s=0.01, decode_seq_s=0.0, decode_ctx_token_s=0.0, call_base_s=0.0, max_batch=64)
    return ScaleView(**idle | {"model": "m", "horizon_s": 10.0, "work_per_call": 100.0, "profile": flat} | about)


numbers = st.floats(0.0, 1e9) | st.sampled_from([0.0, 1e12])
views = st.builds(
    ScaleView,
    model=st.just("m"),
    now_s=numbers,
    horizon_s=st.floats(0.1, 1e6),
    in_flight=st.integers(0, 10**9),
    waiting=st.integers(0, 10**9),
    work_left=numbers,
    work_per_call=numbers,
    arrivals_per_s=numbers,
    burst_per_s=numbers,
    upcoming_mean=numbers,
    upcoming_p90=numbers,
    fresh_mean=numbers,
    capacity=numbers,
    profile=st.sampled_from([a_profile(), a_profile(max_batch=1), SERIAL]),
)


@EVERY
@settings(max_examples=100, deadline=None)
@given(view=views)
def test_any_view_gets_a_sound_target_and_the_same_one_again(name: str, view: ScaleView) -> None:
    target = make_scaling_policy(name).target(view)
    assert math.isfinite(target.replicas)
    assert target.replicas >= 0.0
    assert all(math.isfinite(value) for value in target.terms.values())
    assert make_scaling_policy(name).target(view) == target


@EVERY
def test_parameters_are_the_fields_of_a_frozen_dataclass(name: str) -> None:
    policy = make_scaling_policy(name)
    assert dataclasses.is_dataclass(policy)
    assert policy.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert scaling_parameters_of(name) == {f.name: getattr(policy, f.name) for f in dataclasses.fields(policy)}
    assert make_scaling_policy(name, scaling_parameters_of(name)) == policy


@EVERY
def test_a_policy_knows_its_name_and_says_in_a_line_what_it_does(name: str) -> None:
    assert make_scaling_policy(name).name == name
    assert describe_scaling(name).endswith(".")


@EVERY
def test_an_unknown_parameter_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match=f"scaling policy '{name}' has no parameter 'psychic'"):
        make_scaling_policy(name, {"psychic": 1.0})


@pytest.mark.parametrize(
    ("name", "parameter"), [(name, parameter) for name in SCALING_POLICIES for parameter in scaling_parameters_of(name)]
)
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_a_parameter_out_of_range_is_an_error_that_names_it(name: str, parameter: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{parameter} is {value!r}, expected a number from"):
        make_scaling_policy(name, {parameter: value})


def test_an_unknown_policy_or_parameter_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown scaling policy 'statik'.*Did you mean 'static'\?"):
        make_scaling_policy("statik")
    with pytest.raises(ConfigError, match=r"Did you mean 'target_in_flight'\?"):
        make_scaling_policy("target_tracking", {"target_inflight": 2.0})


def test_the_default_policy_exists() -> None:
    assert DEFAULT_SCALING_POLICY in SCALING_POLICIES


def wanted(name: str, view: ScaleView, **parameters: float) -> float:
    return make_scaling_policy(name, parameters).target(view).replicas


@pytest.mark.parametrize(("capacity", "calls"), [(0.0, 500), (2.5, 0), (3.0, 500)])
def test_static_wants_what_is_there(capacity: float, calls: int) -> None:
    assert wanted("static", a_view(capacity=capacity, in_flight=calls)) == capacity


def test_target_tracking_divides_the_calls_that_are_here_by_its_target() -> None:
    assert wanted("target_tracking", a_view(in_flight=20, waiting=12), target_in_flight=8.0) == 4.0


@pytest.mark.parametrize("name", ["target_tracking", "demand_forecast"])
def test_a_serial_server_holds_one_call(name: str) -> None:
    assert wanted(name, a_view(in_flight=3, waiting=2, work_left=500.0, profile=SERIAL)) == 5.0


@settings(max_examples=100, deadline=None)
@given(view=views)
def test_the_forecast_never_wants_less_than_what_is_here_now_needs(view: ScaleView) -> None:
    assert wanted("demand_forecast", view) >= wanted("target_tracking", view) * (1.0 - 1e-12)


@pytest.mark.parametrize("part", ["upcoming", "fresh"])
def test_calls_within_the_horizon_count_for_the_share_of_it_that_they_last(part: str) -> None:
    calls = {"upcoming_mean": 80.0, "upcoming_p90": 80.0} if part == "upcoming" else {"fresh_mean": 80.0}
    assert wanted("demand_forecast", a_view(**calls), target_in_flight=8.0) == pytest.approx(1.0)  # 1 s of 10 s
    longer = a_view(**calls, work_per_call=2000.0)
    assert wanted("demand_forecast", longer, target_in_flight=8.0) == pytest.approx(10.0)


def test_the_forecast_adds_what_is_left_and_what_comes_and_says_which_is_which() -> None:
    view = a_view(in_flight=40, work_left=2000.0, upcoming_mean=400.0, upcoming_p90=400.0, fresh_mean=80.0)
    target = make_scaling_policy("demand_forecast", {"target_in_flight": 8.0}).target(view)
    assert target.terms == pytest.approx(
        {
            "now_replicas": 5.0,
            "backlog_replicas": 0.25,
            "upcoming_replicas": 5.0,
            "fresh_replicas": 1.0,
            "calls_a_replica": 8.0,
            "call_s": 1.0,
        }
    )
    assert target.replicas == pytest.approx(6.25)


def test_the_tail_weight_goes_from_the_mean_to_the_p90() -> None:
    view = a_view(upcoming_mean=100.0, upcoming_p90=200.0)
    by_weight = [wanted("demand_forecast", view, target_in_flight=1.0, tail_weight=w) for w in (0.0, 0.5, 1.0)]
    assert by_weight == pytest.approx([10.0, 15.0, 20.0])


def test_a_backlog_is_no_more_than_the_calls_that_make_it_up() -> None:
    view = a_view(in_flight=8, work_left=1e9)
    assert wanted("demand_forecast", view, target_in_flight=8.0) == pytest.approx(1.0)
