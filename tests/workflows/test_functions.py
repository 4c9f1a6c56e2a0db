"""The built-in functions do what their line says, and refuse the rest by name."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.core.errors import WorkflowError
from swarmx.workflows.functions import FUNCTIONS, call_function
from swarmx.workflows.values import checked


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("concat", {"parts": ["a", 1, None], "separator": "-"}, "a-1-null"),
        ("split_lines", {"text": " a \n\n b"}, ["a", "b"]),
        ("json_parse", {"text": '{"a": [1]}'}, {"a": [1]}),
        ("json_dump", {"value": {"a": [1]}}, '{"a":[1]}'),
        ("pick", {"value": [{"a": {"b": 1}}, {"a": {"b": 2}}], "key": "a.b"}, [1, 2]),
        ("where", {"items": [{"a": 1}, {"a": 2}], "key": "a", "equals": 2}, [{"a": 2}]),
        ("length", {"value": {"a": 1}}, 1),
        ("sort", {"items": [3, 1.5, 2]}, [1.5, 2, 3]),
        ("sort", {"items": [{"n": 1}, {"n": 2}], "by": "n", "descending": True}, [{"n": 2}, {"n": 1}]),
        ("unique", {"items": [1, "1", 1, [2], [2]]}, [1, "1", [2]]),
        ("slice", {"value": "abcd", "start": 1, "end": 3}, "bc"),
        ("first", {"value": [1, 2]}, 1),
        ("last", {"value": [1, 2]}, 2),
        ("word_count", {"text": " a b\nc "}, 3),
        ("trim", {"text": " a "}, "a"),
        ("lower", {"text": "A"}, "a"),
        ("upper", {"text": "a"}, "A"),
        ("replace", {"text": "aXa", "old": "X", "new": "-"}, "a-a"),
        ("sum", {"items": []}, 0),
        ("mean", {"items": [1, 2]}, 1.5),
        ("max", {"items": [1, 2]}, 2),
        ("min", {"items": [1, 2]}, 1),
        ("number", {"value": " 7 "}, 7),
        ("number", {"value": "0.5"}, 0.5),
        ("round", {"value": 2.345, "digits": 2}, 2.35),
    ],
)
def test_a_function_does_what_it_says(name: str, arguments: dict[str, Any], expected: Any) -> None:
    result = call_function(name, arguments)
    assert result == pytest.approx(expected) if isinstance(expected, float) else result == expected


def test_every_function_has_a_line_of_help() -> None:
    assert all(function.doc.endswith(".") and function.required for function in FUNCTIONS.values())


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=6,
)


@given(st.sampled_from(sorted(FUNCTIONS)), st.lists(values, min_size=3, max_size=3))
def test_a_function_gives_json_or_a_workflow_error(name: str, arguments: list[Any]) -> None:
    function = FUNCTIONS[name]
    named = dict(zip(function.required + function.optional, arguments, strict=False))
    with contextlib.suppress(WorkflowError):
        checked(call_function(name, named))
