"""Sticky until saturated."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.agents.policies.llmd_sticky import LlmdSticky
from tests.contract.test_policies import a_call_view, a_fleet

# 8192 tokens of an iteration take 0.8192 s: 10,000 tokens are a second
ENGINE: dict[str, Any] = {"max_step_tokens": 8192, "step_base_s": 0.0, "prefill_token_s": 1e-4}


def choose(policy: LlmdSticky, *, prompt: int = 1000, seed: int = 0, **columns: Any) -> int:
    fleet = a_fleet(max(len(np.atleast_1d(value)) for value in columns.values()), **(ENGINE | columns))
    return policy.choose(a_call_view(prompt_tokens=prompt), fleet, np.random.default_rng(seed)).index


@pytest.mark.parametrize(("backlog", "chosen"), [(179_999.0, 0), (180_001.0, 1)])
def test_it_sticks_exactly_until_the_backlog_takes_longer_than_it_may(backlog: float, chosen: int) -> None:
    assert choose(LlmdSticky(), cached_tokens=[900.0, 0.0], unread_tokens=[backlog, 0.0]) == chosen


def test_without_a_limit_it_sticks_for_ever() -> None:
    policy = LlmdSticky(max_ttft_penalty_s=0.0)
    assert choose(policy, cached_tokens=[900.0, 0.0], unread_tokens=[1e9, 0.0]) == 0


@pytest.mark.parametrize(("cached", "chosen"), [(800.0, 0), (799.0, 1)])
def test_a_replica_is_sticky_from_its_threshold_on(cached: float, chosen: int) -> None:
    assert choose(LlmdSticky(), cached_tokens=[cached, 0.0], unread_tokens=[5000.0, 0.0]) == chosen


def test_of_several_sticky_ones_the_least_uncached_tokens_win() -> None:
    columns: dict[str, Any] = {"cached_tokens": [1000.0, 850.0, 0.0], "unread_tokens": [200.0, 0.0, 0.0]}
    assert choose(LlmdSticky(), **columns) == 1
    assert choose(LlmdSticky(), **(columns | {"unread_tokens": [149.0, 0.0, 0.0]})) == 0


def test_without_sticky_ones_a_partial_hit_counts_against_the_backlog() -> None:
    assert choose(LlmdSticky(), cached_tokens=[500.0, 0.0], unread_tokens=[499.0, 0.0]) == 0
    assert choose(LlmdSticky(), cached_tokens=[500.0, 0.0], unread_tokens=[501.0, 0.0]) == 1


def test_a_slow_device_is_saturated_sooner() -> None:
    columns: dict[str, Any] = {"cached_tokens": [900.0, 0.0], "unread_tokens": [50_000.0, 0.0]}
    assert choose(LlmdSticky(), **columns) == 0
    assert choose(LlmdSticky(), **columns, prefill_token_s=[5e-4, 1e-4]) == 1


def test_calls_in_flight_count_when_they_are_charged() -> None:
    columns: dict[str, Any] = {"in_flight": [9, 0], "unread_tokens": [0.0, 500.0]}
    assert choose(LlmdSticky(), **columns) == 0
    assert choose(LlmdSticky(call_tokens=1e6), **columns) == 1


def test_a_call_without_a_prompt_goes_to_the_fewest_in_flight() -> None:
    assert choose(LlmdSticky(), prompt=0, in_flight=[2, 1, 3]) == 1


@given(
    rows=st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 10**6)), min_size=1, max_size=20),
    seed=st.integers(0, 1000),
)
def test_a_cold_replica_is_never_taken_while_a_warm_one_is_not_saturated(
    rows: list[tuple[int, int]], seed: int
) -> None:
    cached, backlog = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    warm = cached >= 800.0
    index = choose(LlmdSticky(), cached_tokens=cached, unread_tokens=backlog, seed=seed)
    lag = backlog[warm].min() - backlog[~warm].min() if warm.any() and not warm.all() else 0.0
    load = backlog + 1000.0 - cached
    if warm.any() and lag < 180_000.0 - 1e-3:
        assert warm[index]
        assert load[index] == load[warm].min()
    elif not warm.any() or lag > 180_000.0 + 1e-3:
        assert load[index] == load.min()
