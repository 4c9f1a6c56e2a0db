"""The longest match in a balanced fleet, the shortest queue in another."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.agents.policies.sglang_cache_aware import SglangCacheAware
from tests.contract.test_policies import a_call_view, a_fleet

POLICY = SglangCacheAware()


def choose(in_flight: list[int], cached: list[float], *, prompt: int = 1000, seed: int = 0) -> int:
    fleet = a_fleet(len(in_flight), in_flight=in_flight, cached_tokens=cached)
    return POLICY.choose(a_call_view(prompt_tokens=prompt), fleet, np.random.default_rng(seed)).index


@pytest.mark.parametrize(("in_flight", "chosen"), [([64, 0], 0), ([65, 0], 1)])
def test_it_leaves_the_cache_exactly_above_the_absolute_threshold(in_flight: list[int], chosen: int) -> None:
    assert choose(in_flight, [900.0, 0.0]) == chosen


@pytest.mark.parametrize(("in_flight", "chosen"), [([300, 200], 0), ([301, 200], 1)])
def test_it_leaves_the_cache_exactly_above_the_relative_threshold(in_flight: list[int], chosen: int) -> None:
    assert choose(in_flight, [900.0, 0.0]) == chosen


@pytest.mark.parametrize(("cached", "chosen"), [(301.0, 0), (300.0, 1)])
def test_a_match_counts_only_above_its_threshold(cached: float, chosen: int) -> None:
    assert choose([5, 1], [cached, 0.0]) == chosen


def test_of_equal_matches_the_less_loaded_is_taken() -> None:
    assert choose([5, 3, 0], [800.0, 800.0, 700.0]) == 1


def test_an_empty_prompt_goes_to_the_fewest_calls() -> None:
    assert choose([5, 1], [0.0, 0.0], prompt=0) == 1


@given(
    rows=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 1000)), min_size=1, max_size=30),
    seed=st.integers(0, 1000),
)
def test_it_is_the_longest_match_or_the_shortest_queue(rows: list[tuple[int, int]], seed: int) -> None:
    in_flight, cached = [n for n, _ in rows], [float(c) for _, c in rows]
    index = choose(in_flight, cached, seed=seed)
    unbalanced = max(in_flight) - min(in_flight) > 64 and max(in_flight) > 1.5 * min(in_flight)
    if unbalanced or max(cached) <= 300:
        assert in_flight[index] == min(in_flight)
    else:
        assert cached[index] == max(cached)
