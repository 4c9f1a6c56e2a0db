"""Exploit a long prefix, explore otherwise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.agents.policies.preble import Preble
from swarmx.core.fleet import Choice
from tests.contract.test_policies import a_call_view, a_fleet


def choice(*, seed: int = 0, rebalance: float = 1.5, **columns: Any) -> Choice:
    usual: dict[str, Any] = {"step_base_s": 0.01, "decode_seq_s": 0.0, "prefill_token_s": 1e-3}
    fleet = a_fleet(max(len(np.atleast_1d(value)) for value in columns.values()), **(usual | columns))
    return Preble(rebalance=rebalance).choose(a_call_view(prompt_tokens=1000), fleet, np.random.default_rng(seed))


@pytest.mark.parametrize(("cached", "chosen"), [(501.0, 0), (499.0, 1)])
def test_it_exploits_a_prefix_that_is_longer_than_the_rest(cached: float, chosen: int) -> None:
    found = choice(cached_tokens=[cached, 0.0], remaining_work=[160.0, 109.0])
    assert found.cost_s is not None
    assert found.cost_s[0] > found.cost_s[1]
    assert found.index == chosen


def test_exploring_weighs_the_uncached_prompt_with_the_load() -> None:
    assert choice(cached_tokens=[400.0, 0.0], remaining_work=[39.0, 0.0]).index == 0
    assert choice(cached_tokens=[400.0, 0.0], remaining_work=[41.0, 0.0]).index == 1


def test_of_several_holders_the_least_loaded_is_taken() -> None:
    assert choice(cached_tokens=[900.0, 900.0, 0.0], remaining_work=[10.0, 5.0, 0.0]).index == 1


@pytest.mark.parametrize(("left", "chosen"), [(149.0, 0), (199.0, 0), (201.0, 1)])
def test_a_holder_is_relieved_only_if_it_stays_the_busier_one(left: float, chosen: int) -> None:
    # the other one would have 1 s of work and 1 s of prompt: 2 s are 200 tokens of the holder
    assert choice(cached_tokens=[900.0, 0.0], remaining_work=[left, 100.0]).index == chosen


def test_a_large_rebalance_keeps_every_prefix_where_it_is() -> None:
    assert choice(cached_tokens=[900.0, 0.0], remaining_work=[1e6, 1.0], rebalance=1e9).index == 0


@given(
    rows=st.lists(st.tuples(st.integers(0, 500), st.integers(0, 1000)), min_size=1, max_size=20),
    seed=st.integers(0, 1000),
)
def test_without_a_long_prefix_the_least_cost_is_taken(rows: list[tuple[int, int]], seed: int) -> None:
    cached, left = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    found = choice(cached_tokens=cached, remaining_work=left, seed=seed)
    assert found.cost_s is not None
    assert found.cost_s[found.index] == found.cost_s.min()
    np.testing.assert_allclose(found.cost_s, left * 0.01 + (1000.0 - cached) * 1e-3)
