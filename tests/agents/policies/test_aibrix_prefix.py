"""The longest prefix among those that are not too busy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.agents.policies.aibrix_prefix import AibrixPrefix
from tests.contract.test_policies import a_call_view, a_fleet


def choose(in_flight: list[int], cached: list[float], *, seed: int = 0, **parameters: float) -> int:
    fleet = a_fleet(len(in_flight), in_flight=in_flight, cached_tokens=cached)
    policy = AibrixPrefix(**parameters)
    return policy.choose(a_call_view(prompt_tokens=1000), fleet, np.random.default_rng(seed)).index


@pytest.mark.parametrize(("in_flight", "chosen"), [([9, 1, 9, 9], 0), ([10, 1, 10, 10], 1)])
def test_it_leaves_the_cache_exactly_above_the_imbalance(in_flight: list[int], chosen: int) -> None:
    assert choose(in_flight, [900.0, 0.0, 0.0, 0.0]) == chosen


def test_out_of_balance_the_longest_prefix_among_the_least_loaded_is_taken() -> None:
    assert choose([30, 0, 0], [1000.0, 100.0, 200.0]) == 2


@pytest.mark.parametrize(("deviations", "chosen"), [(1.4, 1), (1.6, 0)])
def test_a_holder_that_is_too_many_deviations_busier_is_passed_over(deviations: float, chosen: int) -> None:
    # the mean is 1 and the deviation 2: four calls are 1.5 deviations above
    assert choose([4, 0, 0, 0], [900.0, 300.0, 0.0, 0.0], deviations=deviations) == chosen


def test_whole_percentages_are_compared_and_then_the_calls_in_flight() -> None:
    assert choose([3, 2, 2], [909.0, 900.0, 0.0]) == 1
    assert choose([3, 2, 2], [910.0, 900.0, 0.0], deviations=2.0) == 0


@given(in_flight=st.lists(st.integers(0, 50), min_size=1, max_size=20), seed=st.integers(0, 1000))
def test_without_any_match_it_is_least_outstanding(in_flight: list[int], seed: int) -> None:
    index = choose(in_flight, [0.0] * len(in_flight), seed=seed)
    assert in_flight[index] == min(in_flight)


@given(
    rows=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 1000)), min_size=2, max_size=20),
    seed=st.integers(0, 1000),
)
def test_the_chosen_is_never_far_busier_than_the_mean(rows: list[tuple[int, int]], seed: int) -> None:
    in_flight, cached = [n for n, _ in rows], [float(c) for _, c in rows]
    index = choose(in_flight, cached, seed=seed)
    assert in_flight[index] <= np.mean(in_flight) + np.std(in_flight, ddof=1) + 1e-9
