"""Programs that nobody declared, run by the unmodified OpenAI client with the headers of each maker of agents."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.fleet import Http, Server, all_ready, serving, until

pytestmark = pytest.mark.process

LLM = "qwen3-8b"
ENDLESS = {"ignore_eos": True}
SLOW_TOKENS = 30_000  # 15 s and more on the fastest of the replicas
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
    for name in ("grep", "read", "build")
]
TRACE = "00-{}-00f067aa0ba902b7-01"


@pytest.fixture
async def client(server: Server, http: Http) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=server.token, max_retries=0) as found:
        yield found


def a_session() -> str:
    """An id of this test alone: they share the server."""
    return secrets.token_hex(16)


async def program(http: Http, name: str) -> dict[str, Any]:
    reply = await http.get(f"/api/v1/workflows/default:{name}")
    assert reply.status == 200, reply
    row: dict[str, Any] = reply.body
    return row


async def react(client: openai.AsyncOpenAI, headers: Mapping[str, str], *, turns: int, stream: bool) -> list[str]:
    """A loop of so many turns that have to call a tool, and one that must not; returns the tools."""
    messages: list[Any] = [{"role": "user", "content": f"Work on {secrets.token_hex(4)}."}]
    called: list[str] = []
    while len(called) < turns:
        asked: dict[str, Any] = {
            "model": LLM, "messages": messages, "tools": TOOLS, "tool_choice": "required", "extra_headers": headers,
        }  # fmt: skip
        if stream:
            async with client.chat.completions.stream(**asked) as events:
                answer = await events.get_final_completion()
        else:
            answer = await client.chat.completions.create(**asked)
        (tool,) = answer.choices[0].message.tool_calls or ()
        assert tool.type == "function"
        called.append(tool.function.name)
        messages += [
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": tool.id, "type": "function", "function": {"name": called[-1], "arguments": "{}"}}
                ],
            },
            {"role": "tool", "tool_call_id": tool.id, "content": f"result {len(called)}"},
        ]
    said = await client.chat.completions.create(
        model=LLM, messages=messages, tools=TOOLS, tool_choice="none", max_tokens=20, stream=stream,
        extra_headers=headers,
    )  # fmt: skip
    if isinstance(said, openai.AsyncStream):
        async for _ in said:
            pass
    return called


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("source", "header", "value"),
    [
        ("swarmx", "x-swarmx-workflow-id", "{}"),
        ("dynamo", "X-Dynamo-Session-ID", "{}"),
        ("claude_code", "x-claude-code-session-id", "{}"),
        ("codex", "thread-id", "{}"),
        ("codex", "session-id", "{}"),
        ("session", "x-session-id", "{}"),
        ("trace", "traceparent", TRACE),
    ],
)
async def test_the_calls_of_a_session_are_one_program_with_its_tools(
    client: openai.AsyncOpenAI, http: Http, source: str, header: str, value: str, stream: bool
) -> None:
    name = a_session()
    called = await react(client, {header: value.format(name)}, turns=2, stream=stream)
    row = await program(http, name)
    seen = row["program"]
    assert (row["mode"], row["name"], row["state"], len(row["calls"])) == ("transparent", name, "running", 3)
    assert seen["source"] == source
    assert seen["tools"] == {tool: called.count(tool) for tool in called}
    assert len(called) == 2
    assert seen["gaps_s"] > 0.0


async def test_a_program_that_waits_for_a_tool_shows_how_long_that_may_take(
    client: openai.AsyncOpenAI, http: Http
) -> None:
    name = a_session()
    headers = {"x-session-id": name}
    await react(client, headers, turns=3, stream=False)
    assert (await program(http, name))["remaining"]["pause"] is None
    await client.chat.completions.create(
        model=LLM, messages=[{"role": "user", "content": "More."}], tools=TOOLS, tool_choice="required",
        extra_headers=headers,
    )  # fmt: skip
    pause = (await program(http, name))["remaining"]["pause"]
    assert (pause["unit"], pause["source"]) == ("s", "empirical")


async def test_subagents_are_shown_under_their_parent(client: openai.AsyncOpenAI, http: Http) -> None:
    name = a_session()
    parent = {"x-claude-code-session-id": name}
    await react(client, parent, turns=0, stream=False)
    await react(client, {**parent, "x-claude-code-agent-id": "a1"}, turns=1, stream=False)
    await react(
        client,
        {**parent, "x-claude-code-agent-id": "a2", "x-claude-code-parent-agent-id": "a1"},
        turns=0,
        stream=False,
    )
    assert (await program(http, name))["program"]["subagents"] == [f"default:{name}:a1"]
    child = await program(http, f"{name}:a1")
    assert child["kind"] == "claude_code.subagent"
    assert child["program"]["parent_id"] == f"default:{name}"
    assert child["program"]["subagents"] == [f"default:{name}:a2"]


async def test_cancelling_a_session_lets_the_calls_of_its_subagents_go_down_to_the_engine(
    client: openai.AsyncOpenAI, http: Http
) -> None:
    name = a_session()
    parent = {"x-session-id": name}
    child = {"x-session-id": f"{name}.c", "x-parent-session-id": name}
    asked: dict[str, Any] = {
        "model": LLM, "messages": [{"role": "user", "content": "Go on."}], "max_tokens": SLOW_TOKENS,
        "extra_body": ENDLESS,
    }  # fmt: skip
    before = sum([(await http.engine(replica))["aborted"] for replica in await http.idle()])
    whole = asyncio.ensure_future(client.chat.completions.create(**asked, extra_headers=parent))
    stream = await client.chat.completions.create(**asked, stream=True, extra_headers=child)
    await anext(aiter(stream))
    await until(lambda: http.get(f"/api/v1/workflows/default:{name}"), lambda reply: reply.status == 200)
    reply = await http.post(f"/api/v1/workflows/default:{name}/cancel")
    assert reply.status == 202
    with pytest.raises(openai.BadRequestError, match="was cancelled"):
        await whole
    with pytest.raises(openai.APIError, match="was cancelled"):
        async for _ in stream:
            pass
    for ended in (name, f"{name}.c"):
        assert (await http.ended(f"default:{ended}"))["state"] == "cancelled"

    async def aborted() -> float:
        return sum([(await http.engine(replica))["aborted"] for replica in await http.replicas()]) - before

    await until(aborted, lambda count: count == 2)
    with pytest.raises(openai.BadRequestError, match="was cancelled"):
        await client.chat.completions.create(**asked, extra_headers=parent)


async def test_a_request_that_only_says_that_the_session_is_over_is_answered(
    client: openai.AsyncOpenAI, http: Http
) -> None:
    name = a_session()
    await react(client, {"x-session-id": name}, turns=0, stream=False)
    answer = await client.chat.completions.create(
        model=LLM, messages=[], extra_headers={"x-session-id": name, "x-dynamo-session-final": "true"}
    )
    assert answer.choices == []
    row = await http.ended(f"default:{name}")
    assert (row["state"], row["outputs"]) == ("finished", {"calls": 1, "ended_by": "final"})


async def test_an_odd_session_is_served_and_one_of_our_own_is_refused(client: openai.AsyncOpenAI, http: Http) -> None:
    odd = f"{a_session()} {'x' * 4000}"
    await react(client, {"x-session-id": odd}, turns=0, stream=False)
    with pytest.raises(openai.BadRequestError, match="x-swarmx-workflow-id"):
        await react(client, {"x-swarmx-workflow-id": odd}, turns=0, stream=False)


async def test_a_session_that_was_silent_for_long_is_answered_and_traces_can_be_left_alone(tmp_path: Path) -> None:
    settings = {
        "emulation": {"time_scale": 20.0},
        "workflows": {"transparent_idle_s": 0.2},
        "emulated": [{"model": LLM, "device": "l40s", "count": 1, "size_class": "8b"}],
    }
    with serving(settings, tmp_path) as server:
        async with (
            server.http() as http,
            openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=server.token, max_retries=0) as client,
        ):
            await all_ready(http)
            name = a_session()
            for source in ("thread-id", "x-swarmx-workflow-id"):
                await react(client, {source: f"{name}.{source}"}, turns=0, stream=False)
                row = await http.ended(f"default:{name}.{source}")
                assert row["program"]["ended_by"] == "silence"
                await react(client, {source: f"{name}.{source}"}, turns=0, stream=True)
                again = await program(http, f"{name}.{source}~2")
                assert (again["name"], len(again["calls"])) == (f"{name}.{source}", 1)
            raw = await client.chat.completions.with_raw_response.create(
                model=LLM, messages=[{"role": "user", "content": "x"}], max_tokens=5,
                extra_headers={"traceparent": TRACE.format(name)},
            )  # fmt: skip
            assert (await http.call(raw.headers["x-swarmx-call-id"]))["workflow_id"] == ""
