"""The emulator over real sockets: what clients see, what it hides, and that it follows its own engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from swarmx.core.engine import EngineProfile
from swarmx.core.nouns import Replica
from swarmx.core.prompt_key import prompt_key
from swarmx.providers.emulated.provider import EmulatedProvider, EmulatedSpec

pytestmark = [pytest.mark.process, pytest.mark.asyncio(loop_scope="module")]

FAST = EngineProfile(
    model="8b",
    device="h100",
    step_base_s=6e-3,
    decode_seq_s=1e-4,
    decode_ctx_token_s=3e-8,
    prefill_token_s=4e-5,
    kv_capacity_tokens=4096,
)
SERIAL = EngineProfile(model="sdxl", device="l40s", step_base_s=0.01, call_base_s=0.05, max_batch=1)
SYSTEM = "You write."
PLANNER = "You plan."
LENGTHS = {"short": 5, "middle": 60, "long": 200, "endless": 3000}
SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    text: Replica
    image: Replica
    session: aiohttp.ClientSession
    provider: EmulatedProvider
    client: openai.AsyncOpenAI

    async def metrics(self, replica: Replica) -> dict[str, float]:
        """Metrics by name, with the finished reason appended where there is one."""
        async with self.session.get(f"{replica.url}/metrics") as response:
            text = await response.text()
        return {
            s.name.removeprefix("vllm:") + s.labels.get("finished_reason", ""): s.value
            for family in text_string_to_metric_families(text)
            for s in family.samples
            if "le" not in s.labels
        }

    async def until(self, replica: Replica, holds: Callable[[dict[str, float]], bool]) -> dict[str, float]:
        """The first metrics for which the condition holds; the test's timeout ends a wait in vain."""
        while not holds(now := await self.metrics(replica)):
            await asyncio.sleep(0.01)
        return now


def recordings() -> list[dict[str, Any]]:
    rows = [(SYSTEM, user, tokens, None) for user, tokens in LENGTHS.items()]
    rows.append((PLANNER, "plan", 9, {"ok": True}))
    return [
        {
            "key": prompt_key(system, user),
            "system_key": prompt_key(system, ""),
            "role": system,
            "model": "recorded",
            "prompt_tokens": 9,
            "output_tokens": tokens,
            "finish_reason": "stop",
            "reply": reply,
        }
        for system, user, tokens, reply in rows
    ]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    folder: Path = tmp_path_factory.mktemp("recorded")
    (folder / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in recordings()))
    provider = EmulatedProvider(
        [
            EmulatedSpec(replica_id="t", model="8b", kind="llm", device="h100", profile=FAST),
            EmulatedSpec(replica_id="i", model="sdxl", kind="image", device="l40s", profile=SERIAL),
        ],
        recorded=folder,
    )
    text, image = await provider.start()
    client = openai.AsyncOpenAI(base_url=f"{text.url}/v1", api_key="none", max_retries=0)
    async with client, aiohttp.ClientSession() as session:
        yield Fleet(text=text, image=image, session=session, provider=provider, client=client)
    await provider.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def fleet(running: Fleet) -> Fleet:
    for replica in (running.text, running.image):
        await running.until(replica, lambda m: m["num_requests_running"] + m["num_requests_waiting"] == 0)
    await running.provider.reset()
    return running


def chat(user: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]
    return {"model": "8b", "messages": messages, "max_tokens": 4000, **more}


def tool(name: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


RECURSIVE = {"required": ["a"], "properties": {"a": {"$ref": "#"}}}
CITY = {"required": ["city"], "properties": {"city": {"type": "string", "minLength": 3}, "days": {"type": "integer"}}}


async def lengths_of(fleet: Fleet, users: list[str]) -> list[int]:
    async def one(user: str) -> int:
        answer = await fleet.client.chat.completions.create(**chat(user))
        assert answer.usage is not None
        return answer.usage.completion_tokens

    return list(await asyncio.gather(*(one(user) for user in users)))


async def test_the_openai_client_gets_an_answer_of_about_the_recorded_length(fleet: Fleet) -> None:
    answer = await fleet.client.chat.completions.create(**chat("middle"))
    assert answer.usage is not None
    assert 20 < answer.usage.completion_tokens < 180
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.choices[0].message.content or "").startswith("[emulated]")


async def test_the_openai_client_streams_one_chunk_a_token_and_usage_at_the_end(fleet: Fleet) -> None:
    whole = await fleet.client.chat.completions.create(**chat("middle"))
    stream = await fleet.client.chat.completions.create(
        **chat("middle"), stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].usage == whole.usage
    assert whole.usage is not None
    assert len(chunks) == whole.usage.completion_tokens + 2  # the role before, the usage after
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks[-3:-1]] == [None, "stop"]


