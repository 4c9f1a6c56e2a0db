"""When a call is refused at once, and the time that it is told to come back after."""

from __future__ import annotations

import numpy as np
import pytest

from swarmx.agents.admission import Punctuality, Refusal, ServiceRate, over_budget, overload, too_late
from swarmx.agents.budgets import OverBudget
from swarmx.agents.calls import CallState, WaitingCalls
from swarmx.core.fleet import Choice
from swarmx.core.forecast import Forecast, point
from tests.agents.worlds import a_call

WIDE = Forecast(levels=(0.1, 0.9), quantiles=(50.0, 150.0), unit="tokens", source="prior")  # a mean of 100


def a_past(*ratios: float) -> Punctuality:
    """Calls that were expected to take a second took so many of them, over and over."""
    past = Punctuality()
    for number in range(128):
        ratio = ratios[number % len(ratios)]
        past.took(CallState(call=a_call("p"), forecast=WIDE, attempt=1, foreseen_s=1.0), ratio)
    return past


def a_state(*, due_s: float | None = 100.0, ready_s: float = 0.0, forecast: Forecast = WIDE) -> CallState:
    return CallState(call=a_call("c", deadline_at_s=due_s), forecast=forecast, ready_at_s=ready_s)


def late(state: CallState, choice: Choice, now_s: float, past: Punctuality | None = None) -> Refusal | None:
    """Whether it is refused, where calls take what policies expect."""
    return too_late(state, choice, past or a_past(1.0), now_s)


def in_parts(wait_s: list[float], prefill_s: list[float], decode_s: list[float], chosen: int = 0) -> Choice:
    terms = {"wait_s": np.array(wait_s), "prefill_s": np.array(prefill_s), "decode_s": np.array(decode_s)}
    cost_s = sum(terms.values())
    return Choice(index=chosen, expected_s=float(cost_s[chosen]), cost_s=cost_s, terms_s=terms)


def test_a_rate_is_work_a_second_and_fades() -> None:
    rate = ServiceRate()
    assert rate.per_s(10.0) == 0.0
    for second in range(1, 601):
        rate.ended(50.0, float(second))
    assert rate.per_s(600.0) == pytest.approx(50.0, rel=0.02)
    assert rate.per_s(700.0) < 15.0


def test_a_rate_is_right_from_the_first_seconds_on() -> None:
    rate = ServiceRate()
    for second in range(6):
        rate.ended(100.0, float(second))
    assert rate.per_s(5.0) == pytest.approx(120.0, rel=0.1)


def test_an_overload_tells_when_the_work_that_waits_will_be_done() -> None:
    waiting, rate = WaitingCalls(), ServiceRate()
    waiting.add(a_state(), (0.0, 0.0))
    assert overload("m", waiting, rate, 0.0).retry_after_s == 5.0
    for second in range(0, 600):
        rate.ended(10.0, float(second))
    refusal = overload("m", waiting, rate, 600.0)
    assert refusal.retry_after_s == pytest.approx(10.0, rel=0.05)
    assert refusal.detail.startswith("1 calls for the model 'm' wait")
    assert overload("m", waiting, rate, 6000.0).retry_after_s == 300.0


def test_a_budget_is_told_with_what_is_used_and_when_there_is_more() -> None:
    refusal = over_budget(OverBudget(budget=600.0, used=590.0, retry_after_s=2.5))
    assert refusal.detail == "this tenant may use 600 tokens a minute, 590 of them are used; come back in 2.5 s"
    assert refusal.retry_after_s == 2.5


def test_a_call_without_a_deadline_and_a_policy_without_a_clue_refuse_nobody() -> None:
    assert late(a_state(due_s=None), in_parts([9e9], [1.0], [1.0]), 0.0) is None
    assert late(a_state(due_s=0.1), Choice(index=0), 0.0) is None


