"""Buckets of tokens: one minute deep, refilled evenly, exact about when a call will fit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.agents.budgets import Budgets
from swarmx.agents.router_settings import TenantSettings


def budgets(per_minute: float = 600.0) -> Budgets:
    return Budgets({"t": TenantSettings(tokens_per_minute=per_minute), "free": TenantSettings()})


def test_a_tenant_without_a_bound_may_take_anything() -> None:
    assert budgets().take("free", 1e12, 0.0) is None
    assert budgets().take("unheard-of", 1e12, 0.0) is None


def test_a_minutes_tokens_may_be_taken_at_once_and_then_the_time_is_told() -> None:
    found = budgets(600.0)
    assert found.take("t", 600.0, 0.0) is None
    over = found.take("t", 30.0, 0.0)
    assert over is not None
    assert (over.budget, over.used, over.retry_after_s) == (600.0, 600.0, pytest.approx(3.0))


def test_a_call_that_ends_short_gives_back_and_one_that_ran_on_takes_more() -> None:
    found = budgets(600.0)
    assert found.take("t", 600.0, 0.0) is None
    found.correct("t", -100.0, 0.0)
    assert found.take("t", 100.0, 0.0) is None
    found.correct("t", 50.0, 0.0)
    over = found.take("t", 10.0, 0.0)
    assert over is not None
    assert over.retry_after_s == pytest.approx(6.0)


def test_nothing_is_saved_up_beyond_a_minute() -> None:
    found = budgets(600.0)
    assert found.take("t", 0.0, 1000.0) is None
    found.correct("t", -500.0, 1000.0)
    assert found.take("t", 600.0, 1000.0) is None
    assert found.take("t", 1.0, 1000.0) is not None


def test_a_call_larger_than_a_minutes_tokens_needs_a_full_bucket() -> None:
    found = budgets(600.0)
    assert found.take("t", 60.0, 0.0) is None
    over = found.take("t", 6000.0, 0.0)
    assert over is not None
    assert over.retry_after_s == pytest.approx(6.0)
    assert found.take("t", 6000.0, 6.0) is None
    late = found.take("t", 1.0, 6.0)
    assert late is not None
    assert late.retry_after_s == pytest.approx((5400.0 + 1.0) / 10.0)


def test_calls_that_are_refused_together_come_back_one_after_the_other() -> None:
    found = budgets(600.0)
    assert found.take("t", 600.0, 0.0) is None
    told = [found.take("t", 100.0, 0.0) for _ in range(4)]
    assert [over.retry_after_s for over in told if over is not None] == pytest.approx([10.0, 20.0, 30.0, 40.0])
    assert [found.take("t", 100.0, at_s) for at_s in (10.0, 20.0, 30.0, 40.0)] == [None] * 4


def test_a_large_call_is_not_starved_by_small_ones_that_always_fit() -> None:
    found, now_s, back_at_s = budgets(600.0), 0.0, 0.0
    assert found.take("t", 600.0, 0.0) is None
    while now_s < 130.0:
        now_s += 2.0
        found.take("t", 20.0, now_s)  # all that flows in
        if now_s >= back_at_s:
            if (over := found.take("t", 500.0, now_s, "large")) is None:
                break
            back_at_s = now_s + over.retry_after_s
    assert now_s < 110.0
    assert found.take("t", 20.0, now_s + 2.0) is None


def test_a_call_that_does_not_come_back_is_waited_for_no_longer_than_a_minute() -> None:
    found = budgets(600.0)
    assert found.take("t", 600.0, 0.0) is None
    over = found.take("t", 590.0, 0.0, "gone")
    assert over is not None
    assert over.retry_after_s == pytest.approx(59.0)
    small = found.take("t", 100.0, 60.0)  # the bucket never holds both
    assert small is not None
    assert small.retry_after_s == pytest.approx(59.0)
    assert found.take("t", 100.0, 119.0) is None


def test_a_call_that_comes_back_with_another_forecast_is_still_the_one_that_was_promised() -> None:
    found = budgets(600.0)
    assert found.take("t", 600.0, 0.0) is None
    assert found.take("t", 590.0, 0.0, "c") is not None
    assert found.take("t", 50.0, 59.0, "c") is None
    assert found.take("t", 100.0, 59.0, "other") is None


def test_nobody_is_sent_away_for_long_because_many_were() -> None:
    found = budgets(600.0)
    assert found.take("t", 600.0, 0.0) is None
    told = [found.take("t", 100.0, 0.0) for _ in range(1000)]
    assert max(over.retry_after_s for over in told if over is not None) == pytest.approx(70.0)


@given(
    calls=st.lists(st.tuples(st.floats(0.0, 5.0), st.floats(1.0, 2000.0), st.floats(0.0, 3.0)), min_size=1, max_size=60)
)
def test_what_comes_back_when_it_was_told_to_is_let_in(calls: list[tuple[float, float, float]]) -> None:
    found, now_s = budgets(600.0), 0.0
    for pause_s, expected, factor in calls:
        now_s += pause_s
        over = found.take("t", expected, now_s)
        if over is not None:
            assert over.retry_after_s > 0.0
            now_s += over.retry_after_s
            assert found.take("t", expected, now_s) is None
        found.correct("t", expected * (factor - 1.0), now_s)


@given(asked=st.lists(st.tuples(st.floats(0.0, 30.0), st.floats(1.0, 900.0)), min_size=1, max_size=100))
def test_no_more_is_taken_than_one_full_bucket_and_what_flowed_in(asked: list[tuple[float, float]]) -> None:
    found, now_s, taken = budgets(600.0), 0.0, 0.0
    for pause_s, tokens in asked:
        now_s += pause_s
        if found.take("t", min(tokens, 600.0), now_s) is None:
            taken += min(tokens, 600.0)
    assert taken <= 600.0 + now_s * 10.0 + 1e-3