async def test_the_openai_client_gets_text_completions(fleet: Fleet) -> None:
    answer = await fleet.client.completions.create(model="8b", prompt="Once", max_tokens=6)
    stream = await fleet.client.completions.create(model="8b", prompt="Once", max_tokens=6, stream=True)
    assert "".join([c.choices[0].text async for c in stream]) == answer.choices[0].text
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 6


async def test_a_tool_that_must_be_called_is_called_with_the_smallest_arguments(fleet: Fleet) -> None:
    answer = await fleet.client.chat.completions.create(
        **chat("middle", tools=[tool("weather", CITY), tool("time")], tool_choice=named("weather"))
    )
    (choice,) = answer.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (called,) = choice.message.tool_calls or []
    assert called.type == "function"
    assert (called.function.name, json.loads(called.function.arguments)) == ("weather", {"city": "xxx"})
    assert called.id
    assert answer.usage is not None
    assert 0 < answer.usage.completion_tokens < 20


async def test_a_streamed_tool_call_is_the_same_as_a_whole_one(fleet: Fleet) -> None:
    asked = chat("middle", tools=[tool("weather", CITY), tool("time")], tool_choice="required")
    whole = await fleet.client.chat.completions.create(**asked)
    async with fleet.client.chat.completions.stream(**asked) as stream:
        streamed = await stream.get_final_completion()
    functions = [answer.choices[0].message.tool_calls[0].function for answer in (whole, streamed)]  # type: ignore
    assert len({(function.name, function.arguments) for function in functions}) == 1
    assert streamed.choices[0].finish_reason == "tool_calls"


async def test_a_free_model_calls_tools_until_it_answers_and_does_so_again(fleet: Fleet) -> None:
    async def run() -> list[str]:
        messages, seen = chat("middle")["messages"], []
        while True:
            answer = await fleet.client.chat.completions.create(
                model="8b", messages=messages, tools=[tool("a"), tool("b"), tool("c")], max_tokens=4000
            )
            message = answer.choices[0].message
            if not message.tool_calls:
                assert (message.content or "").startswith("[emulated]")
                return seen
            assert message.tool_calls[0].type == "function"
            seen.append(message.tool_calls[0].function.name)
            called = {"id": "1", "type": "function", "function": {"name": seen[-1], "arguments": "{}"}}
            messages = [
                *messages,
                {"role": "assistant", "content": None, "tool_calls": [called]},
                {"role": "tool", "tool_call_id": "1", "content": f"result {len(seen)}"},
            ]

    assert await run() == await run()


async def test_tools_that_are_offered_count_as_prompt(fleet: Fleet) -> None:
    bare = await fleet.client.chat.completions.create(**chat("short"))
    offered = await fleet.client.chat.completions.create(**chat("short", tools=[tool("x" * 450)], tool_choice="none"))
    assert bare.usage is not None
    assert offered.usage is not None
    assert offered.usage.prompt_tokens > bare.usage.prompt_tokens + 100
    assert not offered.choices[0].message.tool_calls


async def test_a_tool_call_that_is_cut_ends_by_length(fleet: Fleet) -> None:
    asked = chat("x", tools=[tool("weather", CITY)], tool_choice="required") | {"max_tokens": 1}
    answer = await fleet.client.chat.completions.create(**asked)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 1


async def test_a_json_schema_is_met(fleet: Fleet) -> None:
    for schema, expected in ((SCHEMA, {"ok": True}), ({"type": "array", "minItems": 1, "items": {"enum": [7]}}, [7])):
        answer = await fleet.client.chat.completions.create(
            model="8b",
            messages=[{"role": "system", "content": PLANNER}, {"role": "user", "content": "plan"}],
            response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
        )
        assert json.loads(answer.choices[0].message.content or "") == expected


async def test_nothing_before_the_end_tells_how_long_an_answer_will_be(fleet: Fleet) -> None:
    """Two prompts of the same size whose answers differ by a factor of 600 look the same while they are running."""
    assert len("short") + 2 == len("endless")
    seen = []
    for user in ("short  ", "endless"):
        async with fleet.session.post(f"{fleet.text.url}/v1/chat/completions", json=chat(user, stream=True)) as answer:
            headers = {k: v for k, v in answer.headers.items() if k.lower() != "date"}
            lines = [await answer.content.readline() for _ in range(4)]
            chunks = [json.loads(line.removeprefix(b"data: ")) for line in lines if line.strip()]
            bare = [{k: v for k, v in c.items() if k not in ("id", "created")} for c in chunks]
            for chunk in bare:
                chunk["choices"][0]["delta"]["content"] = len(chunk["choices"][0]["delta"]["content"]) > 0
            metrics = await fleet.metrics(fleet.text)
            seen.append((headers, bare, sorted(metrics)))
            assert "Content-Length" not in headers
            assert chunks[0]["id"].rsplit("-", 1)[0] == "chatcmpl-emulated"
    assert seen[0] == seen[1]
    assert all("usage" not in chunk for chunk in seen[1][1])


