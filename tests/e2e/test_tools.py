"""Tools of workflows for real: a server, replicas as processes, programs in the sandbox, and what goes wrong."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web
from click.testing import CliRunner

from swarmx.cli import main
from tests.e2e.fleet import Http, Server, all_ready, children, serving, until, up
from tests.e2e.toolshed import POOL, counters, offered, one, shed
from tests.providers.tools.workshop import needs_sandbox, running

pytest.importorskip("mcp", reason="the MCP client is not installed: pip install 'swarmx[mcp]'")
pytestmark = [pytest.mark.process, pytest.mark.asyncio(loop_scope="module"), needs_sandbox]

SECRET = "the-secret-of-a-header"
FIRST, SECOND = f"{POOL}-cpu-0", f"{POOL}-cpu-1"
ALL = ("again", "brief", "pipes.echo", "pipes.key", "private", "shell", "statistics", "web")


class World:
    """One server with two replicas of tools, and a web server that notes the headers that it is sent."""

    def __init__(self, server: Server, http: Http, heard: list[dict[str, str]], web_url: str) -> None:
        self.server, self.http, self.heard, self.web_url = server, http, heard, web_url


@asynccontextmanager
async def listening() -> AsyncIterator[tuple[int, list[dict[str, str]]]]:
    heard: list[dict[str, str]] = []

    async def answer(request: web.Request) -> web.Response:
        heard.append(dict(request.headers))
        return web.json_response({"path": request.path})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield runner.addresses[0][1], heard
    finally:
        await runner.cleanup()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    os.environ |= {"SHED_SECRET": SECRET, "SHED_OTHER": "not-for-tools"}
    async with listening() as (port, heard):
        with shed(web_port=port, secret="SHED_SECRET") as file:
            settings = {"tools": [{"file": str(file), "count": 2}], "server": {"drain_s": 1}}
            with serving(settings, tmp_path_factory.mktemp("tools")) as server:
                async with server.http() as http:
                    await all_ready(http, [FIRST, SECOND])
                    await offered(http, *ALL)
                    yield World(server, http, heard, f"http://127.0.0.1:{port}")


async def test_a_workflow_uses_a_function_a_command_the_web_and_an_mcp_server(world: World) -> None:
    nodes: dict[str, Any] = {
        "mean": {"kind": "tool", "tool": "statistics", "args": {"numbers": [1, 2, 6]}},
        "said": {"kind": "tool", "tool": "shell", "args": {"s": "printf {{ mean.mean }}"}},
        "seen": {"kind": "tool", "tool": "web", "args": {"url": world.web_url + "/{{ said }}"}},
        "echo": {"kind": "tool", "tool": "pipes.echo", "args": {"text": "{{ seen.json.path }}"}},
        "key": {"kind": "tool", "tool": "pipes.key", "args": {}},
    }
    workflow_id = await world.http.submitted(
        {"name": "all", "nodes": nodes, "outputs": {"echo": "{{ echo }}", "key": "{{ key }}"}}
    )
    row = await world.http.ended(workflow_id)
    assert row["outputs"] == {"echo": "/3.0", "key": f"{workflow_id}/key"}, row
    assert world.heard[-1]["x-secret"] == SECRET
    assert [call["model"] for call in row["calls"]] == [POOL] * 5


async def test_why_explains_a_call_of_a_tool_and_its_record_counts_seconds(world: World) -> None:
    row = await world.http.ended(await world.http.submitted(one("shell", args={"s": "sleep 0.2"}, kind="slow")))
    (call,) = row["calls"]
    assert (call["kind"], call["role"], call["state"]) == ("tool", "shell", "finished")
    assert 0.2 <= call["work_done"] < 60.0
    decisions = (await world.http.get(f"/api/v1/calls/{call['call_id']}/why")).body["decisions"]
    told = " ".join(decisions[0]["explanation"])
    assert "(shell on tools) went to tools-cpu-" in told
    assert "seconds at the median" in told
    assert "tokens" not in told


async def test_a_tool_that_is_not_there_is_refused_at_submission_with_those_that_are(world: World) -> None:
    reply = await world.http.post("/api/v1/workflows", json=one("shel", args={}))
    assert reply.status == 422
    assert reply.body["detail"].startswith("there is no tool 'shel' (did you mean 'shell'?); there are: again, brief")


async def test_cancelling_a_workflow_ends_the_processes_of_its_tool(world: World) -> None:
    marker = secrets.token_hex(8)
    before = await ended_by_cancelling(world.http)
    workflow_id = await world.http.submitted(one("shell", args={"s": f"sleep 600 & sleep 600; : {marker}"}))
    await until(in_the_sandbox(marker), bool)
    assert (await world.http.post(f"/api/v1/workflows/{workflow_id}/cancel")).status == 202
    assert (await world.http.ended(workflow_id))["state"] == "cancelled"
    await until(in_the_sandbox(marker), lambda found: not found)
    await until(lambda: ended_by_cancelling(world.http), lambda count: count == before + 1)
    for replica_id in (FIRST, SECOND):
        found = await counters(world.http, replica_id)
        assert (found["running"], found["waiting"]) == (0, 0)


async def ended_by_cancelling(http: Http) -> float:
    return sum([(await counters(http, replica_id)).get("cancelled", 0.0) for replica_id in (FIRST, SECOND)])


def in_the_sandbox(marker: str) -> Any:
    async def look() -> list[int]:
        return running(marker)

    return look


def sleeps(marker: str) -> Any:
    async def look() -> list[int]:
        return asleep(marker)

    return look


def asleep(marker: str) -> list[int]:
    """What the scripts with the marker sleep in, once they have come that far."""
    return [child for pid in running(marker) for child, line in children(pid).items() if line.startswith("sleep ")]


def let_go(marker: str) -> None:
    """End what the scripts with the marker sleep in; they go on behind it."""
    for child in asleep(marker):
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


async def test_a_tool_that_hangs_floods_or_fails_fails_its_workflow_and_nothing_else(world: World) -> None:
    told = {
        "brief": ({"s": "sleep 600"}, "longer than 1 s"),
        "shell": ({"s": "head -c 10000000 /dev/zero"}, "more than 262144 bytes"),
        "again": ({"s": "echo broken >&2; exit 3"}, "ended with 3: broken"),
        "web": ({"url": "http://169.254.169.254/"}, "port 80 is not allowed"),
    }
    rows = await asyncio.gather(*(failed(world.http, one(tool, args=args)) for tool, (args, _) in told.items()))
    for row, (_, said) in zip(rows, told.values(), strict=True):
        assert said in row["error"], row
    assert {replica["state"] for replica in (await world.http.replicas()).values()} == {"ready"}


async def failed(http: Http, workflow: dict[str, Any]) -> dict[str, Any]:
    row = await http.ended(await http.submitted(workflow))
    assert row["state"] == "failed", row
    return row


async def test_a_tool_of_one_tenant_does_not_exist_for_others(world: World) -> None:
    acme = world.server.key("acme", "client", "acme")
    async with world.server.http(acme) as theirs:
        assert "private" in await offered(theirs, "shell")
        row = await theirs.ended(await theirs.submitted(one("private", args={"s": "echo mine"})))
        assert row["outputs"] == {"use": "mine\n"}
    async with world.server.http(world.server.key("other", "client", "other")) as others:
        assert "private" not in await offered(others, "shell")
        reply = await others.post("/api/v1/workflows", json=one("private", args={"s": "true"}))
        assert reply.status == 422
        assert "no tool 'private'" in reply.body["detail"]


async def test_neither_a_tool_nor_its_replica_has_the_secrets_of_the_server(world: World) -> None:
    row = await world.http.ended(await world.http.submitted(one("shell", args={"s": "env"})))
    assert not any(word in row["outputs"]["use"] for word in ("SHED", "TOKEN", SECRET))
    replicas = [pid for pid, line in children(world.server.process.pid).items() if "swarmx.providers.tools" in line]
    assert len(replicas) == 2
    for pid in replicas:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        assert f"SHED_SECRET={SECRET}".encode() in environment, "what its file names, it is given"
        assert b"SHED_OTHER" not in environment
    assert not any("authorization" in {name.lower() for name in headers} for headers in world.heard)


async def test_pools_of_tools_are_no_models(world: World) -> None:
    assert (await world.http.get("/v1/models")).body["data"] == []
    reply = await world.http.post(
        "/v1/chat/completions", json={"model": POOL, "messages": [{"role": "user", "content": "x"}]}
    )
    assert reply.status == 404


async def test_forecasts_follow_what_a_tool_takes(world: World) -> None:
    workflow = {
        "name": "many",
        "kind": "learning",
        "nodes": {
            "each": {
                "kind": "map",
                "over": "[1, 2, 3, 4, 5, 6, 7, 8]",
                "do": {"use": {"kind": "tool", "tool": "shell", "args": {"s": "true"}}},
            }
        },
    }
    await world.http.ended(await world.http.submitted(workflow))
    (call,) = (await world.http.ended(await world.http.submitted(one("shell", args={"s": "true"}, kind="learning"))))[
        "calls"
    ]
    assert call["forecast_source"] == "empirical"
    assert call["forecast_p90"] < 8.0, "the prior's"


async def test_the_command_line_lists_the_tools(world: World) -> None:
    arguments = ["--url", world.http.url, "--state-dir", str(world.server.state_dir), "workflow-tools"]
    result = await asyncio.to_thread(CliRunner().invoke, main, arguments)
    assert result.exit_code == 0, result.output
    assert all(name in result.output for name in (*ALL, "Runs a script.", "120 s"))


async def test_a_replica_that_is_killed_loses_a_call_only_where_it_must_not_be_made_twice(tmp_path: Path) -> None:
    markers = {tool: secrets.token_hex(8) for tool in ("again", "shell")}
    with shed() as file, serving({"tools": [{"file": str(file), "count": 1}]}, tmp_path) as server:
        async with server.http() as http:
            await offered(http, *ALL)
            ids = {
                tool: await http.submitted(one(tool, args={"s": f"sleep 600; : {marker}"}))
                for tool, marker in markers.items()
            }
            for marker in markers.values():
                await until(in_the_sandbox(marker), bool)
            (pid,) = [pid for pid, line in children(server.process.pid).items() if "swarmx.providers.tools" in line]
            os.kill(pid, signal.SIGKILL)
            lost = await http.ended(ids["shell"])
            assert lost["state"] == "failed"
            assert "it would be called again only if" in lost["error"]
            for marker in markers.values():
                await until(in_the_sandbox(marker), lambda found: not found)
            row = (await http.get(f"/api/v1/workflows/{ids['again']}")).body
            assert row["state"] == "running", "it waits for a replica that may make the call again"
            assert (await http.post(f"/api/v1/workflows/{ids['again']}/cancel")).status == 202


async def test_a_call_that_was_out_when_the_server_was_killed_is_made_again_only_if_it_may_be(tmp_path: Path) -> None:
    with shed() as file:
        settings = {"tools": [{"file": str(file), "count": 1}]}
        marker = secrets.token_hex(8)
        script = {"s": f"printf $SWARMX_IDEMPOTENCY_KEY; sleep 600; : {marker}"}
        server = up(settings, tmp_path)
        async with server.http() as http:
            await offered(http, *ALL)
            ids = [await http.submitted(one(tool, args=script)) for tool in ("again", "shell")]
            await until(in_the_sandbox(marker), lambda found: len(found) == 2)
        server.kill()
        await until(in_the_sandbox(marker), lambda found: not found)
        with serving(settings, tmp_path) as server:
            async with server.http() as http:
                await until(sleeps(marker), bool)
                let_go(marker)
                again, shell = [await http.ended(workflow_id) for workflow_id in ids]
    assert again["outputs"] == {"use": f"{ids[0]}/use"}, "the key is the same in every life"
    assert shell["state"] == "failed"
    assert "must not be called twice" in shell["error"]


async def test_a_pool_of_tools_grows_under_load_and_is_drained_after_without_losing_a_call(tmp_path: Path) -> None:
    with shed(slots=1) as file:
        settings = {
            "elastic": [{"model": POOL, "device": "cpu", "provider": "tools", "file": str(file), "min": 1, "max": 3}],
            "scaler": {"every_s": 0.5, "up_cooldown_s": 0.5, "down_cooldown_s": 1.0, "drain_s": 120.0},
        }
        with serving(settings, tmp_path) as server:
            async with server.http() as http:
                await offered(http, *ALL)
                marker = secrets.token_hex(8)
                use = {"kind": "tool", "tool": "shell", "args": {"s": f"sleep 600; : {marker}"}}
                nodes = {"each": {"kind": "map", "over": str(list(range(16))), "do": {"use": use}}}
                workflow_id = await http.submitted({"name": "load", "nodes": nodes})
                await until(
                    http.replicas,
                    lambda rows: sum(row["state"] == "ready" and row["in_flight"] > 0 for row in rows.values()) >= 2,
                )
                row = await until(
                    lambda: let_go_on(http, workflow_id, marker), lambda row: row["ended_at_s"] is not None
                )
                assert row["state"] == "finished", row["error"]
                assert len({call["replica_id"] for call in row["calls"]}) >= 2
                assert all(call["attempts"] == 1 for call in row["calls"])
                await until(http.replicas, lambda rows: sum(row["state"] == "ready" for row in rows.values()) == 1)
                log = (await http.get("/api/v1/audit")).body["records"]
                assert {"deploy", "drain"} <= {record["entry"]["tool"] for record in log}


async def let_go_on(http: Http, workflow_id: str, marker: str) -> dict[str, Any]:
    """The workflow, after those of its calls that sleep now were let go."""
    let_go(marker)
    row: dict[str, Any] = (await http.get(f"/api/v1/workflows/{workflow_id}")).body
    return row
