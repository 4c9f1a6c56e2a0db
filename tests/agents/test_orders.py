"""The orders in which calls wait."""

from __future__ import annotations

import numpy as np
import pytest

from swarmx.agents.gittins import gittins_index
from swarmx.agents.orders import ORDERS
from swarmx.core.fleet import WorkflowView


def a_workflow(**about: float) -> WorkflowView:
    known = {"age_s": 10.0, "target_s": 60.0, "remaining_s": 20.0, "attained_s": 5.0, "attained_work": 0.0} | about
    return WorkflowView(kind="k", calls=1, past_s=np.zeros(0), **known)  # type: ignore[arg-type]


def first_of(order: str, *workflows: WorkflowView, now_s: float = 100.0) -> int:
    keys = [ORDERS[order](workflow, now_s) for workflow in workflows]  # type: ignore[index]
    return keys.index(min(keys))


def test_each_order_prefers_what_it_says() -> None:
    assert first_of("workflow", a_workflow(age_s=1.0), a_workflow(age_s=30.0)) == 1
    assert first_of("deadline", a_workflow(target_s=60.0), a_workflow(target_s=50.0)) == 1
    assert first_of("slack", a_workflow(remaining_s=20.0), a_workflow(remaining_s=40.0)) == 1
    assert first_of("attained", a_workflow(attained_s=30.0), a_workflow(attained_s=1.0)) == 1


def test_a_workflow_that_was_starved_goes_before_one_that_got_less() -> None:
    assert first_of("attained", a_workflow(attained_s=3.0), a_workflow(attained_s=40.0, age_s=400.0)) == 1


def test_the_gittins_index_of_a_known_job_is_one_over_its_rest() -> None:
    assert gittins_index(np.array([10.0]), 4.0) == pytest.approx(1.0 / 6.0)


def test_the_gittins_index_finds_the_best_time_to_stop() -> None:
    # half of them take 1 s, half 100 s: to serve for 1 s ends half of them
    past = np.array([1.0, 100.0])
    assert gittins_index(past, 0.0) == pytest.approx(0.5)
    assert gittins_index(past, 2.0) == pytest.approx(1.0 / 98.0)


def test_a_job_that_outran_all_others_is_expected_to_go_on_for_as_long_again() -> None:
    assert gittins_index(np.array([1.0, 2.0]), 8.0) == pytest.approx(1.0 / 8.0)