def test_a_call_is_late_only_when_it_would_be_with_little_work_as_well() -> None:
    choice = Choice(index=0, expected_s=150.0)  # half of it with the work that nine of ten exceed
    assert late(a_state(due_s=75.1), choice, 0.0) is None
    refusal = late(a_state(due_s=74.9), choice, 0.0)
    assert refusal is not None
    assert refusal.reason == "deadline"


def test_a_forecast_that_is_sure_leaves_no_doubt() -> None:
    state = a_state(due_s=9.0, forecast=point(100.0, unit="work"))
    assert late(state, Choice(index=0, expected_s=10.0), 0.0) is not None
    assert late(state, Choice(index=0, expected_s=9.0), 0.0) is None


def test_the_best_candidate_counts_and_not_the_chosen_one() -> None:
    choice = in_parts([0.0, 0.0], [0.0, 0.0], [40.0, 10.0], chosen=0)
    assert late(a_state(due_s=6.0), choice, 0.0) is None
    assert late(a_state(due_s=4.0), choice, 0.0) is not None


def test_prefill_is_as_long_as_it_is_whatever_the_answer() -> None:
    choice = in_parts([0.0], [8.0], [4.0])
    assert late(a_state(due_s=9.0), choice, 0.0) is not None
    assert late(a_state(due_s=10.5), choice, 0.0) is None


def test_what_only_the_queue_makes_late_is_told_when_the_queue_will_be_short_enough() -> None:
    refusal = late(a_state(due_s=12.0), in_parts([30.0], [1.0], [8.0]), 0.0)
    assert refusal is not None
    assert refusal.retry_after_s == pytest.approx(30.0 + 1.0 + 8.0 - 12.0)
    assert refusal.detail == "12.0 s are left and the answer takes 20.0 s at the least"


def test_what_no_replica_can_do_is_not_told_to_come_back() -> None:
    refusal = late(a_state(due_s=2.0), in_parts([0.0], [1.0], [8.0]), 0.0)
    assert refusal is not None
    assert refusal.retry_after_s is None
    assert refusal.detail.endswith("; no replica can do it in 2.0 s")


def test_a_call_that_was_late_because_it_waited_may_come_back_at_once() -> None:
    refusal = late(a_state(due_s=100.0, ready_s=0.0), in_parts([0.0], [0.0], [20.0]), 95.0)
    assert refusal is not None
    assert refusal.retry_after_s == 0.0


@pytest.mark.parametrize("expected_s", [float("nan"), float("inf")])
def test_a_time_that_is_none_refuses_nobody(expected_s: float) -> None:
    assert late(a_state(due_s=1.0), Choice(index=0, expected_s=expected_s), 0.0) is None


def test_a_call_is_not_refused_for_what_others_often_do_in_time() -> None:
    choice = in_parts([90.0], [0.0], [10.0])
    assert late(a_state(due_s=30.0), choice, 0.0) is not None
    assert late(a_state(due_s=30.0), choice, 0.0, a_past(0.25, 1.0)) is None
    refusal = late(a_state(due_s=20.0), choice, 0.0, a_past(0.25, 1.0))
    assert refusal is not None
    assert "takes 25.0 s at the least" in refusal.detail


def test_while_little_is_known_of_how_long_calls_take_a_cautious_guess_counts() -> None:
    past = Punctuality()
    assert past.least_ratio() == 0.25
    for _ in range(63):
        past.took(CallState(call=a_call("p"), forecast=WIDE, attempt=1, foreseen_s=1.0), 3.0)
    assert past.least_ratio() == 0.25
    past.took(CallState(call=a_call("p"), forecast=WIDE, attempt=1, foreseen_s=1.0), 3.0)
    assert past.least_ratio() == 3.0


def test_calls_that_were_retried_or_that_nobody_foresaw_tell_nothing() -> None:
    past = a_past(1.0)
    for _ in range(500):
        past.took(CallState(call=a_call("p"), forecast=WIDE, attempt=2, foreseen_s=1.0), 0.0)
        past.took(CallState(call=a_call("p"), forecast=WIDE, attempt=1), 0.0)
    assert past.least_ratio() == 1.0
