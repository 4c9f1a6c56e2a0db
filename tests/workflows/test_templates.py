"""Templates are bounded, pure and cannot reach Python."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmx.core.errors import WorkflowError
from swarmx.workflows.templates import compile_expression, compile_template, references

CONTEXT: dict[str, Any] = {
    "inputs": {"topic": "bees", "n": 3, "items": [1, 2]},
    "plan": {"text": "do it", "json": {"steps": ["a", "b"]}, "usage": {}},
    "search": [{"text": "x"}, {"text": "y"}],
    "previous": None,
    "big": "x" * 1_000_000,
}


def value(source: str) -> Any:
    return compile_template(source).value(CONTEXT)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ plan.json.steps }}", ["a", "b"]),
        ("{{ inputs.n + 1 }}", 4),
        ("{{ inputs.n / 2 }}", 1.5),
        ("{{ inputs.items }}", [1, 2]),
        ("{{ inputs['topic'] }}", "bees"),
        ("{{ search | map(attribute='text') | join('-') }}", "x-y"),
        ("{{ search | pick('text') }}", ["x", "y"]),
        ("{{ search[0].text ~ search[-1].text ~ 1 }}", "xy1"),
        ("{{ plan.json.steps[1:] }}", ["b"]),
        ("{{ 'yes' if inputs.n > 2 else 'no' }}", "yes"),
        ("{{ plan.json.nope | default('none') }}", "none"),
        ("{{ previous | default('none') }}", "none"),
        ("{{ plan.json.nope is defined }}", False),
        ("{{ {'a': [inputs.n]} }}", {"a": [3]}),
        ("n={{ inputs.n }} {{ plan.json }} {{ previous }} {{ true }}", 'n=3 {"steps":["a","b"]} null true'),
        ("plain", "plain"),
        ("", ""),
        ("{{ ' x ' | trim | upper }}{# a comment #}", "X"),
        ("{% raw %}{{ x }}{% endraw %}", "{{ x }}"),
    ],
)
def test_expressions_have_values_and_texts_have_text(source: str, expected: Any) -> None:
    assert value(source) == expected


def test_an_expression_may_stand_without_braces() -> None:
    for source in ("plan.json.steps", "{{ plan.json.steps }}", "  {{ plan.json.steps }} "):
        assert compile_expression(source).value(CONTEXT) == ["a", "b"]
    with pytest.raises(WorkflowError, match="one expression was expected"):
        compile_expression("{{ a }} and {{ b }}")


def test_references_are_the_first_level_names() -> None:
    template = compile_template("{{ plan.json.steps | join(inputs.sep) }} {{ item }} {{ search[inputs['i']] }}")
    assert references(template) == {"plan", "inputs", "item", "search"}
    assert template.inputs == {"sep", "i"}


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ plan.nope }}", "no field 'nope', only json, text, usage"),
        ("{{ plan.json.nope.deeper }}", "no field 'nope'"),
        ("{{ search[7] }}", "no 7 in a list of 2"),
        ("{{ missing }}", "'missing' is undefined"),
        ("a {{ missing }}", "'missing' is undefined"),
        ("{{ [missing] }}", "Undefined"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ 'a' + 1 }}", "two numbers or two texts, got text and number"),
        ("{{ 'a' * 1000000000 }}", r"\* wants two numbers"),
        ("{{ [0] * 1000000000 }}", r"\* wants two numbers"),
        ("{{ '%1000000000d' % 1 }}", "% wants two numbers"),
        ("{{ 9 ** 99 }}", "exponent"),
        ("{{ 2 ** 64 * 2 ** 64 }}", "64 bits"),
        ("{{ 1e308 * 10 }}", "JSON cannot express"),
        ("{{ big + big }}", "larger than"),
        ("{{ big ~ big }}", "longer than|larger than"),
        ("{{ big }}{{ big }}", "longer than"),
        ("{{ [big, big] }}", "larger than"),
        ("{{ big | replace('x', 'xx') }}", "more than"),
        ("{{ [big, big] | join('') }}", "longer than|larger than"),
        ("{{ {1: 2} }}", "not text"),
        ("{{ 1 < 'a' }}", "cannot be evaluated"),
        ("{{ [1, 'a'] | sort }}", "only numbers or only texts"),
        ("{{ 'x' | json_parse }}", "not JSON"),
    ],
)
def test_what_cannot_be_evaluated_says_why(source: str, says: str) -> None:
    with pytest.raises(WorkflowError, match=says) as caught:
        compile_template(source).value(CONTEXT, where="nodes.a.prompt")
    assert caught.value.where == "nodes.a.prompt"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{% for x in y %}{% endfor %}", "use a map node"),
        ("{% if x %}{% endif %}", "if condition else"),
        ("{% set x = 1 %}", "tool node"),
        ("{% macro m() %}{% endmacro %}", "not Macro"),
        ("{% include 'x' %}", "not Include"),
        ("{% import 'x' as y %}", "not Import"),
        ("{% extends 'x' %}", "not Extends"),
        ("{% filter upper %}x{% endfilter %}", "not FilterBlock"),
        ("{{ f() }}", "use a filter"),
        ("{{ plan.text.format(1) }}", "use a filter"),
        ("{{ (1, 2) }}", "square brackets"),
        ("{{ x | nope }}", "No filter named 'nope'"),
        ("{{ x | attr('y') }}", "No filter named 'attr'"),
        ("{{ x | selct }}", "filters are"),
        ("{{ x is sameas(1) }}", "No test named"),
        ("{{ x", "not valid"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "cannot be read|not valid"),
        ("{{ " + "[" * 60 + "]" * 60 + " }}", "nest"),
        ("{{ " + " + ".join(["1"] * 300) + " }}", "filters and operators|nest"),
        ("{{ x" + " | trim" * 300 + " }}", "filters and operators|nest"),
        ("x" * 40_000, "32768 bytes"),
        ("{{ " + "9" * 6000 + " }}", "cannot be read|not valid"),
    ],
)
def test_what_is_not_an_allowed_expression_is_refused_at_once(source: str, says: str) -> None:
    with pytest.raises(WorkflowError, match=says):
        compile_template(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ inputs.__class__.__mro__ }}",
        "{{ plan['__class__'] }}",
        "{{ inputs.items.append }}",
        "{{ plan.keys }}",
        "{{ search | map(attribute='__class__') }}",
        "{{ search | pick('__class__.__init__') }}",
    ],
)
def test_python_is_out_of_reach(source: str) -> None:
    with pytest.raises(WorkflowError, match="there is no"):
        compile_template(source).value(CONTEXT)


@pytest.mark.parametrize(
    "source",
    [
        "{{ [" + "big," * 8000 + "] }}",
        "{{ [" + "big," * 1500 + "] }}",
        "{{ " + " ~ ".join(["big"] * 1500) + " }}",
        "{{ [" + ",".join(["big"] * 1500) + "] | tojson }}",
        "{{ big }}" * 1500,
    ],
)
def test_a_template_that_repeats_a_large_value_is_refused_early(source: str) -> None:
    begin = time.process_time()
    with pytest.raises(WorkflowError, match=r"larger than|longer than|has more"):
        compile_template(source).value(CONTEXT)
    assert time.process_time() - begin < 2.0


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="{}%#()[]|.~*+-'\"_, 0123456789abinputsplan\n", max_size=60))
def test_any_text_gives_a_value_or_a_workflow_error(source: str) -> None:
    with contextlib.suppress(WorkflowError):
        compile_template(source).value(CONTEXT)
