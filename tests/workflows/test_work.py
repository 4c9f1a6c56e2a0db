"""A tool node has a tool of the catalogue called: with arguments that it takes, and not twice where it must not be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from swarmx.core.errors import WorkflowError
from swarmx.core.failures import Cause, Failure
from swarmx.core.toolbox import ToolSpec
from swarmx.workflows.events import Event, Failed, Finished, NodeFailed, NodeFinished, NodeRetried, NodeStarted
from swarmx.workflows.plan import advance, calls_in_flight
from swarmx.workflows.retries import after_failure
from swarmx.workflows.spec import parse_workflow
from swarmx.workflows.state import Run
from swarmx.workflows.work import Start, StartToolCall
from tests.workflows.agents import CATALOGUE


def started(
    catalogue: Mapping[str, ToolSpec] = CATALOGUE, inputs: dict[str, Any] | None = None, **fields: Any
) -> tuple[Run, list[Event], list[Start]]:
    node = {"kind": "tool", "tool": "weather", "args": {"city": "Oslo"}, **fields}
    spec = parse_workflow({"name": "x", "inputs": inputs or {}, "nodes": {"t": node}})
    run, submitted = Run.start(spec, {})
    events, calls = advance(run, now_s=100.0, tools=catalogue)
    return run, [submitted, *events], calls


def test_a_tool_is_called_with_what_its_templates_come_to() -> None:
    _, events, calls = started(inputs={"place": "Oslo"}, args={"city": "{{ inputs.place }}"}, timeout_s=5)
    assert calls == [StartToolCall(path="t", tool="weather", arguments={"city": "Oslo"}, timeout_at_s=105.0)]
    assert events[-1] == NodeStarted(path="t", kind="tool", timeout_at_s=105.0)


def test_what_the_tool_leaves_is_the_output_of_its_node() -> None:
    run, _, _ = started()
    advance(run, [NodeFinished(path="t", output={"degrees": 3})], now_s=100.0)
    assert run.end == Finished(outputs={"t": {"degrees": 3}})


def test_a_tool_that_nobody_has_fails_its_node_and_names_those_that_there_are() -> None:
    run, _, calls = started(tool="wether")
    assert calls == []
    assert isinstance(run.end, Failed)
    assert run.end.error == "there is no tool 'wether' (did you mean 'weather'?); tools are maps.find, pay, weather"
    assert started(catalogue={})[0].end == Failed(error="there is no tool 'weather'; tools are none", path="t")


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ({}, "'city' is a required property"),
        ({"city": 3}, "city: 3 is not of type 'string'"),
        ({"city": ["a", "{{ 1 }}"]}, "city: ['a', 1] is not of type 'string'"),
    ],
)
def test_arguments_that_the_tool_does_not_take_are_not_sent(args: dict[str, Any], why: str) -> None:
    run, _, calls = started(args=args)
    assert calls == []
    assert run.end == Failed(error=f"weather cannot be called with these arguments: {why}", path="t")


def test_a_call_that_was_out_is_made_again_as_it_was_whatever_became_of_the_catalogue() -> None:
    _, events, calls = started(timeout_s=5)
    assert calls_in_flight(Run.rebuild(events), {}) == calls


def test_that_a_tool_must_not_be_called_twice_is_remembered_with_its_call() -> None:
    _, events, _ = started(tool="pay")
    (call,) = calls_in_flight(Run.rebuild(events), {})
    assert isinstance(call, StartToolCall)
    assert not call.idempotent


@pytest.mark.parametrize(
    ("tool", "on", "failure", "reason"),
    [
        ("weather", None, Failure(cause="timeout", error="x", begun=True), "again"),
        ("weather", None, Failure(cause="replica", error="x", begun=True), "again"),
        ("weather", None, Failure(cause="tool", error="x", begun=True), "tool"),
        ("pay", None, Failure(cause="refused", error="x"), "again"),
        ("pay", None, Failure(cause="replica", error="x"), "again"),
        ("pay", None, Failure(cause="replica", error="x", begun=True), "interrupted"),
        ("pay", None, Failure(cause="timeout", error="x", begun=True), "interrupted"),
        ("pay", None, Failure(cause="interrupted", error="x", begun=True), "interrupted"),
        ("pay", ["interrupted"], Failure(cause="interrupted", error="x", begun=True), "again"),
        ("pay", ["interrupted"], Failure(cause="timeout", error="x", begun=True), "again"),
    ],
)
def test_what_must_not_be_called_twice_is_attempted_again_only_if_nothing_was_sent_or_its_author_says_so(
    tool: str, on: list[Cause] | None, failure: Failure, reason: str
) -> None:
    run, _, _ = started(tool=tool, retry={"attempts": 2} | ({} if on is None else {"on": on}))
    event = after_failure(run, "t", failure, 100.0)
    assert ("again" if isinstance(event, NodeRetried) else event.reason) == reason


def test_a_tool_that_says_so_itself_is_a_result_of_its_call_and_keeps_its_cause() -> None:
    run, _, _ = started(tool="pay")
    event = after_failure(run, "t", Failure(cause="tool", error="no funds", begun=True), 100.0)
    assert event == NodeFailed(path="t", error="no funds", reason="tool")


def test_an_attempt_that_takes_too_long_may_have_done_its_work() -> None:
    run, _, _ = started(tool="pay", timeout_s=5, retry={"attempts": 3})
    events, calls = advance(run, now_s=105.0, tools=CATALOGUE)
    assert calls == []
    assert isinstance(events[0], NodeFailed)
    assert events[0].reason == "interrupted"


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"function": "trim", "tool": "weather"}, "exactly one of `function` and `tool`"),
        ({}, "exactly one of `function` and `tool`"),
        ({"function": "trim", "args": {"text": "x"}, "timeout_s": 1}, "`retry` and `timeout_s` are for a `tool`"),
        ({"function": "trim", "args": {"text": "x"}, "retry": {}}, "`retry` and `timeout_s` are for a `tool`"),
        ({"tool": "rm -rf /"}, "was given, a text like"),
        ({"tool": "x", "retry": {"on": ["tool"]}}, "Input should be"),
        ({"tool": "x", "args": {"a": "{{ nobody }}"}}, "there is nothing called 'nobody'"),
    ],
)
def test_a_mistake_in_a_tool_node_is_named(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(WorkflowError) as error:
        parse_workflow({"name": "x", "nodes": {"t": {"kind": "tool", **fields}}})
    assert why in str(error.value)
