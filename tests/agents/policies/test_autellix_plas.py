"""Attained service, and long prompts at home."""

from __future__ import annotations

from typing import Any

import numpy as np
from msgspec.structs import replace

from swarmx.agents.policies.autellix_plas import AutellixPlas
from swarmx.core.fleet import Choice
from tests.contract.test_policies import WORKFLOW, a_call_view, a_fleet


def choose(
    policy: AutellixPlas = AutellixPlas(),  # noqa: B008  # frozen
    *,
    prompt: int,
    home: int | None = None,
    attained_s: float = 0.0,
    age_s: float = 1.0,
    seed: int = 0,
    **columns: Any,
) -> Choice:
    workflow = replace(WORKFLOW, attained_s=attained_s, age_s=age_s)
    call = replace(a_call_view(prompt_tokens=prompt), home=home, workflow=workflow)
    return policy.choose(call, a_fleet(len(columns["in_flight"]), **columns), np.random.default_rng(seed))


def test_a_short_prompt_goes_to_the_least_used_even_if_it_has_a_home() -> None:
    assert choose(prompt=2048, home=0, in_flight=[5, 2, 3]).index == 1


def test_a_long_prompt_goes_home() -> None:
    assert choose(prompt=2049, home=0, in_flight=[5, 2, 3]).index == 0
    assert choose(prompt=2049, home=None, in_flight=[5, 2, 3]).index == 1


def test_a_long_prompt_waits_for_a_full_home_unless_it_need_not() -> None:
    full: dict[str, Any] = {"in_flight": [8, 2], "max_batch": [8, 8]}
    assert choose(prompt=5000, home=0, **full).index == 0
    assert choose(AutellixPlas(wait_for_home=0.0), prompt=5000, home=0, **full).index == 1


def test_a_replica_without_room_is_not_the_least_used() -> None:
    assert choose(prompt=10, in_flight=[1, 7], max_batch=[1, 8]).index == 1


def test_equals_are_drawn_at_random() -> None:
    assert {choose(prompt=10, in_flight=[1, 1, 1], seed=seed).index for seed in range(30)} == {0, 1, 2}


def test_inside_the_engine_programs_with_less_service_go_first_but_for_starved_ones() -> None:
    fresh = choose(prompt=10, in_flight=[0], attained_s=0.5).urgency
    served = choose(prompt=10, in_flight=[0], attained_s=50.0, age_s=60.0).urgency
    starved = choose(prompt=10, in_flight=[0], attained_s=50.0, age_s=6000.0).urgency
    assert fresh < served
    assert starved == fresh
