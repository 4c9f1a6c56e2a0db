"""Server-sent events, as replicas write them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.runtime.event_stream import (
    ToolsAsked,
    begins_events,
    error_event,
    rest_of,
    stopped_event,
    tools_of,
    usage_in,
)
from swarmx.runtime.upstream import AttemptFailed, Usage

SAID = b'data: {"usage":{"prompt_tokens":3,"completion_tokens":4}}'


@pytest.mark.parametrize("head", [b"d", b"data: {}", b"\n\ndata:", b": hello", b"ev", b"event: x", b"id: 1", b""])
def test_what_may_be_the_beginning_of_events_passes(head: bytes) -> None:
    assert begins_events(head)


@pytest.mark.parametrize("head", [b"{", b"<html>", b"date", b"42"])
def test_what_cannot_be_the_beginning_of_events_does_not(head: bytes) -> None:
    assert not begins_events(head)


@pytest.mark.parametrize(
    "tail", [SAID, b'data: {"usage":{"completion_tokens":9}}\n\n' + SAID + b"\n\ndata: [DONE]\n\n"]
)
def test_the_last_usage_counts(tail: bytes) -> None:
    usage = usage_in(tail)
    assert (usage.prompt_tokens, usage.work_done) == (3, 4.0)


@pytest.mark.parametrize("tail", [b"", b"data: {}\n\n", b'data: {"usage"\n\n', b'data: ["usage"]\n\n', SAID[5:]])
def test_without_a_readable_usage_nothing_is_known(tail: bytes) -> None:
    assert usage_in(tail) == Usage()


async def test_what_follows_the_end_is_read_to_its_end_or_to_its_failure() -> None:
    async def chunks(*, breaks: bool) -> AsyncGenerator[bytes, None]:
        yield b"\n"
        await asyncio.sleep(0)
        if breaks:
            raise AttemptFailed("connection_lost", "gone", retryable=False)
        yield b"\n"

    assert [chunk async for chunk in rest_of(chunks(breaks=False))] == [b"\n", b"\n"]
    assert [chunk async for chunk in rest_of(chunks(breaks=True))] == [b"\n"]


def test_an_error_event_has_the_shape_of_an_openai_error() -> None:
    event = error_event(AttemptFailed("timeout", "too slow", retryable=False))
    assert event.endswith(b"\n\n")
    error = msgspec.json.decode(event.removeprefix(b"data: "))["error"]
    assert error == {
        "message": "The replica failed while it answered: too slow",
        "type": "upstream_error",
        "param": None,
        "code": "timeout",
    }


def test_a_stream_that_was_stopped_says_why() -> None:
    error = msgspec.json.decode(stopped_event("it was cancelled").removeprefix(b"data: "))["error"]
    assert (error["message"], error["code"]) == ("it was cancelled", "cancelled")


def event(*calls: object, content: str | None = None) -> bytes:
    delta = {"content": content, "tool_calls": list(calls)} if calls else {"content": content}
    return b"data: " + msgspec.json.encode({"choices": [{"index": 0, "delta": delta}]}) + b"\n\n"


def asked(index: int, name: str | None = None, arguments: str = "") -> dict[str, object]:
    return {"index": index, "function": {"arguments": arguments, **({"name": name} if name else {})}}


# Two tools, whose arguments and the text before them speak of tool calls themselves.
STREAM = (
    event(content='I use "tool_calls": [{"function": {"name": "liar"}}]')
    + event(asked(0, "grep"))
    + event(asked(0, arguments='{"tool_calls": "name"'))
    + event(asked(0, "grep", arguments="}"))
    + event(asked(1, "read"))
    + b"data: [DONE]\n\n"
)


def names(chunks: list[bytes]) -> tuple[str, ...]:
    read = ToolsAsked()
    for chunk in chunks:
        read.read(chunk)
    return read.names


@given(st.lists(st.integers(0, len(STREAM)), max_size=20).map(sorted))
def test_the_tools_of_a_stream_are_read_wherever_it_is_cut(cuts: list[int]) -> None:
    edges = [0, *cuts, len(STREAM)]
    assert names([STREAM[a:b] for a, b in pairwise(edges)]) == ("grep", "read")


@pytest.mark.parametrize(
    "chunk",
    [
        b"",
        b'data: {"tool_calls" "name"\n\n',
        b'data: ["tool_calls", "name"]\n\n',
        b'data: {"choices":[{"delta":{"tool_calls":null}}],"name":1}\n\n',
        b'data: {"choices":[{"delta":{"tool_calls":[7, {"function":{"name":"x"}}]}}]}\n\n',
        b'data: {"choices":[{"delta":{"tool_calls":[{"index":[],"function":{"name":"x"}}]}}]}\n\n',
        b'data: {"choices":[{"delta":{"tool_calls":[{"function":{"name":{}}}]}}]}\n\n',
        b'data: {"choices":[],"tool_calls":"name"}\n\n',
        b'data: "tool_calls" "name" \xff\n\n',
    ],
)
def test_a_stream_that_asks_for_tools_in_no_known_way_asks_for_none(chunk: bytes) -> None:
    assert names([chunk]) == ()


def test_what_is_kept_of_a_stream_is_bounded() -> None:
    read = ToolsAsked()
    for _ in range(50):
        read.read(b"data: " + b"x" * 10_000)
    assert len(read._rest) <= 1 << 16
    read.read(b"\n\n" + b"".join(event(asked(i, "n" * 500 + str(i))) for i in range(100)))
    assert len(read.names) == 32
    assert max(map(len, read.names)) == 64


def test_the_tools_of_a_whole_answer_are_read() -> None:
    calls = [{"id": "a", "function": {"name": "grep", "arguments": "{}"}}, {"function": {"name": "read"}}]
    assert tools_of({"choices": [{"message": {"content": None, "tool_calls": calls}}]}) == ("grep", "read")


@pytest.mark.parametrize(
    "answer",
    [
        {},
        [],
        {"choices": []},
        {"choices": [{"message": {"content": "Hello"}}]},
        {"choices": [{"message": {"tool_calls": None}}]},
        {"choices": [{"message": {"tool_calls": "x"}}]},
        {"choices": [{"message": {"tool_calls": [{"function": None}]}}]},
        {"choices": [{"message": {"tool_calls": [{"function": {"name": "\x1b[2J"}}, {"function": {"name": ""}}]}}]},
        {"data": [{"b64_json": "x"}]},
    ],
)
def test_an_answer_without_tool_calls_asks_for_no_tool(answer: object) -> None:
    assert tools_of(answer) == ()
