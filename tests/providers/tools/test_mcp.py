"""MCP servers as providers: real ones, by pipes in the sandbox and by HTTP through the guard, that also misbehave."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from swarmx.providers.tools.jail import Jail
from swarmx.providers.tools.mcp_provider import McpProvider
from swarmx.providers.tools.settings import McpServer
from swarmx.providers.tools.toolbox import Toolbox
from tests.providers.tools.workshop import a_call, needs_sandbox, running, under_way, until

pytestmark = pytest.mark.process
HERE = Path(__file__).parent


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user can read: the sandbox is not root, and pytest's own folders are its user's only."""
    made = Path(tempfile.mkdtemp(prefix="swarmx-mcp-"))
    made.chmod(0o755)
    for name in ("mcp_pipes.py", "mcp_server.py"):
        shutil.copy(HERE / name, made / name)
        (made / name).chmod(0o644)
    yield made
    shutil.rmtree(made)


def by_pipes(folder: Path, **more: Any) -> McpServer:
    argv = ("/usr/bin/python3", "-I", str(folder / "mcp_pipes.py"))
    return McpServer(**{"name": "pipes", "argv": argv, "mounts": (folder,), "timeout_s": 60.0, "start_s": 60.0, **more})


@asynccontextmanager
async def toolbox_of(server: McpServer, *, slots: int = 3) -> AsyncIterator[Toolbox]:
    jail = Jail(slots=slots) if server.argv else None
    toolbox = Toolbox([McpProvider(server, pool="tools", jail=jail)])
    await toolbox.open()
    try:
        yield toolbox
    finally:
        await toolbox.close()


@needs_sandbox
async def test_its_tools_are_offered_under_the_name_of_the_server_and_strangers_text_is_cut(folder: Path) -> None:
    async with toolbox_of(by_pipes(folder, only=("echo", "fail", "bad name\u202e"))) as toolbox:
        echo, fail = toolbox.tools()
    assert (echo.name, fail.name) == ("pipes.echo", "pipes.fail")
    assert echo.description == "Says it   [2Jagain.", "it commands no terminal"
    assert echo.parameters["properties"] == {"text": {"type": "string"}}, "what cannot be matched is left out"
    assert running(str(folder)) == []


@needs_sandbox
async def test_calls_are_answered_failures_are_results_and_the_key_is_told(folder: Path) -> None:
    async with toolbox_of(by_pipes(folder)) as toolbox:
        assert (await toolbox.call(a_call("pipes.echo", text="aaaa!"))).output == "aaaa!"
        assert (await toolbox.call(a_call("pipes.key"))).output == "wf/n"
        failed = await toolbox.call(a_call("pipes.fail"))
        assert (failed.cause, failed.error) == ("tool", "pipes.fail: it broke")
        assert (await toolbox.call(a_call("pipes.echo", text=3))).cause == "refused"
        assert (await toolbox.call(a_call("pipes.nothing"))).cause == "refused"


@needs_sandbox
async def test_a_schema_that_refers_elsewhere_is_never_fetched(folder: Path) -> None:
    async with toolbox_of(by_pipes(folder)) as toolbox:
        result = await toolbox.call(a_call("pipes.odd"))
    assert result.cause == "refused"
    assert "refers to" in result.error


@needs_sandbox
async def test_a_strangers_pattern_never_runs_on_what_the_stranger_answers(folder: Path) -> None:
    async with toolbox_of(by_pipes(folder)) as toolbox:
        assert (await toolbox.call(a_call("pipes.slow"))).output == {"x": "a" * 60 + "!"}


@needs_sandbox
async def test_nonsense_and_a_long_log_are_passed_over(folder: Path) -> None:
    async with toolbox_of(by_pipes(folder)) as toolbox:
        assert (await toolbox.call(a_call("pipes.nonsense"))).output == "sorry"
        assert (await toolbox.call(a_call("pipes.log"))).output == "logged"


@needs_sandbox
async def test_a_server_that_dies_is_lost_for_that_call_and_back_for_the_next(folder: Path) -> None:
    async with toolbox_of(by_pipes(folder)) as toolbox:
        died = await toolbox.call(a_call("pipes.die"))
        assert died.cause == "unavailable"
        assert "its program ended" in died.error
        assert (await toolbox.call(a_call("pipes.echo", text="back"))).output == "back"


@needs_sandbox
@pytest.mark.parametrize(("size", "cause"), [(300_000, "limit"), (10_000_000, "limit"), (200_000, "")])
async def test_a_huge_answer_is_a_limit_and_the_next_call_is_answered(folder: Path, size: int, cause: str) -> None:
    async with toolbox_of(by_pipes(folder)) as toolbox:
        assert (await toolbox.call(a_call("pipes.much", size=size))).cause == cause
        assert (await toolbox.call(a_call("pipes.echo", text="well"))).output == "well"


