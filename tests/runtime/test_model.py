"""The client of a language model against a server on loopback that behaves in every way it can."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from swarmx.core.control import Prompt
from swarmx.core.errors import ConfigError
from swarmx.runtime.model import OpenAiModel, read_answer

TOOL = {"type": "function", "function": {"name": "no_op", "strict": True, "parameters": {"type": "object"}}}
PROMPT = Prompt(system="be brief", user="go", tools=(TOOL,), max_tokens=50)
Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


def completion(message: dict[str, Any], finish_reason: str = "tool_calls") -> dict[str, Any]:
    return {
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 700, "completion_tokens": 25},
    }


def calls(*names: str, arguments: str = "{}") -> dict[str, Any]:
    functions = [{"name": name, "arguments": arguments} for name in names]
    return {"content": None, "tool_calls": [{"type": "function", "function": f} for f in functions]}


class Stub:
    """Answers with `answer`; remembers what it was sent."""

    def __init__(self) -> None:
        self.url = ""
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answer: Answer = self.proper

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        self.headers.append(dict(request.headers))
        return await self.answer(request)

    async def proper(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(completion(calls("no_op")))


@pytest_asyncio.fixture
async def stub() -> AsyncIterator[Stub]:
    one = Stub()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", one.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    one.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield one
    await runner.cleanup()


@pytest_asyncio.fixture
async def model(stub: Stub) -> AsyncIterator[OpenAiModel]:
    one = OpenAiModel(url=lambda: stub.url, name="small")
    yield one
    await one.close()


@pytest.mark.process
async def test_a_tool_call_comes_back_with_its_tokens(stub: Stub, model: OpenAiModel) -> None:
    reply = await model.reply(PROMPT, deadline_s=5.0)
    assert (reply.tool, reply.arguments, reply.error) == ("no_op", "{}", None)
    assert (reply.prompt_tokens, reply.output_tokens) == (700, 25)
    assert reply.seconds > 0.0


@pytest.mark.process
async def test_the_request_is_constrained_and_has_no_seed(stub: Stub, model: OpenAiModel) -> None:
    await model.reply(PROMPT, deadline_s=5.0)
    assert stub.bodies == [
        {
            "model": "small",
            "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "go"}],
            "temperature": 0,
            "max_tokens": 50,
            "tools": [TOOL],
            "tool_choice": "required",
            "parallel_tool_calls": False,
        }
    ]
    assert "authorization" not in {name.lower() for name in stub.headers[0]}


@pytest.mark.process
async def test_without_tools_it_may_just_write(stub: Stub, model: OpenAiModel) -> None:
    await model.reply(Prompt(system="s", user="u", tools=(), max_tokens=9), deadline_s=5.0)
    assert not {"tools", "tool_choice", "parallel_tool_calls"} & stub.bodies[0].keys()


@pytest.mark.process
async def test_the_key_comes_from_the_environment(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-1")
    one = OpenAiModel(url=lambda: f"{stub.url}/v1/", name="small", key_variable="SOME_KEY")
    assert (await one.reply(PROMPT, deadline_s=5.0)).tool == "no_op"
    assert stub.headers[0]["Authorization"] == "Bearer sk-1"
    await one.close()


def test_a_key_that_is_not_there_is_an_error_that_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(ConfigError, match="SOME_KEY"):
        OpenAiModel(url=lambda: None, name="small", key_variable="SOME_KEY")


@pytest.mark.process
async def test_a_server_that_ignores_tool_choice_may_write(stub: Stub, model: OpenAiModel) -> None:
    async def writes(request: web.Request) -> web.StreamResponse:
        return web.json_response(completion({"content": '{"name": "no_op", "arguments": {}}'}, "stop"))

    stub.answer = writes
    reply = await model.reply(PROMPT, deadline_s=5.0)
    assert (reply.tool, reply.text, reply.error) == (None, '{"name": "no_op", "arguments": {}}', None)


@pytest.mark.process
@pytest.mark.parametrize(
    ("status", "error"),
    [(500, "unreachable"), (503, "unreachable"), (429, "unreachable"), (400, "refused"), (401, "refused")],
)
async def test_a_status_says_whether_asking_again_may_help(
    stub: Stub, model: OpenAiModel, status: int, error: str
) -> None:
    async def fails(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, text="x" * 10_000)

    stub.answer = fails
    reply = await model.reply(PROMPT, deadline_s=5.0)
    assert reply.error == error
    assert str(status) in reply.detail
    assert len(reply.detail) < 300


@pytest.mark.process
async def test_a_redirect_is_not_followed(stub: Stub, model: OpenAiModel) -> None:
    async def elsewhere(request: web.Request) -> web.StreamResponse:
        raise web.HTTPTemporaryRedirect("/v1/chat/completions")

    stub.answer = elsewhere
    assert (await model.reply(PROMPT, deadline_s=5.0)).error == "refused"
    assert len(stub.bodies) == 1


@pytest.mark.process
async def test_a_slow_server_is_late(stub: Stub, model: OpenAiModel) -> None:
    async def never(request: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    stub.answer = never
    assert (await model.reply(PROMPT, deadline_s=0.1)).error == "late"


@pytest.mark.process
async def test_a_slow_trickle_is_late_too(stub: Stub, model: OpenAiModel) -> None:
    async def drips(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b" ")
            await asyncio.sleep(0.01)

    stub.answer = drips
    assert (await model.reply(PROMPT, deadline_s=0.2)).error == "late"


@pytest.mark.process
async def test_an_endless_answer_is_cut(stub: Stub, model: OpenAiModel) -> None:
    async def floods(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"x" * 65_536)

    stub.answer = floods
    assert (await model.reply(PROMPT, deadline_s=30.0)).error == "too_long"


@pytest.mark.process
async def test_a_connection_that_breaks_off_is_unreachable_and_the_next_question_works(
    stub: Stub, model: OpenAiModel
) -> None:
    async def hangs_up(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    stub.answer = hangs_up
    assert (await model.reply(PROMPT, deadline_s=5.0)).error == "unreachable"
    stub.answer = stub.proper
    assert (await model.reply(PROMPT, deadline_s=5.0)).tool == "no_op"


@pytest.mark.process
async def test_nobody_there_is_unreachable(unused_tcp_port: int) -> None:
    one = OpenAiModel(url=lambda: f"http://127.0.0.1:{unused_tcp_port}", name="small")
    assert (await one.reply(PROMPT, deadline_s=5.0)).error == "unreachable"
    await one.close()


async def test_a_server_that_is_not_running_is_unreachable() -> None:
    one = OpenAiModel(url=lambda: None, name="small")
    assert (await one.reply(PROMPT, deadline_s=5.0)).error == "unreachable"
    await one.close()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", "not_a_reply"),
        (b"\xff\xfe", "not_a_reply"),
        (b"data: {}\n\ndata: [DONE]\n\n", "not_a_reply"),
        (b"[" * 100_000, "not_a_reply"),
        (b"[]", "not_a_reply"),
        (b'{"choices": []}', "not_a_reply"),
        (b'{"choices": [{"message": {"content": 5}}]}', "not_a_reply"),
        (json.dumps({"choices": completion(calls("no_op"))["choices"] * 2}).encode(), "not_a_reply"),
        (json.dumps(completion(calls("no_op", "no_op"))).encode(), "not_a_reply"),
        (json.dumps(completion(calls("no_op", arguments='{"a'), "length")).encode(), "too_long"),
    ],
)
def test_an_answer_is_no_reply(answer: bytes, error: str) -> None:
    assert read_answer(answer).error == error


def test_strange_usage_counts_nothing() -> None:
    answer = completion(calls("no_op")) | {"usage": {"prompt_tokens": -5, "completion_tokens": "many"}}
    reply = read_answer(json.dumps(answer).encode())
    assert (reply.tool, reply.prompt_tokens, reply.output_tokens) == ("no_op", 0, 0)
