"""Replicas as serial queues."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.agents.policies.serial_view import gamma_quantiles, gamma_scores, serial_view
from swarmx.core.forecast import point
from tests.contract.test_policies import a_call_view, a_fleet

CALL = a_call_view(point(10.0, unit="work"), prompt_tokens=0)


def test_on_a_serial_server_the_queue_is_the_work_left_at_the_speed_of_the_device() -> None:
    fleet = a_fleet(
        2, max_batch=1, decode_seq_s=0.0, step_base_s=[0.1, 0.2], in_flight=2, remaining_work=50.0, work_variance=9.0
    )
    for share in (0.0, 1.0):
        view = serial_view(CALL, fleet, share)
        np.testing.assert_allclose(view.queue_s, [5.0, 10.0])
        np.testing.assert_allclose(view.queue_sd_s, [0.3, 0.6])
        np.testing.assert_allclose(view.per_work_s, [0.1, 0.2])


def test_a_batch_shares_its_steps_only_if_it_is_asked_to() -> None:
    fleet = a_fleet(1, decode_seq_s=0.0, step_base_s=0.1, in_flight=4, remaining_work=40.0)
    assert serial_view(CALL, fleet, 0.0).queue_s == pytest.approx([4.0])
    assert serial_view(CALL, fleet, 1.0).queue_s == pytest.approx([1.0])


def test_an_exponential_queue_has_the_quantiles_of_one() -> None:
    mean = np.array([2.0])
    for level, score in ((0.25, -0.6745), (0.5, 0.0), (0.9, 1.2816), (0.99, 2.3263)):
        truth = -2.0 * np.log1p(-level)
        assert gamma_quantiles(mean, mean, np.array([score])) == pytest.approx([truth], rel=0.06)


def test_an_idle_replica_is_ready_now_at_every_level() -> None:
    assert gamma_quantiles(np.zeros(1), np.zeros(1), np.array([2.3])).tolist() == [0.0]


@given(mean=st.floats(0.1, 1e3), cv=st.floats(0.01, 1.0), score=st.floats(-2.0, 3.0))
def test_scores_undo_quantiles(mean: float, cv: float, score: float) -> None:
    means, sds = np.array([mean]), np.array([cv * mean])
    value = gamma_quantiles(means, sds, np.array([score]))
    if value[0] > 1e-3 * mean:
        assert gamma_scores(means, sds, value) == pytest.approx([score], abs=1e-3)
