"""What every provider of tools must do, whatever stands behind its tools."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from swarmx.core.toolbox import ToolProvider
from swarmx.providers.tools.http_tool import HttpProvider
from swarmx.providers.tools.jail import Jail
from swarmx.providers.tools.mcp_provider import McpProvider
from swarmx.providers.tools.programs import ProgramProvider
from swarmx.providers.tools.settings import CommandTool, HttpTool, McpServer, PythonTool
from swarmx.providers.tools.toolbox import Toolbox
from tests.providers.tools.workshop import a_call, sandboxed, under_way, until

pytestmark = pytest.mark.process
LIMIT = 20_000


@dataclass(kw_only=True)
class Subject:
    """A provider, and uses of its tools: one that is well, fails, hangs, says too much, and has a wrong argument."""

    provider: ToolProvider
    well: tuple[str, dict[str, Any]]
    fails: tuple[str, dict[str, Any]]
    hangs: tuple[str, dict[str, Any]]
    floods: tuple[str, dict[str, Any]]
    wrong: tuple[str, dict[str, Any]]
    busy: Callable[[], int]
    clean: list[Callable[[], Awaitable[None]]] = field(default_factory=list)


COMMAND = """
import json, os, sys
arguments = json.load(sys.stdin)
match arguments["do"]:
    case "well": print(json.dumps({"n": arguments.get("n", 1)}))
    case "fail": sys.exit("it broke")
    case "hang": os.execv("/usr/bin/sleep", ["sleep", "600"])
    case "flood": os.execv("/usr/bin/yes", ["yes"])
"""
PYTHON = """
import subprocess, time
def main(do, n=1):
    print("this is not the result")
    match do:
        case "well": return {"n": n}
        case "fail": raise ValueError("it broke")
        case "hang": subprocess.run(["sleep", "600"])
        case "flood": return "x" * 100_000
