"""Mean queue plus mean latency."""

from __future__ import annotations

import numpy as np
import pytest

from swarmx.agents.policies.murakkab_mean import MurakkabMean
from swarmx.core.forecast import Forecast, point
from tests.contract.test_policies import a_call_view, a_fleet

POLICY = MurakkabMean()


@pytest.mark.parametrize(("work_left", "chosen"), [(90.0, 0), (110.0, 1)])
def test_the_fast_device_wins_until_its_queue_eats_the_difference(work_left: float, chosen: int) -> None:
    fleet = a_fleet(
        2, max_batch=1, decode_seq_s=0.0, step_base_s=[0.1, 0.2], in_flight=[1, 0], remaining_work=[work_left, 0.0]
    )
    call = a_call_view(point(100.0, unit="work"), prompt_tokens=0)
    assert POLICY.choose(call, fleet, np.random.default_rng(0)).index == chosen


def test_only_the_mean_of_the_forecast_counts() -> None:
    fleet = a_fleet(3, step_base_s=[0.01, 0.02, 0.03], in_flight=[3, 1, 0], remaining_work=[900.0, 100.0, 0.0])
    wide = Forecast(levels=(0.25, 0.75), quantiles=(0.0, 200.0), unit="tokens", source="prior")
    sure, unsure = (
        POLICY.choose(a_call_view(forecast), fleet, np.random.default_rng(0))
        for forecast in (point(wide.mean, unit="tokens"), wide)
    )
    assert sure.cost_s is not None
    assert unsure.cost_s is not None
    np.testing.assert_allclose(sure.cost_s, unsure.cost_s)


def test_equal_replicas_are_chosen_at_random() -> None:
    chosen = {POLICY.choose(a_call_view(), a_fleet(3), np.random.default_rng(seed)).index for seed in range(30)}
    assert chosen == {0, 1, 2}
