"""Virtual token counters: service in proportion to weight among those that wait, and nothing saved up by idling."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.agents import shares as module
from swarmx.agents.shares import Shares


def test_a_tenant_with_twice_the_weight_is_charged_half() -> None:
    shares = Shares({"big": 2.0})
    shares.charge("big", 100.0)
    shares.charge("small", 100.0)
    assert (shares.counter("big"), shares.counter("small")) == (50.0, 100.0)


def test_prompt_and_output_tokens_have_their_weights() -> None:
    assert Shares(prompt_token_weight=0.5, output_token_weight=3.0).weighed(10, 4) == 17.0


def test_a_tenant_that_was_idle_is_lifted_to_the_least_of_those_that_wait() -> None:
    shares = Shares()
    shares.charge("a", 500.0)
    shares.charge("b", 300.0)
    shares.joins("late", ["a", "b"])
    assert shares.counter("late") == 300.0
    shares.joins("a", ["b"])
    assert shares.counter("a") == 500.0


def test_where_nobody_waits_a_tenant_is_lifted_to_the_one_that_was_served_last() -> None:
    shares = Shares()
    shares.charge("a", 500.0)
    shares.joins("late", [])
    assert shares.counter("late") == 500.0


def test_a_correction_never_makes_a_debt_of_the_service() -> None:
    shares = Shares()
    shares.charge("a", 100.0)
    shares.correct("a", -250.0)
    assert shares.counter("a") == 0.0


def test_only_so_many_tenants_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_TENANTS", 3)
    shares = Shares()
    for number in range(10):
        shares.charge(f"t{number}", 1.0)
    assert len(shares) == 3


@given(
    weights=st.dictionaries(st.sampled_from("abcd"), st.sampled_from([0.5, 1.0, 2.0, 4.0]), min_size=2),
    sizes=st.lists(st.floats(1.0, 1000.0), min_size=20, max_size=20),
)
def test_tenants_that_always_wait_stay_within_one_call_of_their_shares(
    weights: dict[str, float], sizes: list[float]
) -> None:
    shares = Shares(weights)
    for i in range(200):
        served = min(weights, key=lambda tenant: (shares.counter(tenant), tenant))
        shares.charge(served, sizes[i % len(sizes)])
    counters = [shares.counter(tenant) for tenant in weights]
    assert max(counters) - min(counters) <= max(sizes) / min(weights.values())
