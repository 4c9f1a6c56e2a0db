"""Programs that stay while the KV cache bears them."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from swarmx.agents.policies.thunderagent import ThunderAgent
from swarmx.core.fleet import Choice
from tests.contract.test_policies import a_call_view, a_fleet

POLICY = ThunderAgent(buffer_tokens=0.0)


def choose(
    used: list[float],
    *,
    prompt: int = 100,
    policy: ThunderAgent = POLICY,
    seed: int = 0,
    about: Any = None,
    **more: Any,
) -> Choice:
    """Replicas with a cache of 1000 tokens of which so many are used."""
    fleet = a_fleet(len(used), kv_capacity_tokens=1000.0, context_tokens=used, **({"in_flight": 1} | more))
    call = replace(a_call_view(prompt_tokens=prompt), **(about or {}))
    return policy.choose(call, fleet, np.random.default_rng(seed))


def test_a_new_program_goes_where_most_kv_is_free() -> None:
    assert choose([500.0, 300.0, 400.0]).index == 1


def test_a_new_program_that_fits_nowhere_waits() -> None:
    assert choose([950.0, 901.0]).hold
    assert not choose([950.0, 900.0]).hold


def test_a_new_program_goes_behind_those_that_wait() -> None:
    assert choose([0.0, 0.0], about={"ahead": 1}).hold


def test_a_program_stays_at_home_however_much_is_free_elsewhere() -> None:
    choice = choose([950.0, 0.0], about={"home": 0, "ahead": 3})
    assert (choice.index, choice.hold) == (0, False)


def test_a_program_whose_home_is_under_pressure_waits_or_moves_where_it_fits_with_a_margin() -> None:
    assert choose([951.0, 800.0], about={"home": 0}).hold
    moved = choose([951.0, 750.0], about={"home": 0})
    assert (moved.index, moved.hold) == (1, False)


def test_a_program_that_waits_comes_back_only_well_below_the_pressure_that_paused_it() -> None:
    waits = {"home": 0, "waited_s": 3.0}
    assert choose([800.0, 900.0], about=waits).hold
    assert not choose([740.0, 900.0], about=waits).hold


def test_a_program_that_waits_comes_back_home_if_it_fits_there() -> None:
    assert choose([740.0, 0.0], about={"home": 0, "waited_s": 3.0}).index == 0


def test_a_full_batch_takes_no_new_program() -> None:
    assert choose([0.0, 500.0], in_flight=[4, 1], max_batch=4).index == 1


def test_every_program_is_charged_a_buffer() -> None:
    policy = ThunderAgent(buffer_tokens=100.0)
    assert choose([0.0, 50.0], policy=policy, in_flight=[5, 1]).index == 1


def test_who_waited_goes_earlier_in_the_engine_and_who_adds_to_pressure_later() -> None:
    usual = choose([100.0], about={"now_s": 50.0}).urgency
    assert usual == 50.0
    assert choose([100.0], about={"now_s": 50.0, "waited_s": 3.0}).urgency == 49.0
    assert choose([850.0], prompt=50, about={"now_s": 50.0, "home": 0}).urgency == 52.0


@given(
    used=st.lists(st.floats(0.0, 2000.0), min_size=1, max_size=20),
    prompt=st.integers(0, 2000),
    waited_s=st.sampled_from([0.0, 1.0]),
)
def test_a_program_without_a_home_is_never_sent_where_it_does_not_fit(
    used: list[float], prompt: int, waited_s: float
) -> None:
    choice = choose(used, prompt=prompt, about={"waited_s": waited_s})
    assert choice.hold or used[choice.index] + prompt <= 1000.0
