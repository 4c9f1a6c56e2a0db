"""The Gittins order with placement by least work."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from swarmx.agents.orders import ORDERS
from swarmx.agents.policies.gittins import Gittins
from swarmx.agents.policies.least_work import LeastWork
from swarmx.core.fleet import FleetView, WorkflowView
from tests.contract.test_policies import WORKFLOW, a_call_view, a_fleet, fleets


def a_workflow(attained_s: float) -> WorkflowView:
    return replace(WORKFLOW, attained_s=attained_s, past_s=np.array([5.0, 6.0, 100.0]))


def urgency(workflow: WorkflowView) -> float:
    call = replace(a_call_view(), workflow=workflow)
    return Gittins().choose(call, a_fleet(2), np.random.default_rng(0)).urgency


@settings(max_examples=30, deadline=None)
@given(fleet=fleets(), seed=st.integers(0, 1000))
def test_calls_are_placed_by_least_work(fleet: FleetView, seed: int) -> None:
    choices = [
        policy.choose(a_call_view(), fleet, np.random.default_rng(seed)).index for policy in (Gittins(), LeastWork())
    ]
    assert choices[0] == choices[1]


def test_a_workflow_that_is_probably_about_to_end_is_more_urgent_than_one_that_proved_to_be_long() -> None:
    assert urgency(a_workflow(4.0)) < urgency(a_workflow(0.0)) < urgency(a_workflow(50.0))


def test_the_engine_gets_the_order_of_the_router() -> None:
    for attained_s in (0.0, 4.0, 50.0, 200.0):
        workflow = a_workflow(attained_s)
        assert urgency(workflow) == ORDERS["gittins"](workflow, 7.0)[0]
