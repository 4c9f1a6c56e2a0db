"""What marginal charges a replica with."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from swarmx.agents.policies.marginal import Marginal
from swarmx.core.fleet import CallView, Choice
from swarmx.core.forecast import LEVELS, Forecast, point
from tests.contract.test_policies import WORKFLOW, a_call_view, a_fleet


def a_call(work: float = 100.0, *, prompt: int = 1000, **workflow: float) -> CallView:
    view = a_call_view(point(work, unit="tokens"), prompt_tokens=prompt)
    return replace(view, workflow=replace(WORKFLOW, **workflow))


def choose(call: CallView, policy: Marginal | None = None, **columns: object) -> Choice:
    replicas = max(len(column) for column in columns.values() if isinstance(column, list))
    return (policy or Marginal()).choose(call, a_fleet(replicas, **columns), np.random.default_rng(0))


def test_a_long_prompt_stays_away_from_a_full_batch_that_a_selfish_choice_would_take() -> None:
    columns = {
        "in_flight": [40, 0],
        "remaining_work": [8000.0, 0.0],
        "step_base_s": [0.006, 0.012],
        "prefill_token_s": [2e-5, 5e-5],
    }
    assert choose(a_call(prompt=6000), Marginal(externality=0.0), **columns).index == 0
    assert choose(a_call(prompt=6000), **columns).index == 1


def test_a_replica_that_caches_the_prompt_is_cheaper_by_what_it_need_not_read() -> None:
    columns = {"in_flight": [0, 0], "cached_tokens": [0.0, 900.0], "prefill_token_s": 1e-4}
    choice = choose(a_call(prompt=1000), **columns)
    assert choice.index == 1
    assert choice.terms_s["prefill_s"][0] - choice.terms_s["prefill_s"][1] == pytest.approx(0.09)
    blind = choose(a_call(prompt=1000), Marginal(prefix=0.0), **columns)
    assert blind.terms_s["prefill_s"][0] == blind.terms_s["prefill_s"][1]


def test_a_call_is_held_for_a_fast_server_that_will_be_free_sooner_than_the_slow_one_would_be_done() -> None:
    columns = {
        "max_batch": 1,
        "in_flight": [1, 0],
        "remaining_work": [5.0, 0.0],
        "step_base_s": [0.2, 1.0],
        "decode_seq_s": 0.0,
    }
    held = choose(a_call(30.0, prompt=0), **columns)
    assert (held.index, held.hold) == (0, True)
    greedy = choose(a_call(30.0, prompt=0), Marginal(hold=0.0), **columns)
    assert not greedy.hold


def test_calls_that_wait_ahead_make_holding_longer() -> None:
    columns = {
        "max_batch": 1,
        "in_flight": [1, 0],
        "remaining_work": [30.0, 0.0],
        "step_base_s": [0.2, 0.5],
        "decode_seq_s": 0.0,
    }
    call = a_call(30.0, prompt=0)
    assert choose(call, **columns).hold
    assert not choose(replace(call, ahead=3), **columns).hold
    wary = choose(call, Marginal(hold=0.5), **columns)
    assert not wary.hold, "12 s of waiting and 6 s there, against 15 s elsewhere"
    assert wary.terms_s["wait_s"][0] == 2.0 * choose(call, **columns).terms_s["wait_s"][0]


def test_a_call_that_would_not_fit_into_the_kv_cache_is_held() -> None:
    columns = {
        "in_flight": [9],
        "context_tokens": [9500.0],
        "remaining_work": [900.0],
        "kv_capacity_tokens": [10_000.0],
    }
    assert choose(a_call(100.0, prompt=900), **columns).hold
    assert not choose(a_call(100.0, prompt=900), Marginal(kv=0.0), **columns).hold
    assert not choose(a_call(100.0, prompt=300), **columns).hold, "any call that ends makes room for more than that"


def test_a_call_waits_for_the_room_that_it_takes_and_not_for_what_others_are_short_of() -> None:
    columns = {"in_flight": [9], "remaining_work": [900.0], "kv_capacity_tokens": [10_000.0]}
    full, beyond = (choose(a_call(prompt=3000), context_tokens=[held], **columns) for held in (9550.0, 30_000.0))
    assert full.hold
    assert beyond.hold
    assert full.terms_s["wait_s"] > beyond.terms_s["wait_s"], "there each that ends frees three times as much"
    assert not choose(a_call(prompt=300), context_tokens=[30_000.0], **columns).hold


def test_replicas_that_read_prompts_all_the_time_and_those_that_are_slower_than_they_say_cost_more() -> None:
    assert choose(a_call(), in_flight=[4, 4], remaining_work=400.0, prefill_share=[0.5, 0.0]).index == 1
    assert choose(a_call(), in_flight=[4, 4], remaining_work=400.0, slowdown=[1.0, 3.0]).index == 0


def test_a_branch_that_ends_before_its_siblings_leaves_the_fast_replica_to_others() -> None:
    columns = {"in_flight": [20, 0], "remaining_work": [4000.0, 0.0], "step_base_s": [0.006, 0.02]}
    assert choose(a_call(50.0), **columns).index == 0
    assert choose(a_call(50.0, others_s=60.0), **columns).index == 1
    assert choose(a_call(50.0, others_s=60.0), Marginal(siblings=0.0), **columns).index == 0


FAST_AND_BUSY_OR_SLOW_AND_IDLE = {
    "in_flight": [30, 0],
    "remaining_work": [6000.0, 0.0],
    "step_base_s": [0.006, 0.03],
    "prefill_token_s": [2e-5, 1e-4],
}


def test_a_call_of_a_late_workflow_takes_the_fast_busy_replica_where_that_of_a_punctual_one_spares_those_there() -> (
    None
):
    late, punctual = a_call(prompt=6000, age_s=900.0, usual_s=60.0), a_call(prompt=6000, age_s=20.0, usual_s=60.0)
    assert choose(punctual, **FAST_AND_BUSY_OR_SLOW_AND_IDLE).index == 1
    assert choose(late, **FAST_AND_BUSY_OR_SLOW_AND_IDLE).index == 0
    assert choose(late, Marginal(tail=0.0), **FAST_AND_BUSY_OR_SLOW_AND_IDLE).index == 1


def test_a_second_of_a_kind_with_a_short_target_is_worth_more_only_where_targets_are_relative() -> None:
    short, long = a_call(prompt=6000, target_s=6.0), a_call(prompt=6000, target_s=600.0)
    assert choose(short, **FAST_AND_BUSY_OR_SLOW_AND_IDLE).weight == pytest.approx(10.0)
    assert choose(long, **FAST_AND_BUSY_OR_SLOW_AND_IDLE).weight == pytest.approx(0.1)
    assert choose(short, **FAST_AND_BUSY_OR_SLOW_AND_IDLE).index == 0
    assert choose(long, **FAST_AND_BUSY_OR_SLOW_AND_IDLE).index == 1
    for call in (short, long):
        equal = choose(call, Marginal(relative=0.0), **FAST_AND_BUSY_OR_SLOW_AND_IDLE)
        assert (equal.weight, equal.index) == (1.0, 1)


@pytest.mark.parametrize("urgent", [0, 1])
def test_a_replica_full_of_urgent_calls_is_dearer_than_one_with_as_many_unhurried_ones(urgent: int) -> None:
    weight = [5.0, 5.0]
    weight[urgent] = 500.0
    columns = {"in_flight": [10, 10], "remaining_work": [1000.0, 1000.0], "prefill_token_s": 1e-4, "weight": weight}
    choice = choose(a_call(), **columns)
    assert choice.index == 1 - urgent
    charged = choice.terms_s["others_s"]
    assert charged[urgent] == pytest.approx(100.0 * charged[1 - urgent])
    deaf = choose(a_call(), Marginal(externality=0.0), **columns)
    assert deaf.cost_s is not None
    assert deaf.cost_s[0] == deaf.cost_s[1]


def test_a_call_that_may_be_long_stays_away_from_the_slow_device_that_its_mean_length_would_bear() -> None:
    columns = {"in_flight": [20, 0], "remaining_work": [4000.0, 0.0], "step_base_s": [0.006, 0.0105]}
    about = {"age_s": 1.0, "remaining_s": 1.0, "usual_s": 5.0}
    sure = a_call(100.0, **about)
    lengths = (10.0, 10.0, 10.0, 20.0, 30.0, 60.0, 900.0, 4000.0)
    risky = replace(sure, forecast=Forecast(levels=LEVELS, quantiles=lengths, unit="tokens", source="prior"))
    known = replace(sure, forecast=point(risky.forecast.mean, unit="tokens"))
    assert choose(known, **columns).index == 1
    assert choose(risky, **columns).index == 0
    assert choose(risky, Marginal(risk=0.0), **columns).index == 1


def test_a_branch_that_may_outlast_its_siblings_is_felt_by_its_workflow() -> None:
    lengths = (10.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0, 3000.0)
    risky = replace(
        a_call(others_s=20.0), forecast=Forecast(levels=LEVELS, quantiles=lengths, unit="tokens", source="prior")
    )
    columns = {"in_flight": [20, 0], "remaining_work": [4000.0, 0.0], "step_base_s": [0.006, 0.02]}
    assert choose(risky, Marginal(risk=0.0), **columns).index == 1
    assert choose(risky, **columns).index == 0


@given(work=st.floats(1.0, 5000.0), age_s=st.floats(0.0, 500.0), tail=st.floats(0.0, 4.0))
def test_a_sure_length_without_siblings_is_felt_as_it_is_where_it_takes_least(
    work: float, age_s: float, tail: float
) -> None:
    choice = choose(a_call(work, age_s=age_s), Marginal(tail=tail, externality=0.0), in_flight=[0])
    assert choice.cost_s is not None
    assert choice.cost_s[0] == pytest.approx(choice.expected_s, rel=1e-6, abs=1e-9)


@given(tail=st.floats(-1e300, 1e300), age_s=st.floats(0.0, 1e7), usual_s=st.floats(1e-3, 1e7))
def test_costs_are_finite_for_any_tail(tail: float, age_s: float, usual_s: float) -> None:
    call = a_call(1e6, age_s=age_s, usual_s=usual_s)
    choice = choose(call, Marginal(tail=tail), in_flight=[0, 30], remaining_work=[0.0, 1e7])
    assert choice.cost_s is not None
    assert np.isfinite(choice.cost_s).all()


def test_among_calls_that_are_worth_the_same_it_does_not_matter_how_much_that_is() -> None:
    one = choose(a_call(target_s=60.0), in_flight=[3, 9], remaining_work=[300.0, 400.0], weight=[3.0, 9.0])
    ten = choose(a_call(target_s=6.0), in_flight=[3, 9], remaining_work=[300.0, 400.0], weight=[30.0, 90.0])
    assert one.cost_s == pytest.approx(ten.cost_s)


def test_an_idle_replica_charges_nothing() -> None:
    charged = choose(a_call(), in_flight=[0, 1], remaining_work=[0.0, 50.0]).terms_s["others_s"]
    assert charged[0] == 0.0
    assert charged[1] > 0.0


@given(
    totals_s=st.lists(st.floats(30.0, 250.0), min_size=2, max_size=6),
    tail=st.floats(0.0, 4.0),
    target_s=st.floats(20.0, 200.0),
)
def test_the_weights_are_the_gradient_of_a_power_mean_of_what_workflows_take(
    totals_s: list[float], tail: float, target_s: float
) -> None:
    power = 1.0 + tail
    usual_s = 80.0

    def power_mean(times_s: list[float]) -> float:
        return float(np.mean([(time_s / usual_s) ** power for time_s in times_s]) ** (1.0 / power))

    policy, step_s = Marginal(tail=tail), 1e-3
    gradient, weights = [], []
    for position, total_s in enumerate(totals_s):
        more, less = list(totals_s), list(totals_s)
        more[position], less[position] = total_s + step_s, total_s - step_s
        gradient.append((power_mean(more) - power_mean(less)) / (2.0 * step_s))
        call = a_call(10.0, age_s=total_s - 20.0, remaining_s=20.0, usual_s=usual_s, target_s=target_s)
        weights.append(choose(call, policy, in_flight=[0]).weight)
    assert np.array(weights) / max(weights) == pytest.approx(np.array(gradient) / max(gradient), rel=1e-5)


@pytest.mark.parametrize("work", [10.0, 100.0, 5000.0])
def test_how_long_the_call_itself_takes_moves_how_late_its_workflow_will_be(work: float) -> None:
    about = {"age_s": 30.0, "remaining_s": 20.0, "usual_s": 60.0}
    known = choose(a_call(work, usual_call_s=2.0, **about), in_flight=[0])
    assert known.expected_s is not None
    rest_s = max(known.expected_s, 20.0 + known.expected_s - 2.0)
    assert known.weight == pytest.approx(((30.0 + rest_s) / 60.0) ** 2)
    unknown = choose(a_call(work, usual_call_s=0.0, **about), in_flight=[0])
    assert unknown.weight == pytest.approx(((30.0 + max(known.expected_s, 20.0)) / 60.0) ** 2)


def test_what_counts_of_the_call_itself_is_the_least_that_it_takes_anywhere() -> None:
    about = {"age_s": 30.0, "remaining_s": 20.0, "usual_s": 60.0, "usual_call_s": 1.0}
    one = choose(a_call(**about), in_flight=[0], step_base_s=[0.01])
    two = choose(a_call(**about), in_flight=[0, 0], step_base_s=[10.0, 0.01])
    assert one.weight == two.weight


@pytest.mark.parametrize(("age_s", "late"), [(1e9, 10.0), (0.0, 0.1)])
def test_no_workflow_is_more_than_ten_times_early_or_late(age_s: float, late: float) -> None:
    call = a_call(10.0, age_s=age_s, remaining_s=0.0, usual_s=1e6)
    assert choose(call, in_flight=[0]).weight == pytest.approx(late**2)


def test_where_nobody_knows_what_is_usual_nobody_is_late() -> None:
    for age_s in (0.0, 1e6):
        assert choose(a_call(age_s=age_s, usual_s=0.0, target_s=30.0), in_flight=[0]).weight == pytest.approx(2.0)


ANY_TIME_S = st.sampled_from([0.0, 1e-300, 1e300]) | st.floats(0.0, 1e6)


@given(age_s=ANY_TIME_S, target_s=ANY_TIME_S, remaining_s=ANY_TIME_S, usual_s=ANY_TIME_S, usual_call_s=ANY_TIME_S)
def test_whatever_is_known_of_a_workflow_a_second_has_a_price(**workflow: float) -> None:
    choice = choose(a_call(**workflow), in_flight=[0, 3], remaining_work=[0.0, 300.0])
    assert 1e-4 <= choice.weight <= 1e4
    assert choice.cost_s is not None
    assert np.isfinite(choice.cost_s).all()


def test_slack_is_the_order_and_no_part_of_the_cost() -> None:
    call = a_call(age_s=100.0, usual_s=20.0)
    columns = {"in_flight": [3, 9], "remaining_work": [300.0, 400.0]}
    on, off = choose(call, **columns), choose(call, Marginal(slack=0.0), **columns)
    assert on.cost_s == pytest.approx(off.cost_s)
    assert (Marginal().order, Marginal(slack=0.0).order) == ("slack", "arrival")


@given(work=st.floats(1.0, 1e5), prompt=st.integers(0, 100_000))
def test_what_is_expected_grows_by_the_step_for_each_unit_of_work(work: float, prompt: int) -> None:
    columns = {"in_flight": [3], "remaining_work": [300.0], "kv_capacity_tokens": 1e12}
    policy = Marginal()
    one = choose(a_call(work, prompt=prompt), policy, **columns)
    assert one.expected_s == pytest.approx(float(sum(one.terms_s[t][0] for t in ("wait_s", "prefill_s", "decode_s"))))
    assert one.unit_s * work == pytest.approx(float(one.terms_s["decode_s"][0]))


@given(work=st.floats(1.0, 1e4), age_s=st.floats(0.0, 1e3), others_s=st.floats(0.0, 100.0))
def test_the_terms_of_an_explanation_add_up_to_the_cost(work: float, age_s: float, others_s: float) -> None:
    call = a_call(work, age_s=age_s, others_s=others_s, usual_s=50.0)
    columns = {"in_flight": [3, 9], "remaining_work": [300.0, 400.0], "slowdown": [2.0, 1.0], "weight": [0.5, 70.0]}
    choice = choose(call, Marginal(externality=0.5), **columns)
    assert choice.cost_s is not None
    assert sum(choice.terms_s.values()) == pytest.approx(choice.cost_s)


def test_a_forecast_in_whole_numbers_is_one_in_numbers() -> None:
    whole = tuple(range(10, 90, 10))
    costs = []
    for quantiles in (whole, tuple(map(float, whole))):
        call = replace(a_call(), forecast=Forecast(levels=LEVELS, quantiles=quantiles, unit="tokens", source="neural"))
        costs.append(choose(call, in_flight=[1, 0], step_base_s=[0.01, 0.03]).cost_s)
    assert costs[0] is not None
    assert costs[0].tolist() == costs[1].tolist()