async def test_an_answer_that_is_not_streamed_starts_only_when_it_is_complete(fleet: Fleet) -> None:
    async with fleet.session.post(f"{fleet.text.url}/v1/chat/completions", json=chat("middle")) as answer:
        metrics = await fleet.metrics(fleet.text)  # the headers are here, the body has not been read
        assert metrics["request_success_totalstop"] == 1
        await answer.read()


async def test_every_response_says_that_it_is_emulated(fleet: Fleet) -> None:
    for path in ("/health", "/metrics", "/v1/models", "/emulator/report", "/nowhere"):
        async with fleet.session.get(fleet.text.url + path) as response:
            assert response.headers["x-swarmx-emulated"] == "1"
    async with fleet.session.post(f"{fleet.text.url}/v1/chat/completions", json=chat("short", stream=True)) as response:
        assert response.headers["x-swarmx-emulated"] == "1"
        await response.read()


async def test_the_models_route_names_the_model(fleet: Fleet) -> None:
    assert [m.id async for m in fleet.client.models.list()] == ["8b"]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_its_slot(fleet: Fleet, stream: bool) -> None:
    url = f"{fleet.text.url}/v1/chat/completions"

    async def ask() -> None:
        async with fleet.session.post(url, json=chat("endless", stream=stream)) as answer:
            await answer.read()

    task = asyncio.create_task(ask())
    await fleet.until(fleet.text, lambda m: m["num_requests_running"] == 1 and m["kv_cache_usage_perc"] > 0)
    task.cancel()
    after = await fleet.until(fleet.text, lambda m: m["num_requests_running"] == 0)
    assert after["request_success_totalabort"] == 1
    assert after["kv_cache_usage_perc"] == 0
    assert after["generation_tokens_total"] < 3000


async def test_a_single_call_takes_what_the_analytic_model_says(fleet: Fleet) -> None:
    (tokens,) = await lengths_of(fleet, ["long"])
    metrics = await fleet.metrics(fleet.text)
    prompt = int(metrics["prompt_tokens_total"])
    assert metrics["e2e_request_latency_seconds_sum"] == pytest.approx(FAST.alone_s(prompt, tokens), rel=0.01)
    assert metrics["time_to_first_token_seconds_sum"] == pytest.approx(FAST.alone_s(prompt, 1), rel=0.01)
    assert metrics["inter_token_latency_seconds_count"] == tokens - 1
    assert metrics["generation_tokens_total"] == tokens


async def test_concurrent_calls_share_their_steps(fleet: Fleet) -> None:
    tokens = await lengths_of(fleet, [f"long\n\n{i}" for i in range(8)])
    metrics = await fleet.metrics(fleet.text)
    alone_s = sum(FAST.alone_s(20, n) for n in tokens)
    # one after the other, the mean call would end after about half of all the work
    assert metrics["e2e_request_latency_seconds_sum"] / 8 < 0.25 * alone_s
    assert metrics["e2e_request_latency_seconds_sum"] < 1.5 * alone_s


async def test_equal_beginnings_hit_the_prefix_cache(fleet: Fleet) -> None:
    context = "common ground " * 200
    await lengths_of(fleet, [f"short\n\n{context}"])
    await lengths_of(fleet, [f"short\n\n{context} and more"])
    metrics = await fleet.metrics(fleet.text)
    assert 0.3 < metrics["prefix_cache_hits_total"] / metrics["prefix_cache_queries_total"] < 0.5


