"""The demand that a router reports: arrivals, waiting calls and workflows, once more with zeros at the end."""

from __future__ import annotations

from typing import Any

import pytest

from swarmx.core.actions import StartTimer
from swarmx.core.messages import CallCancelled, DemandReported, TimerFired, WorkflowEnded, WorkflowSubmitted
from tests.agents.routers import a_full_router, a_router
from tests.agents.worlds import FORECAST, changed, failed, finished, ready


def reports(outputs: Any) -> list[DemandReported]:
    return [output for output in outputs if isinstance(output, DemandReported)]


def test_demand_is_reported_while_there_is_any_and_once_more_with_zeros() -> None:
    agent = a_router("r0", demand_every_s=2.0)
    assert StartTimer(key="demand", at_s=12.0) in agent.handle(ready("c0"), 10.0)
    assert StartTimer(key="demand", at_s=13.0) not in agent.handle(ready("c1"), 11.0)
    outputs = agent.handle(TimerFired(key="demand"), 12.0)
    assert outputs[-1] == StartTimer(key="demand", at_s=14.0)
    (report,) = reports(outputs)
    assert (report.model, report.window_s, report.arrived, report.in_flight, report.waiting) == ("m", 2.0, 2, 2, 0)
    assert report.work_left == report.arrived_work == pytest.approx(2 * FORECAST.mean)
    agent.handle(finished("c0"), 13.0)
    agent.handle(CallCancelled(call_id="c1"), 13.0)
    (report,) = reports(agent.handle(TimerFired(key="demand"), 14.0))
    assert (report.arrived, report.finished, report.in_flight, report.work_left) == (0, 2, 0, 0.0)
    assert not any(report.upcoming_mean + report.upcoming_p90 + report.fresh_mean)
    assert agent.handle(TimerFired(key="demand"), 16.0) == []
    assert agent.handle(ready("c2"), 500.0)[-1] == StartTimer(key="demand", at_s=502.0)
    (report,) = reports(agent.handle(TimerFired(key="demand"), 502.0))
    assert (report.window_s, report.arrived) == (2.0, 1)


def test_calls_that_wait_are_demand_as_well() -> None:
    agent = a_router("r0", demand_every_s=2.0)
    agent.handle(ready("c0"), 0.0)
    agent.handle(changed("r0", "cordoned"), 0.5)
    agent.handle(ready("c1"), 1.0)
    (report,) = reports(agent.handle(TimerFired(key="demand"), 2.0))
    assert (report.in_flight, report.waiting) == (1, 1)
    assert report.work_left == pytest.approx(2 * FORECAST.mean)


def test_calls_that_wait_for_room_are_demand_as_well() -> None:
    agent = a_full_router("r0", demand_every_s=2.0)
    for number in range(1, 4):
        agent.handle(ready(f"c{number}"), 0.0)
    (report,) = reports(agent.handle(TimerFired(key="demand"), 2.0))
    assert (report.in_flight, report.waiting) == (1, 3)
    assert report.work_left == pytest.approx(4 * FORECAST.mean)


def test_a_call_that_is_retried_arrived_once_and_one_that_is_refused_has_ended() -> None:
    agent = a_router("r0", "r1", demand_every_s=2.0, max_attempts=2)
    agent.handle(ready("c"), 0.0)
    agent.handle(failed("c", 1), 1.0)
    agent.handle(failed("c", 2), 1.0)
    (report,) = reports(agent.handle(TimerFired(key="demand"), 2.0))
    assert (report.arrived, report.finished, report.in_flight) == (1, 1, 0)


def test_a_model_that_nobody_serves_is_no_demand() -> None:
    agent = a_router("r0", demand_every_s=2.0)
    assert not any(isinstance(o, StartTimer) for o in agent.handle(ready("c", model="nope"), 0.0))
    agent.handle(ready("c"), 0.0)
    assert [report.model for report in reports(agent.handle(TimerFired(key="demand"), 2.0))] == ["m"]


def test_a_workflow_is_demand_from_its_submission_to_its_end() -> None:
    agent = a_router("r0", demand_every_s=2.0)
    agent.handle(ready("first"), 0.0)
    agent.handle(finished("first"), 1.0)
    assert agent.handle(TimerFired(key="demand"), 2.0)[-1] == StartTimer(key="demand", at_s=4.0)
    assert len(agent.handle(TimerFired(key="demand"), 4.0)) == 1
    assert agent.handle(WorkflowSubmitted(workflow_id="v", kind="chat"), 10.0) == [StartTimer(key="demand", at_s=12.0)]
    assert agent.handle(TimerFired(key="demand"), 12.0)[-1] == StartTimer(key="demand", at_s=14.0)
    agent.handle(WorkflowEnded(workflow_id="v", state="finished"), 13.0)
    assert not any(isinstance(output, StartTimer) for output in agent.handle(TimerFired(key="demand"), 14.0))
