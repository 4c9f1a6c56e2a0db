"""The unmodified OpenAI client against a real server over emulated replicas."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import openai
import pytest

from tests.e2e.fleet import Http, Server, until

pytestmark = pytest.mark.process

LLM = "qwen3-8b"
HELLO: Any = [{"role": "user", "content": "Say hello."}]
ENDLESS = {"ignore_eos": True}  # the answer is as long as max_tokens
SLOW_TOKENS = 30_000  # 15 s and more on the fastest of the replicas


@pytest.fixture
async def client(server: Server, http: Http) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=server.token, max_retries=0) as found:
        yield found


async def aborted(http: Http) -> float:
    return sum([(await http.engine(name))["aborted"] for name in await http.replicas()])


async def busy(http: Http) -> str:
    """The replica that runs a request, by its own counters."""

    async def ask() -> list[str]:
        return [name for name in await http.replicas() if (await http.engine(name))["running"]]

    return (await until(ask, lambda names: len(names) == 1))[0]


def test_the_synchronous_client_chats(server: Server, http: Http) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.token, max_retries=0) as client:
        answer = client.chat.completions.create(model=LLM, messages=HELLO, max_tokens=20)
        assert answer.choices[0].message.content
        assert answer.usage is not None
        assert answer.usage.completion_tokens <= 20
        streamed = client.chat.completions.create(model=LLM, messages=HELLO, max_tokens=20, stream=True)
        said = "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices)
        assert said == answer.choices[0].message.content


async def test_an_answer_says_which_call_it_was_and_where_it_went(client: openai.AsyncOpenAI, http: Http) -> None:
    raw = await client.chat.completions.with_raw_response.create(model=LLM, messages=HELLO, max_tokens=9)
    record = await http.call(raw.headers["x-swarmx-call-id"])
    assert record["state"] == "finished"
    assert record["replica_id"] == raw.headers["x-swarmx-replica"]
    assert str(record["attempts"]) == raw.headers["x-swarmx-attempts"] == "1"
    completion = raw.parse()
    assert completion.usage is not None
    assert record["work_done"] == completion.usage.completion_tokens
    assert record["workflow_id"] == ""


async def test_a_stream_without_usage_has_one_chunk_a_token_and_none_with_usage(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=LLM, messages=HELLO, max_tokens=30, stream=True, extra_body=ENDLESS
    )
    chunks = [chunk async for chunk in stream]
    assert sum(bool(c.choices and c.choices[0].delta.content) for c in chunks) == 30
    assert all(c.usage is None for c in chunks)
    assert chunks[-1].choices[0].finish_reason == "length"


async def test_a_stream_with_usage_ends_with_it_and_it_is_recorded(client: openai.AsyncOpenAI, http: Http) -> None:
    raw = await client.chat.completions.with_raw_response.create(
        model=LLM, messages=HELLO, max_tokens=30, stream=True, stream_options={"include_usage": True},
        extra_body=ENDLESS,
    )  # fmt: skip
    chunks = [chunk async for chunk in raw.parse()]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 30
    record = await http.call(raw.headers["x-swarmx-call-id"])
    assert (record["state"], record["work_done"]) == ("finished", 30.0)
    assert record["first_token_at_s"] is not None


async def test_the_list_of_models_is_that_of_the_fleet(client: openai.AsyncOpenAI) -> None:
    assert {model.id async for model in client.models.list()} == {LLM, "sdxl"}


async def test_an_image_comes_as_a_picture(client: openai.AsyncOpenAI) -> None:
    answer = await client.images.generate(model="sdxl", prompt="A bee", size="256x256", n=2, extra_body={"steps": 4})
    assert answer.data is not None
    assert [base64.b64decode(item.b64_json or "")[:4] for item in answer.data] == [b"\x89PNG"] * 2


async def test_the_steps_of_an_image_reach_the_replica(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="steps is 201, expected 1 to 200"):
        await client.images.generate(model="sdxl", prompt="A bee", extra_body={"steps": 201})


async def test_a_wrong_token_is_an_authentication_error(server: Server, http: Http) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="swx-wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError, match="unknown token") as caught:
            await stranger.chat.completions.create(model=LLM, messages=HELLO)
        assert caught.value.response.headers["www-authenticate"] == "Bearer"
        with pytest.raises(openai.AuthenticationError):
            await stranger.models.list()


async def test_a_viewer_may_not_make_calls(server: Server, http: Http) -> None:
    token = server.key("openai-viewer", "viewer")
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=token, max_retries=0) as viewer:
        reply = await until(lambda: http.get("/v1/models", token=token), lambda reply: reply.status == 200)
        assert reply.body["object"] == "list"
        with pytest.raises(openai.PermissionDeniedError, match="this needs one of: client, operator, admin"):
            await viewer.chat.completions.create(model=LLM, messages=HELLO)


async def test_an_unknown_model_is_not_found_and_the_known_ones_are_named(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-9'; there are: qwen3-8b, sdxl"):
        await client.chat.completions.create(model="gpt-9", messages=HELLO)


async def test_a_model_asked_at_the_wrong_endpoint_is_told_the_right_one(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="asked at /v1/images/generations") as caught:
        await client.chat.completions.create(model="sdxl", messages=HELLO)
    assert caught.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="asked at /v1/chat/completions"):
        await client.images.generate(model=LLM, prompt="A bee")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "no role"}]}, "messages"),
        ({"messages": HELLO, "max_tokens": 0}, "max_tokens"),
        ({"messages": HELLO, "max_tokens": "many"}, "max_tokens"),
        ({"messages": "Say hello."}, "messages"),
    ],
)
async def test_a_bad_request_names_the_field(client: openai.AsyncOpenAI, body: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model=LLM, **body)
    assert caught.value.param == param


async def test_what_the_replica_refuses_comes_through_in_its_own_words(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="emulator gives exactly one answer") as caught:
        await client.chat.completions.create(model=LLM, messages=HELLO, n=3)
    assert caught.value.response.headers["x-swarmx-attempts"] == "1"
    with pytest.raises(openai.BadRequestError, match="emulator gives exactly one answer"):
        await client.chat.completions.create(model=LLM, messages=HELLO, n=3, stream=True)


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"model": "\\ud800"}', b"[1]", b'"text"', b'{"model": 5}', b"{}"],
    ids=["empty", "cut", "not_utf8", "deep", "half_surrogate", "list", "text", "number", "no_model"],
)
async def test_a_body_that_is_not_a_request_is_a_bad_request_in_openais_shape(http: Http, raw: bytes) -> None:
    reply = await http.post("/v1/chat/completions", data=raw, headers={"content-type": "application/json"})
    assert reply.status == 400
    assert set(reply.body["error"]) == {"message", "type", "param", "code"}
    assert reply.body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "chunked"])
async def test_a_body_that_is_too_large_is_refused_with_413(http: Http, announced: bool) -> None:
    body = json.dumps({"model": LLM, "messages": [{"role": "user", "content": "x" * 3_000_000}]}).encode()

    async def parts() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 65536):
            yield body[start : start + 65536]

    reply = await http.post("/v1/chat/completions", data=io.BytesIO(body) if announced else parts())
    assert reply.status == 413
    assert "larger than 2000000 bytes" in reply.body["error"]["message"]


async def test_an_unknown_path_under_v1_is_an_openai_error(http: Http) -> None:
    reply = await http.post("/v1/embeddings", json={})
    assert reply.status == 404
    assert reply.body["error"]["type"] == "not_found_error"


async def test_a_client_that_leaves_in_mid_stream_frees_the_slot(client: openai.AsyncOpenAI, http: Http) -> None:
    await http.idle()
    before = await aborted(http)
    raw = await client.chat.completions.with_raw_response.create(
        model=LLM, messages=HELLO, max_tokens=SLOW_TOKENS, stream=True, extra_body=ENDLESS
    )
    stream = raw.parse()
    await anext(stream)
    assert (await http.engine(await busy(http)))["running"] == 1
    await stream.close()
    await http.idle()
    assert await aborted(http) == before + 1
    record = await http.call(raw.headers["x-swarmx-call-id"])
    assert record["state"] == "cancelled"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_before_its_answer_begins_frees_the_slot(
    server: Server, http: Http, stream: bool
) -> None:
    await http.idle()
    before = await aborted(http)
    # the prompt takes a while to be read, so that no token is there when the client leaves
    prompt = [{"role": "user", "content": f"{uuid4().hex} " + "word " * (20_000 if stream else 10)}]
    body = {"model": LLM, "messages": prompt, "max_tokens": SLOW_TOKENS, "stream": stream, **ENDLESS}
    task = asyncio.create_task(http.post("/v1/chat/completions", json=body))
    await busy(http)  # by the engines: one that the books name may not have heard of the call
    task.cancel()
    await asyncio.wait({task})
    await http.idle()
    await until(lambda: aborted(http), lambda count: count == before + 1)


async def test_a_client_that_leaves_while_it_sends_is_no_error(server: Server, http: Http) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    before = server.log.count("unexpected error")
    _, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {server.token}\r\n"
    writer.write(head.encode() + b"content-length: 1000\r\n\r\n{")
    await writer.drain()
    await asyncio.sleep(0.2)  # lets the request begin; if it has not, the test proves less but does not fail
    writer.close()
    await writer.wait_closed()
    assert (await http.get("/healthz")).status == 200
    assert server.log.count("unexpected error") == before


async def test_calls_under_one_header_are_one_workflow_that_a_final_call_ends(
    client: openai.AsyncOpenAI, http: Http
) -> None:
    name = f"chat-{uuid4().hex[:8]}"
    headers = {"x-swarmx-workflow-id": name, "x-swarmx-workflow-kind": "support", "x-swarmx-role": "helper"}

    async def say(node: str, **more: str) -> None:
        own = {**headers, "x-swarmx-node": node, **more}
        await client.chat.completions.create(model=LLM, messages=HELLO, max_tokens=9, extra_headers=own)

    await asyncio.gather(say("a"), say("b"))
    row = (await http.get(f"/api/v1/workflows/default:{name}")).body
    assert (row["mode"], row["kind"], row["name"], row["state"]) == ("transparent", "support", name, "running")
    stream = await client.chat.completions.create(
        model=LLM, messages=HELLO, max_tokens=9, stream=True,
        extra_headers={**headers, "x-swarmx-node": "c", "x-swarmx-workflow-final": "true"},
    )  # fmt: skip
    assert [chunk async for chunk in stream]
    row = await http.ended(f"default:{name}")
    assert row["outputs"] == {"calls": 3, "ended_by": "final"}
    row = await until(
        lambda: http.get(f"/api/v1/workflows/default:{name}"), lambda reply: len(reply.body["calls"]) == 3
    )
    calls = row.body["calls"]
    assert {call["node"] for call in calls} == {"a", "b", "c"}
    assert {call["role"] for call in calls} == {"helper"}
    with pytest.raises(openai.BadRequestError, match="has ended"):
        await say("d")


async def test_a_final_call_that_is_abandoned_still_ends_its_workflow(http: Http) -> None:
    name = f"left-{uuid4().hex[:8]}"
    headers = {"x-swarmx-workflow-id": name, "x-swarmx-workflow-final": "true"}
    prompt = [{"role": "user", "content": f"{name} " + "word " * 20_000}]
    body = {"model": LLM, "messages": prompt, "max_tokens": SLOW_TOKENS, "stream": True, **ENDLESS}
    task = asyncio.create_task(http.post("/v1/chat/completions", json=body, headers=headers))
    await until(lambda: http.get(f"/api/v1/workflows/default:{name}"), lambda reply: reply.status == 200)
    task.cancel()
    await asyncio.wait({task})
    assert (await http.ended(f"default:{name}"))["state"] == "finished"


async def test_a_workflow_id_that_cannot_be_one_is_a_bad_request(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="x-swarmx-workflow-id"):
        await client.chat.completions.create(
            model=LLM, messages=HELLO, extra_headers={"x-swarmx-workflow-id": "a/b"}, max_tokens=3
        )


async def test_many_calls_at_once_are_all_answered(client: openai.AsyncOpenAI, http: Http) -> None:
    before = {name: row["calls"] for name, row in (await http.idle()).items()}

    async def one(number: int) -> int:
        words: Any = [{"role": "user", "content": f"Question {number}"}]
        answer = await client.chat.completions.create(model=LLM, messages=words, max_tokens=40)
        assert answer.usage is not None
        return answer.usage.completion_tokens

    lengths = await asyncio.gather(*(one(number) for number in range(40)))
    assert all(0 < length <= 40 for length in lengths)
    rows = await http.idle()
    taken = {name: row["calls"] - before[name] for name, row in rows.items() if row["model"] == LLM}
    assert sum(taken.values()) == 40
