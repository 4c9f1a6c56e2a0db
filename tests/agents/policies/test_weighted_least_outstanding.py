"""Calls in flight, weighed by the device's speed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.agents.policies.least_outstanding import LeastOutstanding
from swarmx.agents.policies.speed_edf import SpeedEdf
from swarmx.agents.policies.weighted_least_outstanding import WeightedLeastOutstanding, typical_step_s
from swarmx.core.engine import EngineProfile
from tests.contract.test_policies import a_call_view, a_fleet

SEEDS = range(40)
BOTH = pytest.mark.parametrize("policy", [WeightedLeastOutstanding(), SpeedEdf()], ids=lambda p: p.name)


def chosen(policy: Any, *, seeds: range = SEEDS, **columns: Any) -> set[int]:
    replicas = max(len(value) for value in columns.values())
    fleet = a_fleet(replicas, **columns)
    return {policy.choose(a_call_view(), fleet, np.random.default_rng(seed)).index for seed in seeds}


@BOTH
def test_of_two_idle_replicas_the_faster_one_is_taken(policy: Any) -> None:
    assert chosen(policy, step_base_s=[0.02, 0.01]) == {1}


@BOTH
def test_a_device_three_times_as_fast_takes_three_calls_to_one(policy: Any) -> None:
    speeds: dict[str, Any] = {"step_base_s": [0.01, 0.03], "decode_seq_s": [0.0, 0.0]}
    assert chosen(policy, in_flight=[1, 0], **speeds) == {0}
    assert chosen(policy, in_flight=[2, 0], **speeds) == {0, 1}
    assert chosen(policy, in_flight=[3, 0], **speeds) == {1}


@BOTH
@given(in_flight=st.lists(st.integers(0, 9), min_size=1, max_size=30), seed=st.integers(0, 1000))
def test_on_equal_devices_it_is_least_outstanding(policy: Any, in_flight: list[int], seed: int) -> None:
    fleet = a_fleet(len(in_flight), in_flight=in_flight)
    index = policy.choose(a_call_view(), fleet, np.random.default_rng(seed)).index
    assert index == LeastOutstanding().choose(a_call_view(), fleet, np.random.default_rng(seed)).index


def test_the_speed_is_that_of_the_step_model_under_a_typical_load() -> None:
    profile = EngineProfile(
        model="m",
        device="d",
        step_base_s=0.02,
        decode_seq_s=1e-4,
        decode_ctx_token_s=1e-7,
        prefill_token_s=5e-5,
    )
    names = ("step_base_s", "decode_seq_s", "decode_ctx_token_s", "prefill_token_s")
    fleet = a_fleet(1, **{name: getattr(profile, name) for name in names})
    assert typical_step_s(fleet, 16, 2000, 4)[0] == pytest.approx(profile.step_s(16, 32_000, 64))


def test_the_typical_batch_is_never_larger_than_the_engine_takes() -> None:
    fleet = a_fleet(2, max_batch=[1, 256], step_base_s=0.1, decode_seq_s=0.01)
    np.testing.assert_allclose(typical_step_s(fleet, 16, 2000, 4), [0.11, 0.26])


def test_reading_prompts_counts_by_its_share() -> None:
    slow_reader: dict[str, Any] = {"step_base_s": [0.010, 0.011], "prefill_token_s": [1e-3, 1e-5]}
    assert chosen(WeightedLeastOutstanding(prompt_per_output=0.0), **slow_reader) == {0}
    assert chosen(WeightedLeastOutstanding(prompt_per_output=4.0), **slow_reader) == {1}


def test_calls_wait_by_deadline_under_speed_edf_alone() -> None:
    assert (WeightedLeastOutstanding().order, SpeedEdf().order) == ("arrival", "deadline")
    assert not SpeedEdf().waits
