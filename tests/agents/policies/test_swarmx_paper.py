"""Both readings of the routing algorithm of the SwarmX paper."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.agents.policies.swarmx_paper import SwarmXPaper
from swarmx.agents.policies.swarmx_paper_repo import SwarmXPaperRepo
from swarmx.core.fleet import FleetView
from swarmx.core.forecast import Forecast, point
from swarmx.core.ports import Policy
from tests.contract.test_policies import a_call_view, a_fleet

BOTH = pytest.mark.parametrize("policy", [SwarmXPaper(), SwarmXPaperRepo(), SwarmXPaper(tail=0.99)])
SERIAL = {"max_batch": 1, "decode_seq_s": 0.0}
IMAGE = a_call_view(point(100.0, unit="work"), prompt_tokens=0)


def chosen(policy: Policy, fleet: FleetView, *, times: int = 40, call: object = IMAGE) -> Counter[int]:
    rng = np.random.default_rng(0)
    return Counter(policy.choose(call, fleet, rng).index for _ in range(times))  # type: ignore[arg-type]


@BOTH
def test_of_two_sure_candidates_the_earlier_always_wins(policy: Policy) -> None:
    fleet = a_fleet(2, **SERIAL, step_base_s=[0.1, 0.2], in_flight=[1, 1], remaining_work=[50.0, 30.0])
    assert chosen(policy, fleet) == {0: 40}
    fleet = a_fleet(2, **SERIAL, step_base_s=[0.1, 0.2], in_flight=[1, 1], remaining_work=[150.0, 10.0])
    assert chosen(policy, fleet) == {1: 40}


def test_a_queue_that_may_be_short_gets_its_share_of_the_draws() -> None:
    uncertain = {"work_variance": [900.0**2 / 4, 0.0], "remaining_work": [900.0, 700.0]}
    fleet = a_fleet(2, **SERIAL, step_base_s=0.1, in_flight=1, **uncertain)
    assert 5 < chosen(SwarmXPaper(draws=1.0), fleet, times=200)[0] < 195


def test_more_draws_make_the_likelier_winner_surer() -> None:
    fleet = a_fleet(2, **SERIAL, step_base_s=0.1, in_flight=1, remaining_work=[500.0, 600.0], work_variance=300.0**2)
    few, many = (chosen(SwarmXPaper(draws=draws), fleet, times=200)[0] for draws in (1.0, 100.0))
    assert few < many


def test_the_tail_of_the_mixture_avoids_a_queue_that_may_be_long() -> None:
    fleet = a_fleet(
        2, **SERIAL, step_base_s=0.1, in_flight=1, remaining_work=[500.0, 600.0], work_variance=[600.0**2, 0.0]
    )
    assert chosen(SwarmXPaper(tail=0.99), fleet) == {1: 40}


def test_the_published_code_reads_both_terms_at_the_same_level() -> None:
    """At the median the first is better, from 0.8 on the second: with comonotonic sums that is how wins are counted."""
    fleet = a_fleet(
        2, **SERIAL, step_base_s=0.1, in_flight=1, remaining_work=[500.0, 600.0], work_variance=[450.0**2, 0.0]
    )
    wins = chosen(SwarmXPaperRepo(draws=1.0), fleet, times=400)
    assert 0.55 < wins[0] / 400 < 0.9


def test_below_the_median_the_coarse_grid_knows_only_the_median() -> None:
    fleet = a_fleet(
        2, **SERIAL, step_base_s=0.1, in_flight=1, remaining_work=[500.0, 200.0], work_variance=[500.0**2, 0.0]
    )
    assert chosen(SwarmXPaperRepo(draws=1.0), fleet, times=400)[0] == 0
    assert chosen(SwarmXPaperRepo(draws=1.0, fine=1.0), fleet, times=400)[0] > 0


def test_the_deviations_of_calls_that_add_up_comonotonically_add_up() -> None:
    """Four calls of deviation 10 have together the variance 400 if independent, and the deviation 40 if comonotonic."""
    one = a_fleet(2, **SERIAL, step_base_s=0.1, in_flight=1, remaining_work=[100.0, 120.0], work_variance=[1600.0, 0.0])
    four = a_fleet(2, **SERIAL, step_base_s=0.1, in_flight=4, remaining_work=[100.0, 120.0], work_variance=[400.0, 0.0])
    policy = SwarmXPaperRepo(draws=1.0)
    assert chosen(policy, one, times=100) == chosen(policy, four, times=100)


@BOTH
def test_a_slow_device_loses_by_the_length_of_the_call(policy: Policy) -> None:
    fleet = a_fleet(2, step_base_s=[0.01, 0.05])
    wide = Forecast(levels=(0.05, 0.5, 0.95), quantiles=(90.0, 100.0, 130.0), unit="tokens", source="prior")
    assert chosen(policy, fleet, call=a_call_view(wide)) == {0: 40}


@given(
    queues=st.lists(st.floats(0.0, 1000.0), min_size=2, max_size=30),
    speeds=st.integers(0, 1000),
    draws=st.integers(1, 20),
)
def test_with_nothing_uncertain_both_readings_take_the_least_completion(
    queues: list[float], speeds: int, draws: int
) -> None:
    steps = np.random.default_rng(speeds).uniform(0.05, 0.5, len(queues))
    fleet = a_fleet(len(queues), **SERIAL, step_base_s=steps, in_flight=1, remaining_work=queues)
    for policy in (SwarmXPaper(draws=float(draws)), SwarmXPaperRepo(draws=float(draws))):
        choice = policy.choose(IMAGE, fleet, np.random.default_rng(draws))
        assert choice.cost_s is not None
        assert choice.cost_s[choice.index] == pytest.approx(choice.cost_s.min(), rel=1e-9)
