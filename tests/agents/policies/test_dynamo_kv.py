"""Blocks to prefill and blocks to hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.agents.policies.dynamo_kv import DynamoKv
from tests.contract.test_policies import a_call_view, a_fleet


def choose(policy: DynamoKv, *, prompt: int = 640, seed: int = 0, **columns: Any) -> int:
    fleet = a_fleet(max(len(value) for value in columns.values()), **columns)
    return policy.choose(a_call_view(prompt_tokens=prompt), fleet, np.random.default_rng(seed)).index


def test_the_example_of_the_documentation_comes_out_as_it_says() -> None:
    # a prompt of 10 blocks; 2, 5 and 8 of them cached, 10, 5 and 9 blocks active: costs 18, 10 and 11
    columns: dict[str, Any] = {"cached_tokens": [128.0, 320.0, 512.0], "context_tokens": [640.0, 320.0, 576.0]}
    assert choose(DynamoKv(), **columns) == 1


@pytest.mark.parametrize(("held", "chosen"), [(639.0, 0), (641.0, 1)])
def test_a_cached_block_is_worth_an_active_one(held: float, chosen: int) -> None:
    assert choose(DynamoKv(), cached_tokens=[640.0, 0.0], context_tokens=[held, 0.0]) == chosen


def test_a_backlog_of_prompts_counts_and_by_its_scale() -> None:
    columns: dict[str, Any] = {"unread_tokens": [640.0, 0.0], "context_tokens": [0.0, 1000.0]}
    assert choose(DynamoKv(), **columns) == 0
    assert choose(DynamoKv(prefill_load_scale=2.0), **columns) == 1


def test_without_credit_the_cache_is_not_looked_at() -> None:
    assert choose(DynamoKv(overlap_score_credit=0.0), cached_tokens=[640.0, 0.0], context_tokens=[1.0, 0.0]) == 1


def test_the_credit_decays_with_the_backlog_above_the_least() -> None:
    columns: dict[str, Any] = {"cached_tokens": [640.0, 0.0], "unread_tokens": [500.0, 0.0]}
    assert choose(DynamoKv(), **columns) == 0  # 500 against 640
    assert choose(DynamoKv(overlap_score_credit_decay=1.0), **columns) == 1  # 500 + 640 - 359 against 640


def test_calls_in_flight_cost_what_their_weight_says() -> None:
    columns: dict[str, Any] = {"in_flight": [3, 0], "context_tokens": [0.0, 128.0]}
    assert choose(DynamoKv(), **columns) == 0
    assert choose(DynamoKv(decode_active_request_weight=1.0), **columns) == 1


def test_a_higher_temperature_spreads_the_calls() -> None:
    columns: dict[str, Any] = {"context_tokens": [0.0, 640.0, 6400.0]}
    shares = [
        np.bincount([choose(DynamoKv(router_temperature=t), seed=s, **columns) for s in range(500)], minlength=3)
        for t in (0.0, 0.2, 5.0)
    ]
    assert shares[0][0] == 500
    assert 500 > shares[1][0] > shares[2][0] > 100
    assert shares[2][2] > shares[1][2]


def test_equal_costs_are_drawn_with_and_without_temperature() -> None:
    for policy in (DynamoKv(), DynamoKv(router_temperature=0.5)):
        assert {choose(policy, context_tokens=[5.0, 5.0, 5.0], seed=seed) for seed in range(50)} == {0, 1, 2}


@given(
    rows=st.lists(
        st.tuples(st.integers(0, 10**5), st.integers(0, 10**5), st.integers(0, 2000)), min_size=1, max_size=20
    ),
    seed=st.integers(0, 1000),
)
def test_no_candidate_has_fewer_blocks_to_work_and_to_hold(rows: list[tuple[int, int, int]], seed: int) -> None:
    held, backlog, cached = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    index = choose(DynamoKv(), context_tokens=held, unread_tokens=backlog, cached_tokens=cached, seed=seed)
    tokens = backlog + np.maximum(0.0, 640.0 - cached) + held
    assert tokens[index] <= tokens.min() + 1e-6
