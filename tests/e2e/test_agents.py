"""Agents for real: a server, an emulated engine that calls tools, a replica that has them, and what goes wrong."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.e2e.fleet import Http, all_ready, serving, until
from tests.e2e.toolshed import offered, shed
from tests.providers.tools.workshop import needs_sandbox, running

pytest.importorskip("mcp", reason="the MCP client is not installed: pip install 'swarmx[mcp]'")
pytestmark = [pytest.mark.process, pytest.mark.asyncio(loop_scope="module"), needs_sandbox]

ENGINE = "qwen3-8b-l40s-0"
VERDICT = {"type": "object", "properties": {"verdict": {"type": "string"}}, "required": ["verdict"]}
AGENT = {"kind": "agent", "model": "qwen3-8b", "role": "scout", "prompt": "Look at {{ item }}.", "max_tokens": 64}
SIX = "[1, 2, 3, 4, 5, 6]"  # an emulated model calls a tool three times out of four


@contextmanager
def with_nap(marker: str) -> Iterator[Path]:
    """The tools of the shed, and `nap`: whatever it is asked, it sleeps, and must not be called twice."""
    with shed(slots=8) as file:
        nap = f"""
[[command]]
name = "nap"
description = "Sleeps."
argv = ["/bin/sh", "-c", "sleep 600; : {marker}"]
timeout_s = 700
"""
        file.write_text(file.read_text() + nap)
        yield file


def settings_of(file: Path) -> dict[str, Any]:
    return {
        "emulation": {"time_scale": 4.0},
        "server": {"drain_s": 1},
        "emulated": [{"model": "qwen3-8b", "device": "l40s"}],
        "tools": [{"file": str(file), "count": 1}],
    }


def six(**more: Any) -> dict[str, Any]:
    """A workflow of six agents."""
    return {"name": "scouts", "nodes": {"each": {"kind": "map", "over": SIX, "do": {"scout": {**AGENT, **more}}}}}


async def ready(http: Http) -> None:
    await all_ready(http, [ENGINE])
    await offered(http, "nap", "statistics", "pipes.echo")


def asleep(marker: str) -> Callable[[], Awaitable[list[int]]]:
    """Asks for the processes of `nap`."""

    async def look() -> list[int]:
        return running(marker)

    return look


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Http, str]]:
    """A server with an engine and tools, and the marker of its naps."""
    marker = secrets.token_hex(8)
    with with_nap(marker) as file, serving(settings_of(file), tmp_path_factory.mktemp("agents")) as server:
        async with server.http() as http:
            await ready(http)
            yield http, marker


async def test_an_agent_has_tools_called_and_ends_with_an_answer_that_follows_its_schema(
    world: tuple[Http, str],
) -> None:
    http, _ = world
    agents = six(tools=["statistics", "pipes.echo"], functions=["upper"], schema=VERDICT, max_steps=4)
    row = await http.ended(await http.submitted(agents))
    assert row["state"] == "finished", row["error"]
    found = row["outputs"]["each"]
    assert all(isinstance(one["json"]["verdict"], str) and 1 <= one["steps"] <= 4 for one in found)
    assert all(one["usage"]["prompt_tokens"] > 0 for one in found)
    nodes = {node["path"]: node for node in row["nodes"]}
    first = nodes["each[0].scout.1"]
    assert (first["kind"], first["role"], first["parent"]) == ("llm", "scout", "each[0].scout")
    kinds = [call["kind"] for call in row["calls"]]
    assert kinds.count("llm") == sum(one["steps"] for one in found)
    assert "tool" in kinds
    used = [node for node in nodes.values() if node["kind"] == "tool"]
    assert all(node["state"] in ("finished", "failed") for node in used)


async def test_cancelling_an_agent_ends_its_tool_and_what_its_workflow_has_in_the_engine(
    world: tuple[Http, str],
) -> None:
    http, marker = world
    workflow = six(tools=["nap"])
    long = {"kind": "llm", "model": "qwen3-8b", "max_tokens": 8000, "prompt": "Write book {{ item }}."}
    # There is always a book that is being written, however long a tool takes to begin.
    shelf = {"kind": "loop", "max_iterations": 20, "until": "iteration > 20", "do": {"write": long}}
    workflow["nodes"]["books"] = {"kind": "map", "over": SIX, "do": {"shelf": shelf}}
    workflow_id = await http.submitted(workflow)
    await until(asleep(marker), bool)
    engine = await until(lambda: http.engine(ENGINE), lambda found: found["running"] > 0)
    assert (await http.post(f"/api/v1/workflows/{workflow_id}/cancel")).status == 202
    assert (await http.ended(workflow_id))["state"] == "cancelled"
    await until(asleep(marker), lambda found: not found)
    after = await until(lambda: http.engine(ENGINE), lambda found: found["running"] == 0)
    assert after["aborted"] > engine["aborted"]


async def test_after_a_crash_an_agent_goes_on_and_its_model_is_told_of_the_tool_that_was_interrupted(
    tmp_path: Path,
) -> None:
    marker = secrets.token_hex(8)
    with with_nap(marker) as file:
        with serving(settings_of(file), tmp_path) as server:
            async with server.http() as http:
                await ready(http)
                workflow_id = await http.submitted(six(tools=["nap"], max_steps=2))
                await until(asleep(marker), bool)
            server.kill()
        await until(asleep(marker), lambda found: not found)
        with serving(settings_of(file), tmp_path) as server:
            async with server.http() as http:
                naps = await until(lambda: interrupted(http, workflow_id), bool)
                assert all(node["error"].startswith("the server stopped while nap was called") for node in naps)
                steps = [naps[0]["parent"] + ".2"]
                await until(lambda: finished(http, workflow_id), lambda paths: set(steps) <= paths)
                assert (await http.post(f"/api/v1/workflows/{workflow_id}/cancel")).status == 202
                await http.ended(workflow_id)


async def interrupted(http: Http, workflow_id: str) -> list[dict[str, Any]]:
    row = (await http.get(f"/api/v1/workflows/{workflow_id}")).body
    return [node for node in row["nodes"] if node["kind"] == "tool" and node["state"] == "failed"]


async def finished(http: Http, workflow_id: str) -> set[str]:
    row = (await http.get(f"/api/v1/workflows/{workflow_id}")).body
    return {node["path"] for node in row["nodes"] if node["state"] == "finished"}
