"""SwarmX in front of a real vLLM on this CPU (`make test-vllm`)."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import openai
import pytest
import pytest_asyncio

from swarmx.client import Api
from swarmx.core.errors import ReplicaError
from swarmx.demo.fleet import server
from swarmx.providers.process import DEFAULT_MODEL, VllmServer
from swarmx.runtime.priorities import prioritised
from tests.e2e.fleet import children

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(not DEFAULT_MODEL.exists(), reason="make setup-vllm fetches the model"),
]
_NAME = "small"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def api(folder: Path) -> AsyncIterator[Api]:
    own = VllmServer(model_dir=DEFAULT_MODEL, name=_NAME, log=folder / "vllm.log")
    try:
        url = await own.start()
        settings = {"replicas": [{"id": "real", "model": _NAME, "url": url}]}
        async with server(settings, folder) as running:
            yield running
    finally:
        await own.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def client(api: Api, folder: Path) -> AsyncIterator[openai.AsyncOpenAI]:
    token = (folder / "state" / "admin.token").read_text()
    async with openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key=token, max_retries=0) as one:
        yield one


async def test_the_openai_client_gets_a_real_answer(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=_NAME, messages=[{"role": "user", "content": "Name one colour."}], max_tokens=16, temperature=0
    )
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert 0 < answer.usage.completion_tokens <= 16


async def test_a_stream_brings_the_same_text_as_a_plain_answer(client: openai.AsyncOpenAI) -> None:
    asked: dict[str, object] = {
        "model": _NAME,
        "messages": [{"role": "user", "content": "Count from one to five."}],
        "max_tokens": 24,
        "temperature": 0,
    }
    plain = await client.chat.completions.create(**asked)  # type: ignore[call-overload]
    stream = await client.chat.completions.create(**asked, stream=True)  # type: ignore[call-overload]
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
    assert text == plain.choices[0].message.content


async def test_a_schema_is_kept_by_the_real_model(client: openai.AsyncOpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"type": "string", "maxLength": 20}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    answer = await client.chat.completions.create(
        model=_NAME,
        messages=[{"role": "user", "content": "Name one colour, as JSON."}],
        max_tokens=48,
        response_format={"type": "json_schema", "json_schema": {"name": "colour", "strict": True, "schema": schema}},
    )
    assert set(json.loads(answer.choices[0].message.content or "")) == {"colour"}


async def test_the_engines_own_counters_reach_the_list_of_replicas(api: Api) -> None:
    async with asyncio.timeout(30):
        while True:
            (row,) = (await api.get("/api/v1/replicas"))["replicas"]
            if row["signal_age_s"] is not None:
                break
            await asyncio.sleep(0.2)
    assert row["state"] == "ready"
    assert not row["emulated"]


async def test_a_request_that_the_engine_refuses_comes_back_as_its_own_error(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"(?i)context|token"):
        await client.chat.completions.create(
            model=_NAME, messages=[{"role": "user", "content": "word " * 8000}], max_tokens=16
        )


async def test_whoever_started_a_server_hears_of_its_end_and_can_start_it_again(tmp_path: Path) -> None:
    own = VllmServer(model_dir=DEFAULT_MODEL, name=_NAME, log=tmp_path / "vllm.log", cores=[0])
    before = set(children(os.getpid()))
    with pytest.raises(ReplicaError, match="never started"):
        await own.wait()
    url = await own.start()
    async with aiohttp.ClientSession() as session, session.get(f"{url}/v1/models") as response:
        assert (await response.json())["data"][0]["id"] == _NAME
    with pytest.raises(ReplicaError, match="running already"):
        await own.start()
    waiting = asyncio.create_task(own.wait())
    (pid,) = set(children(os.getpid())) - before
    workers = set(children(pid))
    assert workers
    os.kill(pid, signal.SIGKILL)
    assert await waiting == -signal.SIGKILL
    async with asyncio.timeout(30):
        while any(Path(f"/proc/{worker}").exists() for worker in workers):
            await asyncio.sleep(0.05)
    assert "Application startup complete" in own.last_words()
    await own.stop()
    again = asyncio.create_task(own.start())
    while set(children(os.getpid())) == before:
        await asyncio.sleep(0.01)
    again.cancel()
    with pytest.raises(asyncio.CancelledError):
        await again
    assert set(children(os.getpid())) == before


async def test_a_server_that_orders_by_priority_takes_the_priority_of_a_call(tmp_path: Path) -> None:
    own = VllmServer(model_dir=DEFAULT_MODEL, name=_NAME, log=tmp_path / "vllm.log", engine_order="priority")
    try:
        url = await own.start()
        asked = {"model": _NAME, "messages": [{"role": "user", "content": "Name one colour."}], "max_tokens": 4}
        body = prioritised(json.dumps(asked).encode(), time.time(), "low_first")
        headers = {"content-type": "application/json"}
        async with (
            aiohttp.ClientSession(url, headers=headers) as session,
            session.post("/v1/chat/completions", data=body) as response,
        ):
            assert response.status == 200, await response.text()
    finally:
        await own.stop()
    assert "'scheduling_policy': 'priority'" in (tmp_path / "vllm.log").read_text()


async def test_the_demo_runs_on_real_models(tmp_path: Path) -> None:
    done = await asyncio.to_thread(
        subprocess.run,
        [*(sys.executable, "-m", "swarmx", "--json", "demo", "--engine", "vllm", "--workflows", "3")],
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    everything = [row for row in json.loads(done.stdout)["rows"] if row["kind"] == "all"]
    assert all(row["finished"] == row["n"] == 3 for row in everything)
