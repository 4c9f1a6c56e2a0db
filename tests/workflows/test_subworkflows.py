"""A workflow inside another sees its own inputs only, leaves its outputs, and is bounded like everything else."""

from __future__ import annotations

from typing import Any

import pytest

from swarmx.core.errors import WorkflowError
from swarmx.core.failures import Failure
from swarmx.workflows.events import Cancelled, CancelRequested, Event, Failed, Finished, NodeExpanded, NodeFinished
from swarmx.workflows.forks import fork
from swarmx.workflows.plan import advance
from swarmx.workflows.retries import after_failure
from swarmx.workflows.spec import graph_of, parse_workflow
from swarmx.workflows.state import Run
from tests.workflows.histories.record import text

PAGES = """
name: pages
inputs: {topics: [bees, wasps]}
workflows:
  write:
    inputs: {topic: null, tone: sober}
    nodes:
      draft: {kind: llm, model: m, prompt: "{{ inputs.topic }} in a {{ inputs.tone }} tone", retry: {backoff_s: 0}}
      polish: {kind: workflow, use: improve, inputs: {text: "{{ draft.text }}"}}
    outputs: {page: "{{ polish.better }}", topic: "{{ inputs.topic }}"}
  improve:
    inputs: {text: null}
    nodes:
      fix: {kind: llm, model: m, prompt: "better: {{ inputs.text }}"}
    outputs: {better: "{{ fix.text }}"}
nodes:
  each:
    kind: map
    over: inputs.topics
    do: {one: {kind: workflow, use: write, inputs: {topic: "{{ item }}"}}}
    result: "{{ one.page }}"
"""


def started(source: Any, **inputs: Any) -> tuple[Run, list[Event], list[str]]:
    run, submitted = Run.start(parse_workflow(source), inputs)
    events, calls = advance(run, now_s=0.0)
    return run, [submitted, *events], [call.path for call in calls]


def answer(run: Run, path: str) -> tuple[list[Event], list[Any]]:
    return advance(run, [NodeFinished(path=path, output=text(f"{path}!"))], now_s=0.0)


def test_its_nodes_run_under_its_path_with_its_inputs_and_leave_its_outputs() -> None:
    run, _, calls = started(PAGES)
    assert calls == ["each[0].one.draft", "each[1].one.draft"]
    _, starts = answer(run, "each[1].one.draft")
    assert [(call.path, call.body["messages"][0]["content"]) for call in starts] == [
        ("each[1].one.polish.fix", "better: each[1].one.draft!")
    ]
    answer(run, "each[1].one.polish.fix")
    assert run.nodes["each[1].one"].state == "finished"
    answer(run, "each[0].one.draft")
    answer(run, "each[0].one.polish.fix")
    assert run.end == Finished(outputs={"each": ["each[0].one.polish.fix!", "each[1].one.polish.fix!"]})


def test_an_input_that_is_not_given_has_its_default() -> None:
    _, events, _ = started(PAGES, topics=["ants"])
    expanded = [event for event in events if isinstance(event, NodeExpanded) and event.inputs is not None]
    assert [(event.path, event.inputs) for event in expanded] == [("each[0].one", {"topic": "ants", "tone": "sober"})]


def test_without_declared_outputs_the_last_node_is_the_output() -> None:
    source = PAGES.replace('    outputs: {better: "{{ fix.text }}"}\n', "").replace("polish.better", "polish.fix.text")
    run, _, _ = started(source, topics=["ants"])
    answer(run, "each[0].one.draft")
    answer(run, "each[0].one.polish.fix")
    assert run.end == Finished(outputs={"each": ["each[0].one.polish.fix!"]})


