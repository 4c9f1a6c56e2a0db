"""A definition that cannot run is refused with its place, the reason and the way out."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmx.core.errors import WorkflowError
from swarmx.workflows.spec import graph_of, parse_workflow

GOOD = """
name: demo
kind: coding
inputs: {task: null, style: short}
nodes:
  plan:
    kind: llm
    model: m
    prompt: "{{ inputs.task }}"
    schema: {type: object, properties: {steps: {type: array, items: {type: string}}}, required: [steps]}
  code:
    kind: map
    over: plan.json.steps
    as: step
    do:
      refine:
        kind: loop
        max_iterations: 3
        until: review.json.verdict == "approve"
        do:
          draft: {kind: llm, model: m, prompt: "{{ step }} {{ plan.text }} {{ previous | default('') }}"}
          review: {kind: llm, model: m, prompt: "{{ draft.text }}"}
        result: "{{ draft.text }}"
  words: {kind: tool, function: word_count, args: {text: "{{ code | join(' ') }}"}}
outputs: {all: "{{ code }}"}
"""


def test_yaml_json_bytes_and_data_give_the_same_definition() -> None:
    spec = parse_workflow(GOOD)
    text = spec.to_json()
    assert parse_workflow(text) == parse_workflow(text.encode()) == parse_workflow(json.loads(text)) == spec


@pytest.mark.parametrize(
    ("old", "new", "where", "says"),
    [
        ("inputs.task", "inputs.tsk", "nodes.plan.prompt", "no input 'tsk' .did you mean 'task'"),
        ("kind: loop", "kind: lop", "nodes.code.do.refine", "unknown node kind 'lop' .did you mean 'loop'.*kinds are"),
        ("max_iterations", "max_iteration", "nodes.code.do.refine.max_iterations", "missing"),
        ("as: step", "at: step", "nodes.code.at", "unknown field 'at'; fields are as, budget, do"),
        ("kind: coding", "knd: coding", "knd", "unknown field 'knd' .did you mean 'kind'"),
        ("prompt: \"{{ draft.text }}\"", "prompt: '{{ drft.text }}'", "nodes.code.do.refine.do.review.prompt",
         "nothing called 'drft' .did you mean 'draft'"),
        ("over: plan.json", "over: words.json", "nodes.code", "circle: (code -> words -> code|words -> code -> words)"),
        ("{{ step }} {{ plan", "{{ step }} {{ review", "nodes.code.do.refine.do.draft", "circle"),
        ("{{ step }} {{ plan", "{{ step }} {{ code", "nodes.code.do.refine.do.draft.prompt", "'code' encloses"),
        ("all: \"{{ code }}\"", "all: '{{ draft }}'", "outputs.all", "inside 'refine' and not visible"),
        ("all: \"{{ code }}\"", "all: '{{ code'", "outputs.all", "template is not valid"),
        ("all: \"{{ code }}\"", "all: '{{ iteration }}'", "outputs.all", "inside a loop only"),
        ("function: word_count", "function: wordcount", "nodes.words.function", "did you mean 'word_count'.*functions"),
        ("args: {text:", "args: {txt:", "nodes.words.args.txt", "takes no argument 'txt'; it takes text"),
        ("max_iterations: 3", "max_iterations: 21", "nodes.code.do.refine.max_iterations", "less than or equal to 20"),
        ("max_iterations: 3", "max_iterations: '3'", "nodes.code.do.refine.max_iterations", "valid integer"),
        ("kind: coding", "deadline_s: .inf", "deadline_s", "valid number|finite"),
        ("  words:", "  Words:", "nodes.Words", "expected"),
        ("  words:", "  inputs:", "nodes.inputs", "meaning of its own"),
        ("refine:", "plan:", "nodes.code.do.plan", "already the name"),
        ("as: step", "as: plan", "nodes.code.as", "choose another name"),
        ("type: object", "type: objct", "nodes.plan.schema", "JSON schema with `type: object`"),
        ("required: [steps]", "required: [stps]", "nodes.plan.schema", "only names from properties"),
        ("type: string}", "type: string, pattern: (?=a)}", "nodes.plan.schema", r"look-around.*properties.steps.items"),
        ("items: {type: string}", "anyOf: [{$ref: x}]", "nodes.plan.schema", r"\$ref is not supported .*anyOf.0"),
        ("as: step", "needs: [nope]", "nodes.code.needs", "nothing called 'nope'"),
        ("all: \"{{ code }}\"", "all: '{{ code == null }}'", "outputs.all", "'null' is called none in expressions"),
    ],
)  # fmt: skip
def test_a_mistake_is_named(old: str, new: str, where: str, says: str) -> None:
    assert old in GOOD
    with pytest.raises(WorkflowError, match=rf"(?s){says}") as caught:
        parse_workflow(GOOD.replace(old, new))
    lines = str(caught.value).splitlines()
    assert any(line.startswith(where) for line in lines), lines
    assert lines[0].startswith(caught.value.where)


def test_a_definition_that_is_stored_keeps_to_the_rules_of_its_day() -> None:
    def stored(pattern: str) -> str:
        signal = {"timeout_s": 1.0, "default": "b", "schema": {"type": "string", "pattern": pattern}}
        nodes = {"a": {"kind": "llm", "model": "m", "prompt": "{{ signals.s }}"}}
        return json.dumps({"name": "x", "signals": {"s": signal}, "nodes": nodes})

    assert parse_workflow(stored("^b$")).to_json() == graph_of(stored("^b$")).spec.to_json()
    for pattern, says in (("^a$", "'b' does not match '\\^a\\$'"), ("(?=b)", "look-around")):
        with pytest.raises(WorkflowError, match=says):
            parse_workflow(stored(pattern))
        assert graph_of(stored(pattern)).spec.signals["s"].default == "b"


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(WorkflowError) as caught:
        parse_workflow(
            "{name: x, nodes: {a: {kind: llm, model: m, prompt: '{{ u }}{{ v }}'}}, outputs: {o: '{{ w }}'}}"
        )
    assert caught.value.where == "nodes.a.prompt"
    assert [line.split("'")[1] for line in caught.value.detail.splitlines()] == ["u", "v", "w"]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("", "mapping"),
        ("[1, 2]", "mapping"),
        ("just text", "mapping"),
        ("a: b: c", "neither YAML nor JSON"),
        ("{", "neither YAML nor JSON"),
        (b"\xff\xfe", "not UTF-8"),
        ("x: " + "y" * 300_000, "262144"),
        ("a: &a [1]\nb: *a", r"alias \*a"),
        ("a: &a [x, x]\n" + "".join(f"b{i}: &b{i} [*a, *a]\n" for i in range(9)), "alias"),
        ("[" * 5000, "nests deeper|neither"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "nests deeper|cannot be read"),
        ("a: !!python/object/apply:os.system [ls]", "neither YAML nor JSON"),
        ("name: x\nname: y", "'name' stands twice"),
        ('{"name": "x", "name": "y"}', "'name' stands twice"),
        ("{name: x, nodes: {}}", "nodes"),
        ("{name: x, nodes: {a: {kind: llm, model: m, prompt: 7}}}", "nodes.a.prompt"),
        ("{name: x, nodes: {a: {model: m}}}", "says no `kind`"),
        ("{name: x, nodes: {a: 7}}", "nodes.a"),
    ],
)
def test_what_is_no_definition_is_refused(source: Any, says: str) -> None:
    with pytest.raises(WorkflowError, match=says):
        parse_workflow(source)


def test_yaml_does_not_guess() -> None:
    nodes = "{a: {kind: llm, model: m, prompt: p}}"
    source = f"{{name: x, inputs: {{a: on, b: 12:30, c: 2024-01-01, d: 010, e: 1e3, f: ~}}, nodes: {nodes}}}"
    assert parse_workflow(source).inputs == {
        "a": "on",
        "b": "12:30",
        "c": "2024-01-01",
        "d": 10,
        "e": 1000.0,
        "f": None,
    }


def test_too_many_nodes_and_too_deep_nesting_are_refused() -> None:
    node: dict[str, Any] = {"kind": "llm", "model": "m", "prompt": "p"}
    with pytest.raises(WorkflowError, match="201 nodes are defined, at most 200"):
        parse_workflow({"name": "x", "nodes": {f"n{i}": node for i in range(201)}})
    for depth in range(5):
        node = {"kind": "map", "over": "[1]", "do": {f"n{depth}": node}}
        if depth < 4:
            parse_workflow({"name": "x", "nodes": {"top": node}})
    with pytest.raises(WorkflowError, match="may nest 4 deep"):
        parse_workflow({"name": "x", "nodes": {"top": node}})


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.sampled_from(["llm", "map", "tool", "{{ a }}", "a", "x y"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["name", "nodes", "kind", "a", "b", "prompt", "model", "over", "do", "of", "needs"]),
                inner,
                max_size=5,
            )
        ),
        max_leaves=20,
    )
)
def test_any_data_is_a_definition_or_a_workflow_error(data: Any) -> None:
    with contextlib.suppress(WorkflowError):
        parse_workflow(json.dumps(data))
