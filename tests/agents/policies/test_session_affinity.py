"""Sessions stay at home, up to a point."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from swarmx.agents.policies.session_affinity import SessionAffinity
from tests.contract.test_policies import a_call_view, a_fleet


def choose(in_flight: list[int], home: int | None, *, slack: float = 8.0, seed: int = 0) -> int:
    view = replace(a_call_view(), home=home)
    fleet = a_fleet(len(in_flight), in_flight=in_flight)
    return SessionAffinity(slack=slack).choose(view, fleet, np.random.default_rng(seed)).index


def test_a_session_stays_at_its_home_exactly_up_to_the_slack() -> None:
    assert choose([12, 4, 2, 2], home=0, slack=7.0) == 0
    assert choose([12, 4, 2, 2], home=0, slack=6.9) in {2, 3}


@given(in_flight=st.lists(st.integers(0, 50), min_size=1, max_size=20), data=st.data())
def test_with_endless_slack_it_never_moves(in_flight: list[int], data: st.DataObject) -> None:
    home = data.draw(st.integers(0, len(in_flight) - 1))
    assert choose(in_flight, home, slack=1e9) == home


@given(in_flight=st.lists(st.integers(0, 50), min_size=1, max_size=20), seed=st.integers(0, 1000))
def test_a_call_without_a_home_goes_where_the_fewest_are(in_flight: list[int], seed: int) -> None:
    assert in_flight[choose(in_flight, None, seed=seed)] == min(in_flight)


def test_calls_without_a_session_do_not_all_go_to_one_replica() -> None:
    assert {choose([0, 0, 0], None, seed=seed) for seed in range(40)} == {0, 1, 2}
