"""Three scores, weighed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.agents.policies.llmd_load import LlmdLoad
from tests.contract.test_policies import a_call_view, a_fleet


def choose(*, prompt: int = 1000, seed: int = 0, **columns: Any) -> int:
    fleet = a_fleet(max(len(value) for value in columns.values()), **columns)
    return LlmdLoad().choose(a_call_view(prompt_tokens=prompt), fleet, np.random.default_rng(seed)).index


@pytest.mark.parametrize(("cached", "chosen"), [(670.0, 0), (660.0, 1)])
def test_two_thirds_of_the_prompt_weigh_as_much_as_the_whole_queue(cached: float, chosen: int) -> None:
    columns: dict[str, Any] = {"cached_tokens": [cached, 0.0], "waiting": [7.0, 0.0], "kv_usage": [0.5, 0.5]}
    assert choose(**columns) == chosen


def test_the_kv_cache_in_use_counts_as_much_as_the_queue() -> None:
    assert choose(waiting=[4.0, 0.0], kv_usage=[0.0, 1.0]) in {0, 1}
    assert choose(waiting=[4.0, 0.0], kv_usage=[0.0, 0.99]) == 1


def test_an_engine_that_never_spoke_counts_as_idle() -> None:
    assert choose(waiting=[1.0, np.nan], kv_usage=[0.1, np.nan]) == 1


def test_when_no_engine_spoke_the_cache_decides_and_then_chance() -> None:
    assert choose(cached_tokens=[0.0, 10.0]) == 1
    assert {choose(cached_tokens=[0.0, 0.0, 0.0], seed=seed) for seed in range(40)} == {0, 1, 2}


@given(
    rows=st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 50), st.floats(0.0, 1.0)), min_size=1, max_size=20),
    seed=st.integers(0, 1000),
)
def test_no_candidate_that_is_better_in_all_three_is_passed_over(rows: list[tuple[int, int, float]], seed: int) -> None:
    cached, waiting, kv_usage = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    index = choose(cached_tokens=cached, waiting=waiting, kv_usage=kv_usage, seed=seed)
    better = (cached > cached[index]) & (waiting < waiting[index]) & (kv_usage <= kv_usage[index])
    assert not better.any()