@needs_sandbox
@pytest.mark.parametrize("how", ["late", "cancelled"])
async def test_a_hanging_tool_takes_its_program_along(folder: Path, how: str) -> None:
    async with toolbox_of(by_pipes(folder, timeout_s=60.0 if how == "cancelled" else 5.0)) as toolbox:
        if how == "late":
            assert (await toolbox.call(a_call("pipes.block"))).cause == "timeout"
        else:
            task = asyncio.create_task(toolbox.call(a_call("pipes.block")))
            await asyncio.sleep(0.2)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert task.cancelled()
        assert running(str(folder)) == []
        assert (await toolbox.call(a_call("pipes.echo", text="new"))).output == "new"
    assert running(str(folder)) == []


@needs_sandbox
async def test_a_cancelled_call_does_not_take_the_others_along(folder: Path) -> None:
    async with toolbox_of(by_pipes(folder)) as toolbox:
        other = asyncio.create_task(toolbox.call(a_call("pipes.wait", seconds=1.0)))
        await asyncio.sleep(0.2)
        task = asyncio.create_task(toolbox.call(a_call("pipes.wait", seconds=600)))
        await asyncio.sleep(0.2)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert (await other).output == "waited"


@needs_sandbox
@pytest.mark.parametrize("argv", [("/usr/bin/sleep", "600"), ("/usr/bin/false",), ("/usr/bin/yes",), ("/no/such",)])
async def test_what_is_no_server_is_refused_and_nothing_is_left(folder: Path, argv: tuple[str, ...]) -> None:
    async with toolbox_of(by_pipes(folder, argv=argv, start_s=3.0)) as toolbox:
        assert toolbox.tools() == []
        assert "pipes cannot be used" in toolbox.refused["pipes"]
        result = await toolbox.call(a_call("pipes.echo", text="x"))
        assert (result.cause, "is not offered here" in result.error) == ("refused", True)
    assert under_way() == 0


async def test_without_a_sandbox_a_server_is_never_run(folder: Path) -> None:
    server = by_pipes(folder)
    toolbox = Toolbox([McpProvider(server, pool="tools", jail=Jail(slots=1, bwrap="no-such-bwrap"))])
    await toolbox.open()
    assert "install bubblewrap" in toolbox.refused["pipes"]
    assert running(str(folder)) == []
    await toolbox.close()


@needs_sandbox
async def test_the_sdks_own_server_is_understood_by_pipes(folder: Path) -> None:
    packages = Path(sysconfig.get_paths()["purelib"])
    server = McpServer(
        name="sdk",
        argv=("/usr/bin/python3", str(folder / "mcp_server.py")),
        mounts=(folder, packages),
        environment={"PYTHONPATH": str(packages)},
        memory_mb=2048,
        start_s=100.0,
        timeout_s=60.0,
    )
    async with toolbox_of(server) as toolbox:
        assert (await toolbox.call(a_call("sdk.add", a=1, b=2))).output == {"result": 3}


@pytest.fixture(scope="module")
def http_server() -> Iterator[str]:
    """The SDK's server on a port of loopback."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, str(HERE / "mcp_server.py"), str(port)], stderr=subprocess.DEVNULL)
    yield f"http://127.0.0.1:{port}/mcp"
    process.kill()
    process.wait()


async def up(url: str) -> None:
    async with aiohttp.ClientSession() as session:

        async def answers() -> bool:
            try:
                async with session.get(url):
                    return True
            except aiohttp.ClientError:
                return False

        await until(answers, deadline_s=100.0)


def by_http(url: str, **more: Any) -> McpServer:
    return McpServer(
        **{"name": "far", "url": url, "networks": ("127.0.0.1/32",), "start_s": 60.0, "timeout_s": 60.0, **more}
    )


async def test_a_server_at_a_url_is_called_through_the_guard(http_server: str) -> None:
    await up(http_server)
    async with toolbox_of(by_http(http_server)) as toolbox:
        assert (await toolbox.call(a_call("far.add", a=1, b=2))).output == {"result": 3}
        failed = await toolbox.call(a_call("far.fail", why="so"))
        assert failed.cause == "tool"
        assert (await toolbox.call(a_call("far.much", size=10_000_000))).cause == "limit"
        assert (await toolbox.call(a_call("far.add", a=2, b=2))).output == {"result": 4}
        task = asyncio.create_task(toolbox.call(a_call("far.wait", seconds=600)))
        await asyncio.sleep(0.3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        assert (await toolbox.call(a_call("far.add", a=3, b=2))).output == {"result": 5}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"networks": ()}, "not a public address"),
        ({"url": "http://127.0.0.1:1/mcp"}, "cannot be used"),
        ({"url": "http://a@127.0.0.1/mcp"}, "may not be asked"),
        ({"url": "ftp://127.0.0.1/mcp"}, "may not be asked"),
    ],
)
async def test_a_server_at_a_url_that_is_not_allowed_is_refused(change: dict[str, Any], reason: str) -> None:
    async with toolbox_of(
        by_http("http://127.0.0.1:1/mcp", **change) if "url" not in change else by_http(**change)
    ) as box:
        assert reason in box.refused["far"]


async def test_a_redirecting_server_is_not_followed() -> None:
    asked = []

    async def redirect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readline()).split()[1])
        writer.write(b"HTTP/1.1 307 x\r\nlocation: /elsewhere\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(redirect, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with toolbox_of(by_http(f"http://127.0.0.1:{port}/mcp")) as box:
            assert "redirects" in box.refused["far"]
    assert b"/elsewhere" not in asked
