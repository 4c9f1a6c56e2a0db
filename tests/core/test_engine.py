from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.core.engine import EngineProfile, profiles
from tests.agents.worlds import FAST

KEYS = sorted(profiles())


def test_profiles_are_found_under_their_own_names() -> None:
    assert len(KEYS) > 10
    assert all((profile.model, profile.device) == key for key, profile in profiles().items())


@pytest.mark.parametrize("key", KEYS, ids="-".join)
def test_every_shipped_profile_is_of_this_world(key: tuple[str, str]) -> None:
    profile = profiles()[key]
    times = [getattr(profile, name) for name in profile.__struct_fields__ if name.endswith("_s")]
    assert all(0.0 <= value < 60.0 for value in times)
    assert profile.step_base_s > 0.0
    assert profile.max_batch >= 1
    assert profile.kv_capacity_tokens > 0
    assert profile.cost_weight > 0.0


def test_a_step_is_the_sum_of_its_parts() -> None:
    profile = EngineProfile(
        model="m",
        device="d",
        step_base_s=1.0,
        decode_seq_s=0.1,
        decode_ctx_token_s=0.01,
        prefill_token_s=0.001,
        prefill_ctx_token_s=0.0001,
    )
    assert profile.step_s(2, 3, 4, 5) == pytest.approx(1.0 + 0.2 + 0.03 + 0.004 + 0.0005)


@given(steps=st.integers(0, 200), seqs=st.integers(0, 64), context=st.integers(0, 10_000))
def test_many_steps_take_as_long_as_each_after_the_other(steps: int, seqs: int, context: int) -> None:
    one_by_one = sum(FAST.step_s(seqs, context + seqs * i) for i in range(steps))
    assert FAST.steps_s(steps, seqs, context) == pytest.approx(one_by_one)


@given(prompt=st.integers(1, 4000), output=st.integers(1, 500))
def test_a_call_alone_takes_its_prefill_and_then_step_after_step(prompt: int, output: int) -> None:
    prefill = FAST.step_s(0, 0, prompt, prompt * prompt / 2)
    decode = FAST.steps_s(output - 1, 1, prompt + 1)
    assert FAST.alone_s(prompt, output) == pytest.approx(FAST.call_base_s + prefill + decode, rel=1e-3)


@given(factor=st.floats(0.01, 100.0))
def test_an_engine_so_many_times_faster_takes_that_much_less(factor: float) -> None:
    assert FAST.scaled(factor).alone_s(1000, 100) == pytest.approx(FAST.alone_s(1000, 100) / factor)
    assert FAST.scaled(factor).kv_capacity_tokens == FAST.kv_capacity_tokens


@pytest.mark.parametrize("factor", [0.0, -1.0])
def test_an_engine_cannot_run_at_no_speed(factor: float) -> None:
    with pytest.raises(ValueError, match="cannot run"):
        FAST.scaled(factor)
