"""The scaler starts a real vLLM on this CPU when there is none, and drains it again without losing a call."""

import asyncio
from pathlib import Path

import openai
import pytest

from swarmx.demo.fleet import server
from swarmx.memory.audit import LOG_NAME, read_log, verify_files
from swarmx.providers.process import DEFAULT_MODEL
from tests.e2e.fleet import until

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not DEFAULT_MODEL.exists(), reason="make setup-vllm fetches the model"),
]
_NAME = "small"
_START_S = 400.0


async def test_a_real_server_is_started_for_a_call_and_drained_without_losing_one(tmp_path: Path) -> None:
    settings = {
        "router": {"queue_timeout_s": _START_S, "call_timeout_s": _START_S},
        "scaler": {"policy": "static", "every_s": 1.0, "start_floor_s": _START_S, "drain_s": 300.0},
        "coordinator": {"engine": "off"},
        "elastic": [
            {
                "model": _NAME,
                "device": "cpu",
                "provider": "process",
                "folder": str(DEFAULT_MODEL.resolve()),
                "min": 0,
                "max": 1,
                "limit": 1,
                "start_s": 90.0,
            },
        ],
        # So that the server is up before there is a replica of the group: `demo.fleet.server` waits for some replica.
        "emulated": [{"model": "sdxl", "device": "h100", "count": 1, "kind": "image"}],
    }
    async with server(settings, tmp_path) as api:
        token = (tmp_path / "state" / "admin.token").read_text()
        async with openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key=token, max_retries=0, timeout=600.0) as client:

            async def call(tokens: int) -> openai.types.chat.ChatCompletion:
                return await client.chat.completions.create(
                    model=_NAME, messages=[{"role": "user", "content": "Tell a story."}], max_tokens=tokens
                )

            async def states() -> list[str]:
                rows = (await api.get("/api/v1/replicas"))["replicas"]
                return [row["state"] for row in rows if row["model"] == _NAME and row["state"] != "gone"]

            async def scale(replicas: int) -> None:
                body = {"arguments": {"model": _NAME, "replicas": replicas}, "dry_run": False}
                assert (await api.post("/api/v1/tools/scale_model", json=body))["state"] == "applied"

            waiting = asyncio.create_task(call(8))  # there is no replica yet: it waits for one
            await scale(1)
            assert (await waiting).choices[0].message.content
            assert await states() == ["ready"]

            long = asyncio.create_task(call(64))
            await until(lambda: api.get("/api/v1/replicas"), lambda r: any(x["in_flight"] for x in r["replicas"]))
            await scale(0)
            answer = await long
            assert answer.usage is not None
            assert answer.usage.completion_tokens > 8
            await until(states, lambda found: not found)

            async def ended() -> list[str]:
                records = (await api.get("/api/v1/audit", limit=20))["records"]
                return [r["entry"]["tool"] for r in records if r["entry"]["kind"] == "outcome"]

            # It is out of rotation before its process has ended, which takes vLLM some seconds.
            await until(ended, lambda tools: "drain" in tools)
    assert verify_files(tmp_path / "state").sound
    entries = [record.entry for record in read_log(tmp_path / "state" / LOG_NAME)]
    done = [(e.tool, e.outcome) for e in entries if e.kind == "outcome" and e.tool in ("deploy", "drain")]
    assert done == [("deploy", "applied"), ("drain", "applied")]
