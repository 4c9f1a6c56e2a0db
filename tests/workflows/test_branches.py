"""A branch takes the first case whose condition holds, and only that."""

from __future__ import annotations

from typing import Any

import pytest

from swarmx.core.errors import WorkflowError
from swarmx.workflows.events import Failed, Finished, NodeExpanded, NodeFinished
from swarmx.workflows.plan import advance
from swarmx.workflows.spec import parse_workflow
from swarmx.workflows.state import Run

TRIAGE = """
name: triage
inputs: {score: null}
nodes:
  route:
    kind: branch
    cases:
      - when: inputs.score > 8
        do: {praise: {kind: llm, model: m, prompt: "well done: {{ inputs.score }}"}}
        result: "{{ praise.text }}"
      - when: inputs.score > 4
        do:
          hint: {kind: llm, model: m, prompt: hint}
          polish: {kind: tool, function: upper, args: {text: "{{ hint.text }}"}}
    else:
      do: {redo: {kind: llm, model: m, prompt: redo}}
  after: {kind: tool, function: json_dump, args: {value: "{{ route }}"}}
"""


def started(source: Any, **inputs: Any) -> tuple[Run, list[str]]:
    run, _ = Run.start(parse_workflow(source), inputs)
    return run, [call.path for call in advance(run, now_s=0.0)[1]]


def answer(run: Run, path: str) -> None:
    advance(run, [NodeFinished(path=path, output={"text": f"from {path}", "json": None})], now_s=0.0)


@pytest.mark.parametrize(
    ("score", "path", "left"),
    [(9, "route[0].praise", "from route[0].praise"), (5, "route[1].hint", "FROM ROUTE[1].HINT")],
)
def test_the_first_case_that_holds_is_taken_and_leaves_its_result(score: int, path: str, left: str) -> None:
    run, calls = started(TRIAGE, score=score)
    assert calls == [path], "the other bodies do not exist"
    answer(run, path)
    assert run.end == Finished(outputs={"after": f'"{left}"'})


def test_where_no_case_holds_the_else_is_taken() -> None:
    _, calls = started(TRIAGE, score=1)
    assert calls == ["route[2].redo"]


def test_without_an_else_nothing_is_taken_and_null_is_left() -> None:
    source = TRIAGE.replace("    else:\n      do: {redo: {kind: llm, model: m, prompt: redo}}\n", "")
    run, calls = started(source, score=1)
    assert calls == []
    assert run.end == Finished(outputs={"after": "null"})


def test_a_condition_that_cannot_be_evaluated_fails_the_branch_by_name() -> None:
    run, _ = started(TRIAGE.replace("inputs.score > 8", "inputs.score.nope > 8"), score=1)
    assert isinstance(run.end, Failed)
    assert run.end.path == "route"
    assert "cases.0.when" in run.end.error


def test_conditions_wait_for_what_they_name_and_see_it() -> None:
    run, calls = started(
        {
            "name": "x",
            "nodes": {
                "ask": {"kind": "llm", "model": "m", "prompt": "p"},
                "b": {
                    "kind": "branch",
                    "cases": [
                        {"when": "ask.text == 'from ask'", "do": {"i": {"kind": "llm", "model": "m", "prompt": "p"}}}
                    ],
                },
            },
        }
    )
    assert calls == ["ask"]
    answer(run, "ask")
    assert list(run.in_flight) == ["b[0].i"]


def test_a_branch_inside_a_loop_decides_anew_in_each_iteration() -> None:
    source = """
    name: x
    nodes:
      l:
        kind: loop
        max_iterations: 2
        do:
          b:
            kind: branch
            cases: [{when: iteration == 1, do: {one: {kind: llm, model: m, prompt: p}}}]
            else: {do: {two: {kind: llm, model: m, prompt: p}}}
    """
    run, calls = started(source)
    assert calls == ["l[1].b[0].one"]
    answer(run, "l[1].b[0].one")
    assert list(run.in_flight) == ["l[2].b[1].two"]


@pytest.mark.parametrize("event", [{"items": [1]}, {"iteration": 1}, {"case": 7}, {"case": -1}, {}])
def test_an_expansion_that_is_not_of_a_branch_is_refused(event: dict[str, Any]) -> None:
    run, _ = Run.start(parse_workflow(TRIAGE), {"score": 9})
    with pytest.raises(WorkflowError, match="a branch by a case"):
        run.apply(NodeExpanded(path="route", **event))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (("when: inputs.score > 8", "wenn: inputs.score > 8"), r"nodes\.route\.cases\.0.*unknown field 'wenn'.*when"),
        (("inputs.score > 4", "praise.text"), r"nodes\.route\.cases\.1\.when: 'praise' is inside 'route'"),
        (('args: {value: "{{ route }}"}', 'args: {value: "{{ redo }}"}'), "'redo' is inside 'route' and not visible"),
        (("- when: inputs.score > 8\n        do", "- do"), "this field is missing"),
    ],
)
def test_what_is_wrong_in_a_branch_is_named_with_its_place(change: tuple[str, str], problem: str) -> None:
    with pytest.raises(WorkflowError, match=problem):
        parse_workflow(TRIAGE.replace(*change))


def test_an_unknown_field_of_a_retry_is_answered_with_those_of_a_retry() -> None:
    node = {"kind": "llm", "model": "m", "prompt": "p", "retry": {"attempt": 3}}
    with pytest.raises(WorkflowError, match="did you mean 'attempts'"):
        parse_workflow({"name": "x", "nodes": {"a": node}})
    with pytest.raises(WorkflowError, match="did you mean 'prompt'"):
        parse_workflow({"name": "x", "nodes": {"retry": {"kind": "llm", "model": "m", "promt": "p"}}})


@pytest.mark.parametrize(
    ("limits", "problem"),
    [
        ({"nodes": 4}, "would come to 5 nodes, at most 4 may be expanded"),
        ({"fan_out": 2}, "3 items were given, limits.fan_out allows 2"),
        ({"depth": 1}, "limits.depth allows no more"),
    ],
)
def test_a_run_stays_within_its_own_limits(limits: dict[str, int], problem: str) -> None:
    inner = {"kind": "map", "over": "[1]", "do": {"w": {"kind": "llm", "model": "m", "prompt": "p"}}}
    nodes = {"m": {"kind": "map", "over": "[1, 2, 3]", "do": {"inner": inner}}}
    run, _ = started({"name": "x", "limits": limits, "nodes": nodes})
    assert isinstance(run.end, Failed)
    assert problem in run.end.error


def test_a_definition_with_more_nodes_than_its_runs_may_have_is_not_begun() -> None:
    nodes = {name: {"kind": "llm", "model": "m", "prompt": "p"} for name in ("a", "b", "c")}
    with pytest.raises(WorkflowError, match=r"limits\.nodes: 3 nodes are defined, a run may have no more than 2"):
        started({"name": "x", "limits": {"nodes": 2}, "nodes": nodes})
