"""The tool replica as a real process: what it serves, whom it refuses, and how calls and itself end."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.providers.tools.workshop import needs_sandbox, running, until

pytestmark = pytest.mark.process
TOKEN = "0123456789abcdef-token"
TOOLS = """
pool = "tools:test"
slots = 2
waiting = 1

[[command]]
name = "shell"
description = "Runs a script."
argv = ["/usr/bin/python3", "-c", "import json,os,sys; os.execv('/bin/sh', ['sh', '-c', json.load(sys.stdin)['s']])"]
parameters = {type = "object", properties = {s = {type = "string"}}, required = ["s"]}

[[http]]
name = "fetch"
description = "Asks the web."
hosts = ["*"]
"""
BROKEN = """
[[mcp]]
name = "broken"
argv = ["/usr/bin/false"]
"""


class Replica:
    """A running process, and requests to it."""

    def __init__(self, process: asyncio.subprocess.Process, port: int, session: aiohttp.ClientSession) -> None:
        self.process, self.port, self.session = process, port, session
        self.headers: Mapping[str, str] = {"authorization": f"Bearer {TOKEN}"}

    async def get(self, path: str, **more: Any) -> tuple[int, str]:
        async with self.session.get(f"http://127.0.0.1:{self.port}{path}", **more) as response:
            return response.status, await response.text()

    async def call(self, tool: str, **arguments: Any) -> dict[str, Any]:
        status, body = await self.post(
            {"tool": tool, "arguments": arguments, "key": "k", "request_id": "r-1", "tenant": "acme"}
        )
        assert status == 200, body
        return dict(json.loads(body))

    async def post(self, body: Any, headers: Mapping[str, str] | None = None) -> tuple[int, str]:
        data = io.BytesIO(body if isinstance(body, bytes) else json.dumps(body).encode())
        url = f"http://127.0.0.1:{self.port}/v1/tools/call"
        async with self.session.post(url, data=data, headers=self.headers if headers is None else headers) as response:
            return response.status, await response.text()

    async def gauge(self, name: str) -> float:
        _, text = await self.get("/metrics")
        match = re.search(rf"^swarmx_tools:{name}\{{[^}}]*\}} ([0-9.]+)$", text, re.M)
        assert match is not None, text
        return float(match[1])


@asynccontextmanager
async def serving(folder: Path, tools: str = TOOLS) -> AsyncIterator[Replica]:
    file = folder / "tools.toml"
    file.write_text(tools)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "swarmx.providers.tools", "--config", str(file), "--exit-with-parent"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "SWARMX_TOOLS_TOKEN": TOKEN},
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        port = json.loads(await process.stdout.readline())["port"]
        async with aiohttp.ClientSession() as session:
            yield Replica(process, port, session)
    finally:
        process.stdin.close()
        async with asyncio.timeout(30):
            await process.wait()


@needs_sandbox
async def test_it_tells_its_tools_and_why_others_are_not_there(tmp_path: Path) -> None:
    async with serving(tmp_path, TOOLS + BROKEN) as replica:
        status, body = await replica.get("/v1/tools", headers=replica.headers)
        offer = json.loads(body)
        assert (status, offer["pool"], offer["slots"]) == (200, "tools:test", 2)
        assert [tool["name"] for tool in offer["tools"]] == ["shell", "fetch"]
        assert "broken cannot be used" in offer["refused"]["broken"]
        assert (await replica.call("broken.tool"))["error"].startswith("broken.tool is not offered here")
        assert (await replica.get("/health"))[0] == 200


@needs_sandbox
async def test_calls_are_answered_and_counted(tmp_path: Path) -> None:
    async with serving(tmp_path) as replica:
        assert (await replica.call("shell", s="echo hello; env"))["output"].startswith("hello\n")
        assert TOKEN not in (await replica.call("shell", s="env"))["output"]
        assert (await replica.call("shell", s="exit 3"))["cause"] == "tool"
        assert (await replica.call("shell", wrong=1))["cause"] == "refused"
        assert (await replica.call("fetch", url="http://169.254.169.254/"))["cause"] == "refused"
        _, text = await replica.get("/metrics")
        assert 'swarmx_tools:calls_total{cause="done",pool="tools:test"} 2.0' in text
        assert await replica.gauge("slots") == 2
        assert await replica.gauge("num_requests_running") == 0


async def test_nobody_calls_without_the_token_and_bodies_are_checked(tmp_path: Path) -> None:
    async with serving(tmp_path, "") as replica:
        call = {"tool": "t", "arguments": {}, "key": "k", "request_id": "r", "tenant": "acme"}
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": TOKEN}):
            assert (await replica.post(call, headers))[0] == 401
            assert (await replica.get("/v1/tools", headers=headers))[0] == 401
        for body in (b"", b"[]", b"{}", b"\xff", b"[" * 100_000, {**call, "arguments": []}):
            assert (await replica.post(body))[0] == 400
        assert (await replica.post(b" " * 5_000_000))[0] == 413
        assert (await replica.post(call))[0] == 200


async def test_the_id_of_a_request_adds_no_header_to_the_answer(tmp_path: Path) -> None:
    async with serving(tmp_path, "") as replica:
        body = {"tool": "t", "arguments": {}, "key": "k", "request_id": "r\r\nset-cookie: a=b", "tenant": "acme"}
        url = f"http://127.0.0.1:{replica.port}/v1/tools/call"
        async with replica.session.post(url, json=body, headers=replica.headers) as response:
            assert response.status == 200
            assert "set-cookie" not in response.headers
            assert response.headers["x-request-id"] == "r??set-cookie: a=b"


@needs_sandbox
async def test_calls_beyond_the_slots_wait_and_beyond_the_queue_are_sent_away(tmp_path: Path) -> None:
    async with serving(tmp_path) as replica:
        tasks = [asyncio.create_task(replica.call("shell", s="sleep 600")) for _ in range(3)]
        await until(lambda: is_now(replica, running=2, waiting=1))
        call = {"tool": "shell", "arguments": {"s": "true"}, "key": "k", "request_id": "r", "tenant": "acme"}
        assert (await replica.post(call))[0] == 503
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await until(lambda: is_now(replica, running=0, waiting=0))


async def is_now(replica: Replica, *, running: int, waiting: int) -> bool:
    return [await replica.gauge(f"num_requests_{name}") for name in ("running", "waiting")] == [running, waiting]


@needs_sandbox
async def test_a_caller_that_hangs_up_ends_its_call(tmp_path: Path) -> None:
    marker = uuid.uuid4().hex
    async with serving(tmp_path) as replica:
        task = asyncio.create_task(replica.call("shell", s=f"sleep 600; : {marker}"))
        await until(lambda: running(marker) != [])
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: running(marker) == [])
        assert (await replica.call("shell", s="echo well"))["output"] == "well\n"


@needs_sandbox
@pytest.mark.parametrize("how", ["stdin", "terminate", "kill"])
async def test_its_end_is_the_end_of_its_calls(tmp_path: Path, how: str) -> None:
    marker = uuid.uuid4().hex
    async with serving(tmp_path) as replica:
        task = asyncio.create_task(replica.call("shell", s=f"sleep 600; : {marker}"))
        await until(lambda: sum(b"bwrap" not in line(pid) for pid in running(marker)) > 0)
        match how:
            case "stdin":
                assert replica.process.stdin is not None
                replica.process.stdin.close()
            case "terminate":
                replica.process.terminate()
            case "kill":
                replica.process.send_signal(signal.SIGKILL)
        await replica.process.wait()
        await until(lambda: running(marker) == [])
        await asyncio.gather(task, return_exceptions=True)


def line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b"bwrap"


@pytest.mark.parametrize(
    ("tools", "token", "said"),
    [
        ("", "", "SWARMX_TOOLS_TOKEN"),
        ("", "short", "SWARMX_TOOLS_TOKEN"),
        ("pool = 3", TOKEN, "pool"),
        ("polo = 'x'", TOKEN, "polo"),
        ("[[python]]\nname='a'\ndescription=''\nfile='x'\nmounts=['/']", TOKEN, "whole path"),
        ("[[mcp]]\nname='a'", TOKEN, "argv"),
        ("x = [", TOKEN, "not TOML"),
    ],
)
async def test_a_start_that_cannot_be_is_explained(tmp_path: Path, tools: str, token: str, said: str) -> None:
    (tmp_path / "tools.toml").write_text(tools)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "swarmx.providers.tools", "--config", str(tmp_path / "tools.toml")),
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "SWARMX_TOOLS_TOKEN": token},
    )
    _, errors = await process.communicate()
    assert process.returncode == 1
    assert said in errors.decode()
