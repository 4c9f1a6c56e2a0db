"""Beginnings and ends of workflows, told to whoever listens."""

from __future__ import annotations

import pytest

from swarmx.core.messages import Message, WorkflowEnded, WorkflowSubmitted
from swarmx.core.records import WorkflowRecord, WorkflowState
from swarmx.runtime.announcer import Announcer

RECORD = WorkflowRecord(
    workflow_id="w", tenant="t", mode="declared", kind="report", name="n", state="running", created_at_s=100.0
)


@pytest.mark.parametrize(("state", "latencies_s"), [("finished", [5.0]), ("failed", [5.0]), ("cancelled", [])])
def test_an_end_is_told_with_its_state_and_its_latency_unless_it_was_cancelled(
    state: WorkflowState, latencies_s: list[float]
) -> None:
    heard: list[Message] = []
    took_s: list[float] = []
    announcer = Announcer(heard.append, took_s.append)
    announcer.submitted(RECORD)
    announcer.ended(RECORD, state, 105.0)
    ended = WorkflowEnded(workflow_id="w", state=state)  # type: ignore[arg-type]  # a terminal one
    assert heard == [WorkflowSubmitted(workflow_id="w", kind="report"), ended]
    assert took_s == latencies_s


def test_a_workflow_that_goes_on_after_a_restart_is_told_with_the_time_at_which_it_was_accepted() -> None:
    heard: list[Message] = []
    Announcer(heard.append).submitted(RECORD, again=True)
    assert heard == [WorkflowSubmitted(workflow_id="w", kind="report", submitted_at_s=100.0)]


@pytest.mark.parametrize("state", ["running", "cancelling"])
def test_a_state_that_is_no_end_says_nothing(state: WorkflowState) -> None:
    heard: list[object] = []
    Announcer(heard.append, heard.append).ended(RECORD, state, 105.0)
    assert heard == []


def test_a_latency_is_never_negative() -> None:
    took_s: list[float] = []
    Announcer(None, took_s.append).ended(RECORD, "finished", 99.0)
    assert took_s == [0.0]


def test_a_listener_that_raises_does_not_keep_the_other_from_hearing(caplog: pytest.LogCaptureFixture) -> None:
    def raises(heard: object) -> None:
        raise RuntimeError("listener")

    took_s: list[float] = []
    announcer = Announcer(raises, took_s.append)
    announcer.submitted(RECORD)
    announcer.ended(RECORD, "finished", 105.0)
    Announcer(raises, raises).ended(RECORD, "finished", 105.0)
    assert took_s == [5.0]
    assert "WorkflowSubmitted of workflow w" in caplog.text


def test_nobody_needs_to_listen() -> None:
    announcer = Announcer()
    announcer.submitted(RECORD)
    announcer.ended(RECORD, "finished", 105.0)