async def post(fleet: Fleet, replica: Replica, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
    async with fleet.session.post(replica.url + path, data=body) as response:
        return response.status, json.loads(await response.read())["error"]


CHAT = "/v1/chat/completions"
IMAGES = "/v1/images/generations"


def image(**more: Any) -> dict[str, Any]:
    return {"model": "sdxl", "prompt": "a cat", **more}


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        (CHAT, b"{", 400, "not JSON"),
        (CHAT, b"\xff\xfe", 400, "not JSON"),
        (CHAT, b"[]", 400, "not valid"),
        (CHAT, b'{"model": "8b", "messages": [], "stop": ' + b"[" * 100_000, 400, "not JSON"),
        (CHAT, {"model": "8b"}, 400, "messages"),
        (CHAT, chat("x", messages=[]), 400, "messages is empty"),
        (CHAT, chat("x", messages=[{"role": "user", "content": 5}]), 400, "not valid"),
        (CHAT, chat("x", model="other"), 404, "`other` does not exist"),
        (CHAT, chat("x", n=2), 400, "exactly one answer"),
        (CHAT, chat("x", max_tokens=0), 400, "max_tokens is 0"),
        (CHAT, chat("x", max_tokens="many"), 400, "not valid"),
        (CHAT, chat("x", tools=[{}]), 400, "not valid"),
        (CHAT, chat("x", tools=[tool("f")], tool_choice=named("g")), 400, "'g', which is not among the tools"),
        (CHAT, chat("x", tools=[tool("f", RECURSIVE)], tool_choice="required"), 400, "'f' are no schema"),
        (CHAT, chat("x", response_format={"type": "xml"}), 400, "'xml' is not supported"),
        (CHAT, chat("word " * 5000), 400, "maximum context length is 4096 tokens"),
        ("/v1/completions", {"model": "8b", "prompt": ["a", "b"]}, 400, "exactly one"),
        ("/v1/embeddings", {}, 404, "Not Found"),
        ("/health", {}, 405, "Method Not Allowed"),
        (IMAGES, image(model="8b"), 404, "`8b` does not exist"),
        (IMAGES, image(n=5), 400, "n is 5, expected 1 to 4"),
        (IMAGES, image(steps=0), 400, "steps is 0"),
        (IMAGES, image(size="9999x1"), 400, "'9999x1', expected WxH"),
        (IMAGES, image(size="big"), 400, "'big', expected WxH"),
        (IMAGES, image(response_format="url"), 400, "expected b64_json"),
        (IMAGES, b"null", 400, "not valid"),
    ],
)
async def test_garbage_gets_a_clear_error_and_no_slot(
    fleet: Fleet, path: str, body: dict[str, Any] | bytes, status: int, message: str
) -> None:
    replica = fleet.image if path == IMAGES else fleet.text
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    got, error = await post(fleet, replica, path, raw)
    assert got == status == error["code"]
    assert message in error["message"]
    assert (await fleet.metrics(replica))["num_requests_running"] == 0


async def test_images_are_generated_one_after_the_other(fleet: Fleet) -> None:
    client = fleet.client.with_options(base_url=f"{fleet.image.url}/v1")
    one: Awaitable[Any] = client.images.generate(model="sdxl", prompt="a cat", size="1024x1024", n=4)
    two: Awaitable[Any] = client.images.generate(
        model="sdxl", prompt="a dog", size="1024x1024", extra_body={"steps": 90}
    )
    pictures = await asyncio.gather(one, two)
    assert [len(p.data) for p in pictures] == [4, 1]
    metrics = await fleet.metrics(fleet.image)
    work_s = [0.05 + 120 * 0.01, 0.05 + 90 * 0.01]
    waited_s = metrics["request_queue_time_seconds_sum"]
    assert metrics["e2e_request_latency_seconds_sum"] == pytest.approx(sum(work_s) + waited_s, rel=0.01)
    assert waited_s > 0.5 * min(work_s)
    assert metrics["generation_tokens_total"] == 210


async def test_an_image_whose_client_left_is_not_finished(fleet: Fleet) -> None:
    url = fleet.image.url + IMAGES
    tasks = [asyncio.create_task(fleet.session.post(url, json=image(steps=200, n=4))) for _ in range(2)]
    await fleet.until(fleet.image, lambda m: m["num_requests_running"] == 1 and m["num_requests_waiting"] == 1)
    for task in tasks:
        task.cancel()
    after = await fleet.until(fleet.image, lambda m: m["num_requests_running"] + m["num_requests_waiting"] == 0)
    assert after["request_success_totalabort"] == 2


async def test_a_reset_needs_an_idle_replica(fleet: Fleet) -> None:
    task = asyncio.create_task(
        fleet.session.post(f"{fleet.text.url}/v1/chat/completions", json=chat("endless", stream=False))
    )
    await fleet.until(fleet.text, lambda m: m["num_requests_running"] == 1)
    status, error = await post(fleet, fleet.text, "/emulator/reset", b"")
    assert status == 409
    assert "idle" in error["message"]
    task.cancel()


async def test_the_report_counts_requests_and_lags(fleet: Fleet) -> None:
    await lengths_of(fleet, ["short", "middle"])
    report = (await fleet.provider.reports())["t"]
    assert report.requests == 2
    assert 0 <= report.lag_p50_ms <= report.lag_p99_ms <= report.lag_max_ms
    assert report.step_p50_ms == pytest.approx(6.1, abs=1.0)