"""
SCHEMA = {
    "type": "object",
    "properties": {"do": {"enum": ["well", "fail", "hang", "flood"]}, "n": {"type": "integer", "maximum": 9}},
    "required": ["do"],
    "additionalProperties": False,
}


def of_programs(tool: CommandTool | PythonTool) -> Subject:
    return Subject(
        provider=ProgramProvider([tool], pool="tools", jail=Jail(slots=2)),
        well=(tool.name, {"do": "well", "n": 7}),
        fails=(tool.name, {"do": "fail"}),
        hangs=(tool.name, {"do": "hang"}),
        floods=(tool.name, {"do": "flood"}),
        wrong=(tool.name, {"do": "well", "n": 10}),
        busy=under_way,
    )


async def command(folder: Path) -> Subject:
    argv = ("/usr/bin/python3", "-I", "-c", COMMAND)
    return of_programs(
        CommandTool(name="tool", description="", argv=argv, parameters=SCHEMA, output="json", result_limit_bytes=LIMIT)
    )


async def python(folder: Path) -> Subject:
    (folder / "tool.py").write_text(PYTHON)
    return of_programs(
        PythonTool(name="tool", description="", file=folder / "tool.py", parameters=SCHEMA, result_limit_bytes=LIMIT)
    )


async def http(folder: Path) -> Subject:
    asked = 0

    async def answer(request: web.Request) -> web.Response:
        nonlocal asked
        match request.path:
            case "/well":
                return web.json_response({"n": 7})
            case "/fails":
                return web.Response(status=400, text="it broke")
            case "/floods":
                return web.Response(text="x" * 100_000)
        asked += 1
        try:
            await asyncio.sleep(600)
        finally:
            asked -= 1
        return web.Response()

    app = web.Application()
    app.router.add_get("/{rest:.*}", answer)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]

    def to(path: str) -> tuple[str, dict[str, Any]]:
        return "fetch", {"url": f"http://127.0.0.1:{port}/{path}"}

    tool = HttpTool(
        name="fetch", description="", hosts=["*"], ports=[port], schemes=["http"], networks=["127.0.0.1/32"],
        result_limit_bytes=LIMIT,
    )  # fmt: skip
    return Subject(
        provider=HttpProvider([tool], pool="tools"),
        well=to("well"),
        fails=to("fails"),
        hangs=to("hangs"),
        floods=to("floods"),
        wrong=("fetch", {"url": 7}),
        busy=lambda: asked,
        clean=[runner.cleanup],
    )


async def mcp(folder: Path) -> Subject:
    made = Path(tempfile.mkdtemp(prefix="swarmx-mcp-"))
    made.chmod(0o755)
    shutil.copy(Path(__file__).parent / "mcp_pipes.py", made)
    (made / "mcp_pipes.py").chmod(0o644)
    server = McpServer(
        name="pipes",
        argv=("/usr/bin/python3", "-I", str(made / "mcp_pipes.py")),
        mounts=(made,),
        start_s=60.0,
        result_limit_bytes=LIMIT,
    )

    async def clean() -> None:
        shutil.rmtree(made)

    return Subject(
        provider=McpProvider(server, pool="tools", jail=Jail(slots=4)),
        well=("pipes.echo", {"text": "7"}),
        fails=("pipes.fail", {}),
        hangs=("pipes.block", {}),
        floods=("pipes.much", {"size": 1_000_000}),
        wrong=("pipes.echo", {}),
        busy=under_way,
        clean=[clean],
    )


@pytest.fixture(params=[command, python, mcp, http], ids=lambda make: make.__name__)
async def subject(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Subject]:
    if request.param is not http and not sandboxed():
        pytest.skip("there is no bubblewrap: run `make sandbox`")
    subject: Subject = await request.param(tmp_path)
    yield subject
    for clean in subject.clean:
        await clean()


@pytest.fixture
async def toolbox(subject: Subject) -> AsyncIterator[Toolbox]:
    before = under_way()
    toolbox = Toolbox([subject.provider], now_s=lambda: 1000.0)
    await toolbox.open()
    assert toolbox.refused == {}
    yield toolbox
    await toolbox.close()
    assert under_way() == before, "a provider that is closed leaves nothing running"


def used(use: tuple[str, dict[str, Any]], **more: Any) -> Any:
    call = a_call(use[0], **more)
    return type(call)(**{**{name: getattr(call, name) for name in call.__struct_fields__}, "arguments": use[1]})


async def test_a_call_that_is_well_has_an_output_and_a_time(subject: Subject, toolbox: Toolbox) -> None:
    result = await toolbox.call(used(subject.well))
    assert (result.cause, result.error) == ("", "")
    assert "7" in str(result.output)
    assert result.wall_s > 0.0


async def test_a_tools_failure_is_a_result_and_says_why(subject: Subject, toolbox: Toolbox) -> None:
    result = await toolbox.call(used(subject.fails))
    assert result.cause == "tool"
    assert "it broke" in result.error
    assert result.output is None
    assert (await toolbox.call(used(subject.well))).cause == ""


async def test_arguments_that_do_not_fit_never_reach_the_tool(subject: Subject, toolbox: Toolbox) -> None:
    result = await toolbox.call(used(subject.wrong))
    assert result.cause == "refused"
    assert result.wall_s == 0.0


async def test_a_call_that_is_cancelled_has_ended_all_it_started(subject: Subject, toolbox: Toolbox) -> None:
    task = asyncio.create_task(toolbox.call(used(subject.hangs)))
    await until(lambda: subject.busy() > 0)
    await asyncio.sleep(0.3)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()
    if subject.busy is under_way:
        assert subject.busy() == 0, "not later, but before it returned"
    await until(lambda: subject.busy() == 0)
    assert (await toolbox.call(used(subject.well))).cause == ""


async def test_a_deadline_ends_a_call_and_one_that_has_passed_starts_none(subject: Subject, toolbox: Toolbox) -> None:
    late = await toolbox.call(used(subject.hangs, deadline_at_s=1001.5))
    assert late.cause == "timeout"
    passed = await toolbox.call(used(subject.well, deadline_at_s=999.0))
    assert passed.cause == "timeout"
    assert passed.wall_s == 0.0


async def test_an_answer_over_the_limit_is_cut(subject: Subject, toolbox: Toolbox) -> None:
    result = await toolbox.call(used(subject.floods))
    assert result.cause == "limit"
    assert str(LIMIT) in result.error
    assert (await toolbox.call(used(subject.well))).cause == ""


async def test_calls_at_the_same_time_do_not_mix(subject: Subject, toolbox: Toolbox) -> None:
    results = await asyncio.gather(
        *(toolbox.call(used(subject.well)) for _ in range(6)), toolbox.call(used(subject.fails))
    )
    assert [result.cause for result in results] == [""] * 6 + ["tool"]


async def test_an_unknown_tool_is_refused(toolbox: Toolbox) -> None:
    assert (await toolbox.call(a_call("nothing"))).cause == "refused"


async def test_every_tool_says_what_it_takes(toolbox: Toolbox) -> None:
    for spec in toolbox.tools():
        assert spec.parameters["type"] == "object"
        assert spec.pool == "tools"
        assert spec.timeout_s > 0.0


async def test_close_is_safe_twice(toolbox: Toolbox) -> None:
    await toolbox.close()
    await toolbox.close()
    assert toolbox.tools() == []
