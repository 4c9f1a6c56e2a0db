"""The least predicted latency, where the prompt is cached if bearable."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmx.agents.policies.llmd_predicted import LlmdPredicted, features, predict, steps_s
from swarmx.core.engine import EngineProfile, profiles
from swarmx.core.fleet import FleetView
from swarmx.core.forecast import point
from tests.contract.test_policies import a_call_view, a_fleet

H100 = profiles()["llama-3.1-8b", "h100"]
L40S = profiles()["llama-3.1-8b", "l40s"]
COLUMNS = ("call_base_s", "step_base_s", "decode_seq_s", "decode_ctx_token_s", "prefill_token_s",
           "prefill_ctx_token_s", "kv_capacity_tokens", "max_batch")  # fmt: skip
SURE = {"explore": 0.0, "idle_first": 0.0}


def fleet_of(*devices: EngineProfile, **columns: Any) -> FleetView:
    known = {name: [getattr(profile, name) for profile in devices] for name in COLUMNS}
    return a_fleet(len(devices), **(known | columns))


def choose(fleet: FleetView, *, prompt: int = 1000, work: float = 200.0, seed: int = 0, **parameters: float) -> int:
    call = a_call_view(point(work, unit="tokens"), prompt_tokens=prompt)
    return LlmdPredicted(**(SURE | parameters)).choose(call, fleet, np.random.default_rng(seed)).index


@pytest.mark.parametrize("e2e", [0.0, 1.0])
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_the_faster_of_two_idle_devices_wins(e2e: float, mean: float) -> None:
    assert choose(fleet_of(L40S, H100), e2e=e2e, mean=mean) == 1


def test_the_less_loaded_of_two_equal_devices_wins() -> None:
    fleet = fleet_of(H100, H100, in_flight=[60, 5], context_tokens=[90_000.0, 7_000.0], prefill_tokens=[20_000.0, 0.0])
    assert choose(fleet) == 1


@pytest.mark.parametrize("device", [H100, L40S, profiles()["llama-3.1-70b-fp8", "h100"]])
def test_the_latency_of_an_idle_engine_is_predicted_within_a_third(device: EngineProfile) -> None:
    ttft_s, tpot_s = predict(a_call_view(prompt_tokens=1000), fleet_of(device), "mean")
    truth_s = device.call_base_s + device.step_s(0, 0.0, 1000, 1000 * 1000 / 2.0)
    assert ttft_s == pytest.approx([truth_s], rel=0.33)
    assert tpot_s == pytest.approx([device.step_s(1, 1100.0)], rel=0.33)


def test_a_device_twice_as_fast_takes_half_the_time() -> None:
    ttft_s, tpot_s = predict(a_call_view(prompt_tokens=500), fleet_of(H100, H100.scaled(2.0), in_flight=3), "p90")
    assert ttft_s[0] == pytest.approx(2.0 * ttft_s[1])
    assert tpot_s[0] == pytest.approx(2.0 * tpot_s[1])


def test_a_cached_prompt_keeps_its_calls_while_the_wait_is_bearable() -> None:
    """A backlog of 100,000 tokens takes 1.7 s."""
    busy = {
        "in_flight": [60, 0],
        "context_tokens": [9e4, 0.0],
        "cached_tokens": [900.0, 0.0],
        "prefill_tokens": [1e5, 0],
    }
    fleet = fleet_of(H100, H100, **busy)
    assert choose(fleet) == 0
    assert choose(fleet, penalty_s=0.2) == 1
    assert choose(fleet, affinity=0.95) == 1
    assert choose(fleet, explore=1.0) == 1


def test_idle_candidates_go_first_as_in_llmd_even_when_they_are_slower() -> None:
    fleet = fleet_of(L40S, H100, in_flight=[0, 1], context_tokens=[0.0, 500.0])
    assert choose(fleet, idle_first=1.0) == 0
    assert choose(fleet, idle_first=0.0) == 1


def test_weighted_picking_spreads_and_prefers_the_better() -> None:
    fleet = fleet_of(H100, H100, L40S, in_flight=[2, 10, 30], context_tokens=[1e3, 1e4, 4e4])
    counts = np.bincount([choose(fleet, weighted=1.0, seed=seed) for seed in range(100)], minlength=3)
    assert counts[0] > counts[2]
    assert counts[1] > 0


@settings(max_examples=30, deadline=None)
@given(prompt=st.integers(0, 100_000), cached=st.floats(0.0, 2e5), in_flight=st.integers(0, 500))
def test_features_are_finite_and_as_the_words_say(prompt: int, cached: float, in_flight: int) -> None:
    fleet = fleet_of(H100, cached_tokens=cached, in_flight=in_flight)
    row = features(prompt, fleet)[0]
    assert np.isfinite(row).all()
    assert row[0] + row[1] == in_flight
    assert 0.0 <= row[4] <= 1.0
    assert steps_s(fleet)[0] > 0.0
