"""A stranger's regular expression counts as far as it can be matched without going back, and no check waits for one."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.core.errors import WorkflowError
from swarmx.workflows.json_schema import unusable_patterns, validator_of, without_unusable_patterns
from swarmx.workflows.limits import PATTERN_CHARS, PATTERN_STEPS
from swarmx.workflows.patterns import bounded_work, matches, refused
from swarmx.workflows.schemas import check_value


@pytest.mark.parametrize("pattern", ["(a+)+$", "^(a|aa)+$", r"^(\w+\s?)*$", "^(.*b){12}$"])
def test_a_pattern_that_would_keep_a_backtracking_engine_busy_is_matched_at_once(pattern: str) -> None:
    # With `re` this test does not end: the time doubles with every letter.
    assert not matches(pattern, "a" * 100_000 + "!")


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("(?=a)b", r"invalid perl operator: \(\?=; .* look-around"),
        ("(?<!a)b", "look-around"),
        (r"(a)\1", "back-references do not exist"),
        ("(", r"missing \)"),
        ("[", r"missing \]"),
        ("a{1,2000}", "invalid repetition size"),
        ("(" * 1100, f"at most {PATTERN_CHARS} were expected"),
        (r"\p{L}{1,12}", f"at most {PATTERN_STEPS} were expected"),
        (r"[\p{L}\p{N}]{1,1000}", "too large"),
        ("\\", "trailing"),
    ],
)
def test_what_cannot_be_matched_in_linear_time_is_refused_with_the_reason(pattern: str, says: str) -> None:
    assert re.search(says, refused(pattern)), refused(pattern)
    assert repr(pattern[:20])[:-1] in refused(pattern)


@pytest.mark.parametrize(
    ("pattern", "text", "found"),
    [
        ("b", "abc", True),
        ("^b", "abc", False),
        ("c$", "c\n", False),
        (r"^\d$", "٣", False),
        (r"^\u20ac\/\-$", "€/-", True),
        (r"^\\u20ac$", r"\u20ac", True),
        (r"^\p{L}+$", "Größe", True),
        ("^.$", "😀", True),
        ("(?i)^YES$", "yes", True),
        (r"^[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}$", "00000000-0000-4000-8000-00000000000f", True),
        ("", "", True),
    ],
)
def test_patterns_mean_what_the_standard_says(pattern: str, text: str, found: bool) -> None:
    assert refused(pattern) == ""
    assert matches(pattern, text) is found


@given(st.from_regex(r"[ab]?[*+?]?(\([ab.|]{0,4}\))?[*+]?\$?", fullmatch=True), st.text("ab", max_size=8))
def test_it_agrees_with_the_engine_of_python_where_both_know_a_pattern(pattern: str, text: str) -> None:
    if refused(pattern):
        return
    assert matches(pattern, text) is (re.search(pattern, text) is not None)


@given(st.text(max_size=30), st.text(max_size=30))
def test_any_text_is_a_pattern_or_refused(pattern: str, text: str) -> None:
    if not refused(pattern):
        matches(pattern, text)


def test_all_matches_of_one_check_have_one_bound() -> None:
    slow = "(?:a|b)*a(?:a|b){300}c"
    with bounded_work():
        assert matches("^(ab)*$", "ab" * 500_000)
    with pytest.raises(WorkflowError, match="more text than the patterns"), bounded_work():
        matches(slow, "ab" * 500_000)
    value = {"texts": ["ab" * 5000] * 100}
    schema = {
        "type": "object",
        "properties": {"texts": {"type": "array", "items": {"type": "string", "pattern": slow}}},
    }
    with pytest.raises(WorkflowError, match="more text than the patterns"):
        check_value(value, schema, "the answer")
    check_value({"texts": ["ab" * 200 + "a" + "b" * 300 + "c"]}, schema, "the answer")


def errors(schema: dict[str, Any], value: Any) -> list[str]:
    return sorted(error.message for error in validator_of(schema).iter_errors(value))


NAMED = {"patternProperties": {"^x-": {"type": "integer"}, "^(?!y)": {"type": "null"}}, "additionalProperties": False}


def test_names_of_properties_follow_patterns() -> None:
    schema = {"properties": {"a": {}}, "patternProperties": {"^x-": {"type": "integer"}}, "additionalProperties": False}
    assert errors(schema, {"a": 1, "x-b": 2}) == []
    assert errors(schema, {"x-b": "c"}) == ["'c' is not of type 'integer'"]
    assert errors(schema, {"b": 1}) == ["'b' does not match any of the regexes: '^x-'"]
    assert errors(schema, {"b": 1, "c": 1}) == ["'b', 'c' do not match any of the regexes: '^x-'"]
    assert errors({**schema, "additionalProperties": {"type": "string"}}, {"b": 1}) == ["1 is not of type 'string'"]
    assert errors({"properties": {}, "additionalProperties": False}, {"b": 1, "c": 1}) == [
        "Additional properties are not allowed ('b', 'c' were unexpected)"
    ]
    assert errors({"propertyNames": {"pattern": "^(a+)+$"}}, {"a" * 40 + "!": 1}) != []


def test_a_pattern_that_cannot_be_used_says_nothing_and_nothing_is_refused_for_want_of_it() -> None:
    assert errors(NAMED, {"y": 1}) == []
    assert errors(NAMED, {"x-a": "b"}) == ["'b' is not of type 'integer'"]
    assert errors({"pattern": "(?=a)"}, "b") == []


@pytest.mark.parametrize("where", ["allOf", "$ref"])
def test_unevaluated_properties_never_bring_the_other_engine_back(where: str) -> None:
    named = {"patternProperties": {"^(a+)+$": {}}}
    inner = {"allOf": [named]} if where == "allOf" else {"$ref": "#/elsewhere", "elsewhere": named}
    assert errors({**inner, "unevaluatedProperties": False}, {"a" * 40 + "!": 1}) == []
    assert errors({"properties": {"a": {}}, "unevaluatedProperties": False}, {"b": 1}) != []


def test_patterns_that_cannot_be_used_are_found_wherever_there_is_a_schema_and_nowhere_else() -> None:
    bad = {"pattern": "(?=a)"}
    schema = {
        "properties": {"pattern": bad, "fine": {"pattern": "^a"}},
        "anyOf": [{"items": {"not": bad}}],
        "patternProperties": {"(?!b)": True},
        "const": bad,
        "enum": [bad],
        "default": bad,
    }
    assert sorted(at for at, _ in unusable_patterns(schema)) == ["", "anyOf.0.items.not", "properties.pattern"]
    usable = without_unusable_patterns(schema)
    assert list(unusable_patterns(usable)) == []
    assert usable["properties"] == {"pattern": {}, "fine": {"pattern": "^a"}}
    assert (usable["const"], usable["enum"], usable["default"]) == (bad, [bad], bad)
    assert without_unusable_patterns(NAMED) == {"patternProperties": {"^x-": {"type": "integer"}}}
    assert schema["patternProperties"] == {"(?!b)": True}, "the schema that was given stays as it is"


@given(st.recursive(st.none() | st.booleans() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3)))
def test_whatever_stands_where_a_schema_should_be_is_passed_over(odd: Any) -> None:
    for key in ("properties", "patternProperties", "anyOf", "items", "pattern"):
        assert list(unusable_patterns({key: odd})) == [] or key == "pattern"
