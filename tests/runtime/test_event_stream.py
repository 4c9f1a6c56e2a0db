"""Server-sent events, as replicas write them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import msgspec
import pytest

from swarmx.runtime.event_stream import begins_events, error_event, rest_of, usage_in
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
