"""Replicas of tools and of a real vLLM on nodes of a real Ray, and a gateway that is no node of the cluster."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from swarmx.providers.process import DEFAULT_MODEL
from tests.e2e.fleet import serving, until
from tests.providers.ray.conftest import HAS_RAY, NO_RAY, VLLM, Nodes
from tests.providers.tools.workshop import needs_sandbox

pytestmark = [
    pytest.mark.skipif(not HAS_RAY, reason=NO_RAY),
    pytest.mark.process,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore"),
]

PATIENCE_S = 600.0
PATIENT = {
    "watch": {"every_s": 0.5, "timeout_s": 20.0, "failures": 20},
    "scaler": {"every_s": 0.5, "start_floor_s": 500.0},
    "router": {"queue_timeout_s": 500.0, "call_timeout_s": 500.0},
}


@pytest.fixture
def tools() -> Iterator[Path]:
    """A file of one tool. Its folder can be read by every user, since the sandbox is not root."""
    folder = Path(tempfile.mkdtemp(prefix="swarmx-tools-"))
    folder.chmod(0o755)
    program = folder / "statistics_tool.py"
    program.write_text("def main(numbers):\n    return {'mean': sum(numbers) / len(numbers)}\n")
    program.chmod(0o644)
    (folder / "tools.toml").write_text(
        f"""
pool = "sandbox"

[[python]]
name = "statistics"
description = "The mean of numbers."
file = "{program}"
parameters = {{type = "object", properties = {{numbers = {{type = "array"}}}}, required = ["numbers"]}}
idempotent = true
"""
    )
    yield folder / "tools.toml"
    shutil.rmtree(folder)


@needs_sandbox
async def test_a_workflow_uses_a_tool_whose_replica_ray_placed(nodes: Nodes, tools: Path, tmp_path: Path) -> None:
    pool = {"provider": "tools", "device": "cpu", "kind": "tool", "model": "sandbox", "file": str(tools)}
    settings = {"elastic": [{**pool, "min": 1, "max": 1}], "ray": {"address": nodes.address, "namespace": "tools"}}
    mean: dict[str, Any] = {"kind": "tool", "tool": "statistics", "args": {"numbers": [1, 2, 6]}}
    workflow = {"name": "mean", "nodes": {"mean": mean}, "outputs": {"mean": "{{ mean.mean }}"}}
    with serving({**PATIENT, **settings}, tmp_path) as server:
        async with server.http() as client:
            offered = await until(
                lambda: client.get("/api/v1/workflow_tools"), lambda reply: reply.body["tools"], deadline_s=PATIENCE_S
            )
            assert [tool["name"] for tool in offered.body["tools"]] == ["statistics"]
            row = await client.ended(await client.submitted(workflow), deadline_s=PATIENCE_S)
            assert row["outputs"] == {"mean": 3.0}, row
            (replica,) = (await client.replicas()).values()
            assert replica["provider"] == "tools"
            assert (await client.post(replica["url"] + "/v1/tools/call", token="stranger", json={})).status == 401


@pytest.mark.vllm
@pytest.mark.skipif(not (VLLM / "vllm").exists(), reason="there is no vLLM for the nodes; `make setup-vllm`")
@pytest.mark.skipif(not DEFAULT_MODEL.exists(), reason="there is no model; `make setup-vllm` fetches one")
async def test_a_real_vllm_that_ray_placed_answers_by_the_gateway(nodes: Nodes, tmp_path: Path) -> None:
    group = {"provider": "process", "device": "cpu", "model": "small", "folder": str(DEFAULT_MODEL.resolve())}
    settings = {
        "elastic": [{**group, "min": 1, "max": 1, "limit": 1, "start_s": 90.0}],
        "ray": {"address": nodes.address, "namespace": "vllm"},
    }
    body = {"model": "small", "messages": [{"role": "user", "content": "Count to three."}], "max_tokens": 8}
    with serving({**PATIENT, **settings}, tmp_path) as server:
        async with server.http() as client:
            rows = await until(
                client.replicas,
                lambda rows: any(row["state"] == "ready" for row in rows.values()),
                deadline_s=PATIENCE_S,
            )
            (replica,) = rows.values()
            url = replica["url"] + "/v1/chat/completions"
            assert (await client.post(url, token="stranger", json=body)).status == 401
            patient = aiohttp.ClientTimeout(total=PATIENCE_S)  # the first answer takes long on a busy core
            reply = await client.post("/v1/chat/completions", json=body, timeout=patient)
            assert reply.status == 200, reply
            assert reply.body["usage"]["completion_tokens"] > 0


async def test_a_gateway_that_is_no_node_places_and_ends_replicas_by_ray_client(nodes: Nodes, tmp_path: Path) -> None:
    group = {"model": "qwen3-8b", "device": "l40s", "size_class": "8b", "start_s": 20.0, "min": 1, "max": 1}
    settings = {
        "elastic": [group],
        "ray": {"address": nodes.client_address, "namespace": "client"},
        "emulation": {"time_scale": 20.0},
    }
    body = {"model": "qwen3-8b", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 16}
    with serving({**PATIENT, **settings}, tmp_path) as server:
        async with server.http() as client:
            rows = await until(
                client.replicas,
                lambda rows: any(row["state"] == "ready" for row in rows.values()),
                deadline_s=PATIENCE_S,
            )
            (replica,) = rows.values()
            assert (await client.post("/v1/chat/completions", json=body)).status == 200
            assert (await client.get(replica["url"] + "/health", token="")).status == 200
        assert server.stop() == 0
    async with aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.ClientError):
            await session.get(replica["url"] + "/health")
