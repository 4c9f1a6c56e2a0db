"""The use of a tool as a call: its name in every life, what the scheduler may see of it, and what comes of it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from swarmx.core.records import WorkflowRecord
from swarmx.core.toolbox import ToolCall, ToolResult
from swarmx.runtime.tool_calls import outcome_of, tool_call_of, tool_request
from swarmx.workflows.work import StartToolCall
from tests.runtime.toolsheds import a_spec

RECORD = WorkflowRecord(
    workflow_id="wf-1", tenant="acme", mode="declared", kind="report", name="r", state="running", created_at_s=1.0
)


def a_start(**more: Any) -> StartToolCall:
    return StartToolCall(**{"path": "each[2].look", "tool": "grep", "arguments": {"word": "hush"}, **more})


def test_the_replica_is_told_whose_call_it_is_and_a_key_that_every_attempt_has() -> None:
    first, second = (
        msgspec.convert(tool_request(RECORD, a_start(attempt=n), a_spec("grep"), priority=0).body, ToolCall)
        for n in (1, 2)
    )
    assert (first.key, first.tenant, first.arguments) == ("wf-1/each[2].look", "acme", {"word": "hush"})
    assert first.key == second.key
    assert (first.request_id, second.request_id) == ("wf-1/each[2].look/1", "wf-1/each[2].look/2")


@pytest.mark.parametrize(
    ("deadline_at_s", "timeout_at_s", "due_at_s"),
    [(None, None, None), (9.0, None, 9.0), (None, 7.0, 7.0), (9.0, 7.0, 7.0)],
)
def test_the_sooner_of_deadline_and_time_out_is_when_the_tool_has_to_end(
    deadline_at_s: float | None, timeout_at_s: float | None, due_at_s: float | None
) -> None:
    record = msgspec.structs.replace(RECORD, deadline_at_s=deadline_at_s)
    request = tool_request(record, a_start(timeout_at_s=timeout_at_s), a_spec("grep"), priority=0)
    assert request.body["deadline_at_s"] == due_at_s
    assert request.deadline_at_s == deadline_at_s


@pytest.mark.parametrize("idempotent", [True, False])
def test_the_scheduler_sees_pool_tool_and_seconds_but_not_what_the_tool_is_given(idempotent: bool) -> None:
    start = a_start(idempotent=idempotent)
    call, prompt = tool_call_of(tool_request(RECORD, start, a_spec("grep", pool="tools", timeout_s=12.0), priority=3))
    assert (call.kind, call.model, call.role, call.work_limit) == ("tool", "tools", "grep", 12.0)
    assert (call.workflow_kind, call.node, call.priority) == ("report", "each[2].look", 3)
    assert call.once is not idempotent
    assert call.prompt_bytes == len(b'{"word":"hush"}')
    assert b"hush" not in msgspec.json.encode(call) + prompt.text
    other, _ = tool_call_of(tool_request(RECORD, a_start(arguments={}), a_spec("grep"), priority=0))
    assert other.prompt_key == call.prompt_key, "it tells tools apart, not what they are given"


@pytest.mark.parametrize(
    ("cause", "means", "begun"),
    [
        ("tool", "tool", True),
        ("limit", "tool", True),
        ("timeout", "timeout", True),
        ("unavailable", "replica", True),
        ("refused", "rejected", False),
    ],
)
def test_causes_of_tools_are_causes_of_nodes(cause: Any, means: str, begun: bool) -> None:
    output, failure = outcome_of(msgspec.to_builtins(ToolResult(error="no", cause=cause)))
    assert output is None
    assert failure is not None
    assert (failure.cause, failure.error, failure.begun) == (means, "no", begun)


@pytest.mark.parametrize("value", [None, 0, "", [], {"a": [1.5]}])
def test_any_json_value_is_an_output(value: Any) -> None:
    assert outcome_of(msgspec.to_builtins(ToolResult(output=value))) == (value, None)


def test_an_output_that_no_node_may_leave_is_the_tools_failure() -> None:
    deep: Any = None
    for _ in range(100):
        deep = [deep]
    output, failure = outcome_of({"output": deep})
    assert output is None
    assert failure is not None
    assert failure.cause == "tool"
    assert "nests deeper" in failure.error