def test_an_input_that_comes_out_as_null_fails_the_node_by_name() -> None:
    run, _, _ = started(PAGES, topics=[None])
    assert run.end == Failed(error="inputs.topic: this input has no default and must be given", path="each[0].one")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (("use: improve", "use: improv"), r"workflows\.write\.nodes\.polish\.use: .* 'improv' .did you mean 'improve'"),
        (("inputs: {topic: \"{{ item }}\"}", "inputs: {}"), r"do\.one\.inputs: write needs the input 'topic'"),
        (("inputs: {text: \"{{ d", "inputs: {txt: \"{{ d"), r"polish\.inputs\.txt: improve declares no input 'txt'"),
        (("better: {{ inputs.text", "better: {{ inputs.topic"), r"fix\.prompt: there is no input 'topic'"),
        (("better: {{ inputs.text", "better: {{ draft.text"), "fix.prompt: there is nothing called 'draft'"),
        (("over: inputs.topics", "over: draft.text"), "over: there is nothing called 'draft'"),
        (('use: improve, inputs: {text: "{{ draft.text }}"}', "use: write, inputs: {topic: x}"),
         "workflows.write: the workflows use each other in a circle: write -> write"),
        (('fix: {kind: llm, model: m, prompt: "better: {{ inputs.text }}"}',
          'fix: {kind: loop, max_iterations: 1, do: {w: {kind: workflow, use: write, inputs: {topic: x}}}}'),
         "circle: write -> improve -> write"),
        (('outputs: {better: "{{ fix.text', 'outputs: {better: "{{ fixx.text'), r"workflows\.improve\.outputs\.better"),
        (("    outputs: {better:", "    output: {better:"), "unknown field 'output' .did you mean 'outputs'"),
        (("  improve:\n", "  Improve:\n"), "workflows.Improve"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_sub_workflow_is_named_with_its_place(change: tuple[str, str], problem: str) -> None:
    assert change[0] in PAGES
    with pytest.raises(WorkflowError, match=problem):
        parse_workflow(PAGES.replace(*change))


def test_a_definition_with_sub_workflows_survives_being_stored() -> None:
    spec = parse_workflow(PAGES)
    assert parse_workflow(spec.to_json()) == spec
    assert graph_of(spec.to_json()).body.last == "each"


@pytest.mark.parametrize(
    ("limits", "problem"),
    [
        ("{nodes: 7}", "would come to 8 nodes, at most 7"),
        ("{depth: 2}", "inside 2 others, limits.depth allows no more"),
    ],
)
def test_what_is_inside_counts_against_the_limits_of_the_run(limits: str, problem: str) -> None:
    run, _, _ = started(PAGES.replace("inputs: {topics", f"limits: {limits}\ninputs: {{topics"))
    while run.in_flight and not run.ended:
        answer(run, next(iter(run.in_flight)))
    assert isinstance(run.end, Failed)
    assert problem in run.end.error


def test_sub_workflows_cannot_be_nested_without_bound() -> None:
    """No circle, and still a long way down: each uses the next one twice, which would come to 2^20 nodes."""
    chain: dict[str, Any] = {
        f"w{i}": {"nodes": {a: {"kind": "workflow", "use": f"w{i + 1}"} for a in "ab"}} for i in range(20)
    }
    chain["w20"] = {"nodes": {"end": {"kind": "tool", "function": "upper", "args": {"text": "x"}}}}
    run, _, _ = started({"name": "x", "workflows": chain, "nodes": {"top": {"kind": "workflow", "use": "w0"}}})
    assert isinstance(run.end, Failed)
    assert "inside 8 others, limits.depth allows no more" in run.end.error
    assert len(run.nodes) <= 2000


def test_all_nodes_of_all_workflows_count_as_defined() -> None:
    node = {"kind": "llm", "model": "m", "prompt": "p"}
    many = {f"n{i}": node for i in range(120)}
    with pytest.raises(WorkflowError, match="240 nodes are defined, at most 200"):
        parse_workflow({"name": "x", "workflows": {"w": {"nodes": many}}, "nodes": many})


def test_a_node_inside_is_retried_like_any_other() -> None:
    run, _, _ = started(PAGES, topics=["ants"])
    path = "each[0].one.draft"
    _, starts = advance(run, [after_failure(run, path, Failure(cause="timeout", error="x"), 0.0)], now_s=0.0)
    assert [(call.path, call.attempt) for call in starts] == [(path, 2)]


def test_a_cancel_ends_it_with_all_that_is_inside() -> None:
    run, _, _ = started(PAGES)
    advance(run, [CancelRequested()], now_s=0.0)
    assert run.end == Cancelled()


@pytest.mark.parametrize("path", ["each[0].one", "each[0].one.polish", "each[0].one.polish.fix", "each[0].one.draft"])
def test_a_fork_at_a_node_around_or_inside_it_comes_to_the_same_end(path: str) -> None:
    run, events, _ = started(PAGES)
    while run.in_flight:
        events += answer(run, next(iter(run.in_flight)))[0]
    begun = Run.rebuild(fork(events, path, forked_from="wf-old"))
    advance(begun, now_s=0.0)
    assert all(waiting.startswith("each[0].one") for waiting in begun.in_flight), "the other item stays as it is"
    while begun.in_flight:
        answer(begun, next(iter(begun.in_flight)))
    assert begun.end == run.end


@pytest.mark.parametrize(
    "event",
    [{"inputs": {"topic": "x"}, "path": "each"}, {"items": [1], "path": "each[0].one"}, {"path": "each[0].one"}],
)
def test_an_expansion_that_does_not_fit_is_refused(event: dict[str, Any]) -> None:
    run, _, _ = started(PAGES)
    with pytest.raises(WorkflowError, match=r"a sub-workflow by its inputs|still open"):
        run.apply(NodeExpanded(**event))


def test_a_sub_workflow_in_a_branch_and_in_a_loop() -> None:
    source = """
    name: x
    workflows:
      step: {inputs: {n: null}, nodes: {t: {kind: tool, function: sum, args: {items: ["{{ inputs.n }}", 1]}}}}
    nodes:
      l:
        kind: loop
        max_iterations: 3
        do:
          b:
            kind: branch
            cases: [{when: iteration != 2, do: {s: {kind: workflow, use: step, inputs: {n: "{{ iteration }}"}}}}]
    """
    run, _, _ = started(source)
    assert run.end == Finished(outputs={"l": {"t": 4}})
