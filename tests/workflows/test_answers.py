"""Replicas may answer anything; a node gets an output or a clear reason why not."""

from __future__ import annotations

import base64
import json
import re
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.workflows.answers import Unusable, Usable, output_of

SCHEMA = {
    "type": "object",
    "properties": {
        "verdict": {"type": "string", "enum": ["yes", "no"]},
        "n": {"type": "array", "items": {"type": "integer"}},
    },
    "required": ["verdict"],
}
PNG = b"\x89PNG\r\n\x1a\n123"


def chat(text: Any, finish_reason: str = "stop") -> dict[str, Any]:
    return {
        "choices": [{"message": {"content": text}, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "x": 1},
    }


def test_a_chat_answer_becomes_text_json_and_usage() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 4}
    assert output_of("llm", chat("hi")) == Usable(output={"text": "hi", "json": None, "usage": usage})
    read = output_of("llm", chat('{"verdict": "yes", "n": [1]}'), SCHEMA)
    assert isinstance(read, Usable)
    assert read.output["json"] == {"verdict": "yes", "n": [1]}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nonsense", "not JSON"),
        ("[1]", "the answer should be object"),
        ("{}", "lacks the field 'verdict'"),
        ('{"verdict": "maybe"}', "verdict should be one of"),
        ('{"verdict": "yes", "n": [1, "2"]}', r"n\[1\] should be integer"),
        ('{"verdict": NaN}', "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_an_answer_off_the_schema_says_where(text: str, says: str) -> None:
    read = output_of("llm", chat(text), SCHEMA)
    assert isinstance(read, Unusable)
    assert re.search(says, read.error), read.error


STRICT = {
    "type": "object",
    "properties": {
        "n": {"type": "integer", "minimum": 1, "maximum": 5},
        "tags": {"type": "array", "items": {"type": "string", "minLength": 2}, "maxItems": 2, "uniqueItems": True},
        "id": {"anyOf": [{"type": "string", "const": "x"}, {"type": "null"}]},
        "code": {"type": "string", "pattern": "^(a+)+$"},
    },
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"n": 6}', "the answer.n: 6 is greater than the maximum of 5"),
        ('{"tags": ["ab", "c"]}', "the answer.tags[1]: 'c' is too short"),
        ('{"tags": ["ab", "ab"]}', "the answer.tags: item 1 is there already"),
        ('{"id": "y"}', "the answer.id: 'y' is not valid under any of the given schemas"),
        ('{"m": 1}', "the answer: Additional properties are not allowed ('m' was unexpected)"),
        ('{"code": "%s!"}' % ("a" * 40), "the answer.code: 'aaaaa"),
        ('{"n": 0, "id": 1, "tags": ["a", "b", "c"], "m": 1}', "; and 4 more"),
    ],
)
def test_the_whole_schema_counts(text: str, says: str) -> None:
    read = output_of("llm", chat(text), STRICT)
    assert isinstance(read, Unusable)
    assert says in read.error


@pytest.mark.parametrize("text", ['{"n": 5.0, "id": null}', '{"tags": ["ab", "cd"]}', '{"code": "%s"}' % ("a" * 40)])
def test_what_follows_the_schema_is_taken(text: str) -> None:
    assert isinstance(output_of("llm", chat(text), STRICT), Usable)


def test_items_are_unique_by_value_and_there_may_be_many() -> None:
    schema = {"type": "object", "properties": {"x": {"type": "array", "uniqueItems": True}}}
    many = [{"n": i, "m": [i]} for i in range(20_000)]
    assert isinstance(output_of("llm", chat(json.dumps({"x": many})), schema), Usable)
    for last in ({"m": [7.0], "n": 7}, {"m": [19_999], "n": 19_999}):
        assert isinstance(output_of("llm", chat(json.dumps({"x": [*many, last]})), schema), Unusable)


def test_a_pattern_of_an_older_definition_that_cannot_be_used_says_nothing() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=b)"}}}
    assert isinstance(output_of("llm", chat('{"a": "c"}'), schema), Usable)


def test_a_schema_of_an_older_definition_that_refers_elsewhere_fails_the_answer_and_nothing_else() -> None:
    schema = {"type": "object", "properties": {}, "anyOf": [{"$ref": "http://127.0.0.1:9/x"}]}
    read = output_of("llm", chat("{}"), schema)
    assert isinstance(read, Unusable)
    assert "refers to 'http://127.0.0.1:9/x'" in read.error


def test_of_what_is_no_schema_by_the_standard_types_and_fields_count() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": "one"}}, "required": ["n"]}
    assert isinstance(output_of("llm", chat('{"n": 0}'), schema), Usable)
    assert isinstance(output_of("llm", chat("{}"), schema), Unusable)


def test_an_answer_that_was_cut_off_says_so() -> None:
    read = output_of("llm", chat('{"verdict": "y', "length"), SCHEMA)
    assert isinstance(read, Unusable)
    assert "cut off at max_tokens" in read.error


def test_text_that_is_not_unicode_is_mended() -> None:
    read = output_of("llm", chat("a\ud800b"))
    assert isinstance(read, Usable)
    assert read.output["text"] == "a?b"


def test_images_are_handed_out_as_blobs() -> None:
    read = output_of("image", {"data": [{"b64_json": base64.b64encode(PNG).decode()}]})
    assert isinstance(read, Usable)
    assert read.output == {
        "images": [{"sha256": sha256(PNG).hexdigest(), "media_type": "image/png", "bytes": len(PNG)}]
    }
    assert [blob.data for blob in read.blobs] == [PNG]


@pytest.mark.parametrize(
    "answer",
    [
        {"data": []},
        {"data": [{"url": "http://x"}]},
        {"data": [{"b64_json": "%%%"}]},
        {"data": [{"b64_json": base64.b64encode(b"<html>").decode()}]},
        {"data": [{"b64_json": "ä"}]},
        {"data": [{"b64_json": ""}] * 17},
    ],
)
def test_what_is_no_image_is_a_clear_error(answer: Any) -> None:
    assert isinstance(output_of("image", answer), Unusable)


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["choices", "message", "content", "data", "b64_json", "usage", "finish_reason"]), inner
        )
    ),
)


@given(junk, st.sampled_from(["llm", "image"]))
def test_no_answer_raises(answer: Any, kind: Any) -> None:
    assert isinstance(output_of(kind, answer, SCHEMA), Usable | Unusable)
