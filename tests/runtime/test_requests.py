from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.core.nouns import Call, CallKind
from swarmx.core.prompt_key import prompt_key
from swarmx.core.prompts import PromptText, cut
from swarmx.core.records import ModelRequest
from swarmx.runtime.requests import BadRequest, call_of, new_id

CHAT = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]}


def asked(body: dict[str, Any], kind: CallKind = "llm") -> tuple[Call, PromptText]:
    return call_of(
        ModelRequest(
            tenant="t", workflow_id="w", workflow_kind="k", node="n", role="r", kind=kind, model="m", body=body
        )
    )


def call_for(body: dict[str, Any], kind: CallKind = "llm") -> Call:
    return asked(body, kind)[0]


def test_a_call_holds_the_key_and_the_size_of_its_prompt_and_not_the_prompt() -> None:
    call = call_for(CHAT)
    assert call.prompt_key == prompt_key("Be brief.", "Why?")
    assert call.prompt_bytes == len("Be brief.Why?")
    assert call.prompt_tokens == 3
    assert "Be brief" not in repr(call)


def test_the_prompt_that_is_forecast_is_all_messages_line_by_line() -> None:
    _, prompt = asked(CHAT | {"tools": [{"type": "function"}, {"type": "function"}]})
    assert prompt == PromptText(text=b"Be brief.\nWhy?", total_bytes=14, messages=2, tools=2)


def test_the_prompt_of_an_image_is_its_text() -> None:
    assert asked({"prompt": "a cat"}, "image")[1] == PromptText(text=b"a cat", total_bytes=5)


@given(st.lists(st.text() | st.integers(1, 9000).map(lambda size: "xü" * size), min_size=1, max_size=6))
def test_a_long_prompt_is_cut_as_if_its_messages_had_been_joined(texts: list[str]) -> None:
    _, prompt = asked({"messages": [{"role": "user", "content": text} for text in texts]})
    assert prompt == cut("\n".join(texts).encode(), messages=len(texts))


def test_a_prompt_that_ends_in_a_tool_s_result_says_so() -> None:
    result = {"role": "tool", "tool_call_id": "1", "content": "42"}
    assert asked({"messages": [*CHAT["messages"], result]})[1].returns_tools
    assert not asked({"messages": [result, *CHAT["messages"]]})[1].returns_tools
    assert not asked({"prompt": "a bee"}, "image")[1].returns_tools


@pytest.mark.parametrize("tools", [None, 3, "many", {}])
def test_tools_that_are_no_list_are_not_counted(tools: object) -> None:
    assert asked(CHAT | {"tools": tools})[1].tools == 0


def test_text_parts_count_and_pictures_do_not() -> None:
    content = [{"type": "text", "text": "Look:"}, {"type": "image_url", "image_url": {"url": "data:..."}}]
    assert call_for({"messages": [{"role": "user", "content": content}]}).prompt_bytes == 5


def test_bytes_are_counted_and_not_characters() -> None:
    assert call_for({"messages": [{"role": "user", "content": "über"}]}).prompt_bytes == 5


@pytest.mark.parametrize(
    ("limits", "expected"),
    [({}, 131_072.0), ({"max_tokens": 7}, 7.0), ({"max_tokens": 7, "max_completion_tokens": 9}, 9.0)],
)
def test_the_limit_of_a_chat_is_what_the_client_allows(limits: dict[str, int], expected: float) -> None:
    assert call_for(CHAT | limits).work_limit == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"prompt": "a cat"}, 30.0),
        ({"prompt": "a cat", "size": "512x1024", "steps": 10, "n": 2}, 10.0),
    ],
)
def test_the_work_of_an_image_is_its_megapixel_steps(body: dict[str, Any], expected: float) -> None:
    assert call_for(body, "image").work_limit == expected


@pytest.mark.parametrize(
    ("body", "kind", "param"),
    [
        ({}, "llm", "messages"),
        ({"messages": []}, "llm", "messages"),
        ({"messages": ["hello"]}, "llm", "messages"),
        ({"messages": [{"content": "no role"}]}, "llm", "messages"),
        (CHAT | {"max_tokens": 0}, "llm", "max_tokens"),
        (CHAT | {"max_tokens": -1}, "llm", "max_tokens"),
        (CHAT | {"max_tokens": "many"}, "llm", "max_tokens"),
        ({}, "image", "prompt"),
        ({"prompt": ""}, "image", "prompt"),
        ({"prompt": "a cat", "size": "large"}, "image", "size"),
        ({"prompt": "a cat", "size": "0x512"}, "image", "size"),
        ({"prompt": "a cat", "steps": 0}, "image", "steps"),
        ({"prompt": "a cat", "n": "two"}, "image", "n"),
        ({"prompt": "a cat", "n": True}, "image", "n"),
        ({"prompt": "a cat", "size": "²x²"}, "image", "size"),
        (CHAT | {"max_completion_tokens": 0, "max_tokens": 5}, "llm", "max_tokens"),
        (CHAT | {"max_tokens": 10**400}, "llm", "max_tokens"),
    ],
)
def test_what_no_engine_would_take_is_a_bad_request_that_names_the_field(
    body: dict[str, Any], kind: CallKind, param: str
) -> None:
    with pytest.raises(BadRequest) as refused:
        call_for(body, kind)
    assert refused.value.param == param


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10**6) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)


@given(
    body=st.dictionaries(
        st.sampled_from(["messages", "prompt", "max_tokens", "size", "steps", "n", "stream"]), json_values
    ),
    kind=st.sampled_from(["llm", "image"]),
)
def test_any_body_is_a_call_or_a_bad_request(body: dict[str, Any], kind: CallKind) -> None:
    try:
        call = call_for(body, kind)
    except BadRequest:
        return
    assert call.work_limit > 0.0
    assert call.prompt_tokens >= 1


def test_ids_say_what_they_name_and_never_repeat() -> None:
    ids = {new_id("call") for _ in range(1000)}
    assert len(ids) == 1000
    assert all(name.startswith("call_") for name in ids)
