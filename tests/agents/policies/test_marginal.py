"""What marginal charges a replica with."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.agents.policies.marginal import Marginal
from swarmx.core.fleet import CallView, Choice
from swarmx.core.forecast import point
from tests.contract.test_policies import WORKFLOW, a_call_view, a_fleet


def a_call(work: float = 100.0, *, prompt: int = 1000, **workflow: float) -> CallView:
    view = a_call_view(point(work, unit="tokens"), prompt_tokens=prompt)
    return dataclasses.replace(view, workflow=dataclasses.replace(WORKFLOW, **workflow))


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
    assert not choose(dataclasses.replace(call, ahead=3), **columns).hold


def test_a_call_that_would_not_fit_into_the_kv_cache_is_held() -> None:
    columns = {
        "in_flight": [9],
        "context_tokens": [9500.0],
        "remaining_work": [900.0],
        "kv_capacity_tokens": [10_000.0],
    }
    assert choose(a_call(100.0, prompt=500), **columns).hold
    assert not choose(a_call(100.0, prompt=500), Marginal(kv=0.0), **columns).hold


def test_replicas_that_read_prompts_all_the_time_and_those_that_are_slower_than_they_say_cost_more() -> None:
    assert choose(a_call(), in_flight=[4, 4], remaining_work=400.0, prefill_share=[0.5, 0.0]).index == 1
    assert choose(a_call(), in_flight=[4, 4], remaining_work=400.0, slowdown=[1.0, 3.0]).index == 0


def test_a_branch_that_ends_before_its_siblings_leaves_the_fast_replica_to_others() -> None:
    columns = {"in_flight": [10, 0], "remaining_work": [2000.0, 0.0], "step_base_s": [0.006, 0.02]}
    assert choose(a_call(50.0), **columns).index == 0
    assert choose(a_call(50.0, others_s=60.0), **columns).index == 1


def test_a_workflow_that_will_be_late_minds_itself_more_than_others() -> None:
    columns = {
        "in_flight": [30, 0],
        "remaining_work": [6000.0, 0.0],
        "step_base_s": [0.006, 0.03],
        "prefill_token_s": [2e-5, 1e-4],
    }
    assert choose(a_call(prompt=6000, age_s=0.0, target_s=600.0), **columns).index == 1
    assert choose(a_call(prompt=6000, age_s=900.0, target_s=60.0), **columns).index == 0


@given(work=st.floats(1.0, 1e5), prompt=st.integers(0, 100_000))
def test_what_is_expected_grows_by_the_step_for_each_unit_of_work(work: float, prompt: int) -> None:
    columns = {"in_flight": [3], "remaining_work": [300.0], "kv_capacity_tokens": 1e12}
    policy = Marginal()
    one = choose(a_call(work, prompt=prompt), policy, **columns)
    assert one.expected_s == pytest.approx(float(sum(one.terms_s[t][0] for t in ("wait_s", "prefill_s", "decode_s"))))
    assert one.unit_s * work == pytest.approx(float(one.terms_s["decode_s"][0]))


@given(work=st.floats(1.0, 1e4), age_s=st.floats(0.0, 1e3), others_s=st.floats(0.0, 100.0))
def test_the_terms_of_an_explanation_add_up_to_the_cost(work: float, age_s: float, others_s: float) -> None:
    call = a_call(work, age_s=age_s, others_s=others_s)
    choice = choose(
        call, Marginal(externality=0.5), in_flight=[3, 9], remaining_work=[300.0, 400.0], slowdown=[2.0, 1.0]
    )
    assert choice.cost_s is not None
    assert sum(choice.terms_s.values()) == pytest.approx(choice.cost_s)
