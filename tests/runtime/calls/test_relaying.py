"""Calls against real servers on loopback: what is relayed, byte by byte, and what the router hears of it."""

from __future__ import annotations

import logging

import msgspec
import pytest
from aiohttp import web

from swarmx.core.messages import FirstToken, TokensProgressed
from swarmx.core.nouns import Call
from swarmx.core.prompts import PromptText, cut
from swarmx.core.records import ModelRequest
from tests.agents.worlds import PROMPT, UNREAD, a_call
from tests.runtime.calls.scenes import (
    ANSWER,
    EVENTS,
    STREAM,
    Hanging,
    Make,
    Serve,
    a_request,
    plain,
    saying,
    streaming,
    transport_of,
    with_status,
)


async def test_an_answer_is_relayed_byte_by_byte_and_recorded_once(scene: Make) -> None:
    s = scene()
    await s.serve("a", plain)
    assert await s.ask() == ANSWER
    record = s.check_settled("finished")
    assert (record.attempts, record.replica_id, record.work_done, record.prompt_tokens) == (1, "a", 5.0, 11)


async def test_a_workflow_gets_the_answer_as_a_value(scene: Make) -> None:
    s = scene()
    await s.serve("a", plain)
    body = {"messages": [{"role": "user", "content": "?"}]}
    result = await s.calls.complete(
        ModelRequest(
            tenant="t", workflow_id="w", workflow_kind="k", node="n", role="r", kind="llm", model="m", body=body
        )
    )
    assert result.answer == msgspec.json.decode(ANSWER)
    assert (result.replica_id, result.attempts, result.failure) == ("a", 1, None)


@pytest.mark.parametrize(
    "chunks",
    [
        STREAM,
        [b"".join(STREAM)],
        [bytes([byte]) for byte in b"".join(STREAM)],
        [*STREAM[:-1], b"data: [DONE]", b"\n\n"],
        [b": hello\n\n", *STREAM],
    ],
    ids=["events", "at once", "bytes", "a late blank line", "a comment first"],
)
async def test_a_stream_is_relayed_byte_by_byte(scene: Make, chunks: list[bytes]) -> None:
    s = scene()
    await s.serve("a", streaming(*chunks))
    assert b"".join(await s.ask_stream()) == b"".join(chunks)
    record = s.check_settled("finished")
    assert (record.work_done, record.prompt_tokens) == (3.0, 11)
    assert record.first_token_at_s is not None
    assert sum(isinstance(message, FirstToken) for message in s.heard) == 1


async def test_a_stream_that_does_not_say_its_usage_is_counted_by_its_events(scene: Make) -> None:
    s = scene()
    await s.serve("a", streaming(b"data: {}\n\n", *EVENTS, b"data: [DONE]\n\n"))
    await s.ask_stream()
    assert s.check_settled("finished").work_done == 3.0


async def test_the_router_hears_how_far_a_stream_has_come(scene: Make) -> None:
    s = scene()
    hanging = Hanging(*EVENTS)
    await s.serve("a", hanging)
    stream = s.calls.stream(a_call("c", stream=True), PROMPT, b"{}")
    await anext(stream)
    assert any(isinstance(message, TokensProgressed) for message in s.heard)
    await stream.aclose()
    s.check_settled("cancelled")


async def test_the_engine_is_told_whose_call_it_is_and_no_two_attempts_have_the_same_name(scene: Make) -> None:
    seen: list[tuple[str | None, str | None]] = []

    def noting(serve: Serve) -> Serve:
        async def handle(request: web.Request) -> web.StreamResponse:
            seen.append((request.headers.get("x-request-id"), request.headers.get("idempotency-key")))
            return await serve(request)

        return handle

    s = scene()
    await s.serve("a", noting(with_status(503)), noting(plain))
    await s.calls.complete(a_request(request_id="wf/n/1", idempotency_key="wf/n"))
    assert seen == [("wf/n/1", "wf/n"), ("wf/n/1.2", "wf/n")]
    await s.ask()
    assert seen[-1] == (s.records[-1].call_id, None), "a call without a workflow goes by its own id"


@pytest.mark.parametrize("usage", [b'{"completion_tokens":-5}', b'{"completion_tokens":true}', b"[1]", b'"lots"'])
async def test_a_usage_that_is_nonsense_says_nothing(scene: Make, usage: bytes) -> None:
    s = scene()
    await s.serve("a", saying(b'{"choices":[],"usage":%s}' % usage))
    await s.ask()
    assert s.check_settled("finished").work_done == 0.0
    assert s.forecaster.forecast(a_call("c"), UNREAD).source == "prior"


async def test_what_calls_come_to_is_learned(scene: Make) -> None:
    s = scene()
    await s.serve("a", plain)
    for number in range(8):
        await s.calls.answer(a_call(f"c{number}"), PROMPT, b"{}")
    assert s.forecaster.forecast(a_call("c"), UNREAD).mean == pytest.approx(5.0)


async def test_connections_are_kept_after_answers_and_after_streams(
    scene: Make, caplog: pytest.LogCaptureFixture
) -> None:
    ports = set()

    async def noting(request: web.Request) -> web.StreamResponse:
        ports.add(transport_of(request).get_extra_info("peername"))
        return await (streaming(*STREAM) if len(s.records) % 2 else plain)(request)

    s = scene()
    await s.serve("a", noting)
    with caplog.at_level(logging.ERROR):
        for number in range(6):
            if number % 2:
                assert [c async for c in s.calls.stream(a_call(f"c{number}", stream=True), PROMPT, b"{}")]
            else:
                await s.calls.answer(a_call(f"c{number}"), PROMPT, b"{}")
    assert len(ports) == 1
    assert caplog.records == []


async def test_the_prompt_of_a_workflows_call_is_shown_once_and_after_the_router_had_it(scene: Make) -> None:
    shown: list[tuple[str, bytes, bool]] = []

    def show(call: Call, prompt: PromptText) -> None:
        shown.append((call.call_id, prompt.text, bool(s.decisions(call.call_id))))

    s = scene(on_prompt=show)
    await s.serve("a", plain)
    await s.ask(cut(b"Why?"))
    await s.calls.answer(msgspec.structs.replace(a_call("alone"), workflow_id=""), PROMPT, b"{}")
    assert shown == [("c", b"Why?", True)]


async def test_the_tools_that_a_workflow_s_answer_asks_for_are_told_once_it_is_whole(scene: Make) -> None:
    told: list[tuple[str, tuple[str, ...]]] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        if not (await request.json()).get("stream"):
            return web.json_response({"choices": [{"message": {"tool_calls": [{"function": {"name": "grep"}}]}}]})
        asked = b'data: {"choices":[{"delta":{"tool_calls":[{"function":{"name":"read"}}]}}]}\n\n'
        return web.Response(body=asked + b"data: [DONE]\n\n", content_type="text/event-stream")

    s = scene(on_answer=lambda call, tools: told.append((call.call_id, tools)))
    await s.serve("a", answer)
    await s.ask()
    async for _ in s.calls.stream(a_call("streamed"), PROMPT, b'{"stream":true}'):
        assert len(told) == 2
    await s.calls.answer(msgspec.structs.replace(a_call("alone"), workflow_id=""), PROMPT, b"{}")
    assert told == [("c", ("grep",)), ("streamed", ("read",))]
