"""An agent with a real model in a real vLLM on this CPU: it calls tools as the wire wants it (`make test-vllm`)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from swarmx.client import Api
from swarmx.demo.fleet import server
from swarmx.providers.process import DEFAULT_MODEL, VllmServer
from tests.e2e.fleet import until

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(not DEFAULT_MODEL.exists(), reason="make setup-vllm fetches the model"),
]
_NAME = "small"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def api(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Api]:
    folder = tmp_path_factory.mktemp("vllm")
    own = VllmServer(model_dir=DEFAULT_MODEL, name=_NAME, log=folder / "vllm.log")
    try:
        settings = {"replicas": [{"id": "real", "model": _NAME, "url": await own.start()}]}
        async with server(settings, Path(folder)) as running:
            yield running
    finally:
        await own.stop()


async def ended(api: Api, **agent: Any) -> dict[str, Any]:
    """The workflow of one agent, once it has ended."""
    node = {"kind": "agent", "model": _NAME, "max_tokens": 64, "temperature": 0, **agent}
    workflow_id = (await api.post("/api/v1/workflows", json={"name": "one", "nodes": {"a": node}}))["workflow_id"]

    async def ask() -> dict[str, Any]:
        found: dict[str, Any] = await api.get(f"/api/v1/workflows/{workflow_id}")
        return found

    return await until(ask, lambda row: row["ended_at_s"] is not None, deadline_s=300.0)


async def test_a_real_model_calls_a_function_and_is_told_what_it_left(api: Api) -> None:
    prompt = 'Call the tool "upper" with the text "oslo", and tell me what it says.'
    row = await ended(api, prompt=prompt, functions=["upper"], max_steps=3)
    assert row["state"] == "finished", row["error"]
    assert row["outputs"]["a"]["steps"] >= 2, "its first step asks for the tool"
    used = [node for node in row["nodes"] if node["kind"] == "tool"]
    assert used
    assert row["outputs"]["a"]["text"]


async def test_a_real_model_answers_by_the_schema_where_nothing_else_is_left(api: Api) -> None:
    row = await ended(api, prompt="What is the capital of France?", schema=CITY, max_steps=1)
    assert row["state"] == "finished", row["error"]
    assert set(row["outputs"]["a"]["json"]) == {"city"}
    assert row["outputs"]["a"]["usage"]["prompt_tokens"] > 0
