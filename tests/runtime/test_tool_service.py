"""Calls of tools by the router, against real servers on loopback: who is shown what, and what is tried again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import pytest
from aiohttp import web

from swarmx.agents.router_settings import RouterSettings
from swarmx.core.messages import ReplicaChanged
from swarmx.core.records import ModelResult, WorkflowRecord
from swarmx.core.toolbox import ToolCall, ToolResult
from swarmx.neural.empirical import EmpiricalForecaster
from swarmx.providers.tool_replicas import tool_replica
from swarmx.runtime.tool_calls import tool_request
from swarmx.workflows.work import StartToolCall
from tests.runtime.calls.scenes import Scene
from tests.runtime.toolsheds import a_spec, until

Serve = Callable[[web.Request], Awaitable[web.StreamResponse]]
RECORD = WorkflowRecord(
    workflow_id="wf-1", tenant="acme", mode="declared", kind="report", name="r", state="running", created_at_s=1.0
)


class Workbench:
    """A router and a call service before replicas of the pool `tools` that do what the test says."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self.prompts: list[Any] = []
        settings = RouterSettings(policy="round_robin", parameters={}, queue_timeout_s=5.0)
        more = {
            "token_of": {"a": "token-of-a", "b": "token-of-b"}.get,
            "on_prompt": lambda *seen: self.prompts.append(seen),
        }
        self.scene = Scene(stack, settings, EmpiricalForecaster(), **more)
        self._stack = stack
        self.asked: list[tuple[str, web.Request, ToolCall]] = []

    async def serve(self, names: str, *answers: Serve) -> None:
        """Replicas that answer their first calls, counted together, by these, and all later ones by the last."""
        left = list(answers)
        for name in names:
            await self._serve(name, left)

    async def _serve(self, name: str, left: list[Serve]) -> None:
        async def handle(request: web.Request) -> web.StreamResponse:
            self.asked.append((name, request, msgspec.json.decode(await request.read(), type=ToolCall)))
            return await (left.pop(0) if len(left) > 1 else left[0])(request)

        app = web.Application()
        app.router.add_post("/v1/tools/call", handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True, access_log=None)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.add(name, runner.addresses[0][1])

    def add(self, name: str, port: int) -> None:
        replica = tool_replica(name, pool="tools", url=f"http://127.0.0.1:{port}", slots=1, provider="test")
        self.scene.shell.post(ReplicaChanged(replica=replica, state="ready"))

    async def use(self, *, idempotent: bool = False) -> ModelResult:
        start = StartToolCall(path="look", tool="grep", arguments={"word": "hush"}, idempotent=idempotent)
        spec = a_spec("grep", pool="tools", idempotent=idempotent)
        return await self.scene.calls.complete(tool_request(RECORD, start, spec, priority=0))


@pytest.fixture
async def bench() -> AsyncIterator[Workbench]:
    async with AsyncExitStack() as stack:
        made = Workbench(stack)
        stack.callback(made.scene.shell.close)
        stack.push_async_callback(made.scene.upstream.close)
        yield made


async def fine(request: web.Request) -> web.StreamResponse:
    return web.Response(body=msgspec.json.encode(ToolResult(output=[1, 2], wall_s=2.5)))


async def lose(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.close()
    return await asyncio.Event().wait()  # type: ignore[return-value]  # the closed connection cancels it


async def full(request: web.Request) -> web.StreamResponse:
    return web.Response(status=503, text="too many wait")


async def nonsense(request: web.Request) -> web.StreamResponse:
    return web.Response(text='{"choices": 7, "output": 1, "wall_s": "long"}')


async def test_a_replica_is_shown_its_own_token_and_its_answer_is_the_result(bench: Workbench) -> None:
    await bench.serve("a", fine)
    result = await bench.use()
    assert result.answer is not None
    assert (result.answer["output"], result.failure, result.replica_id) == ([1, 2], None, "a")
    ((_, request, call),) = bench.asked
    assert request.headers["authorization"] == "Bearer token-of-a"
    assert request.headers["x-request-id"] == call.request_id == "wf-1/look/1"
    assert (call.tool, call.tenant, call.key) == ("grep", "acme", "wf-1/look")
    assert result.record is not None
    assert (result.record.kind, result.record.work_done, result.record.role) == ("tool", 2.5, "grep")
    assert b"hush" not in msgspec.json.encode(result.record)
    assert bench.prompts == [], "what a tool is given is no prompt"


@pytest.mark.parametrize("trouble", [lose, nonsense])
async def test_what_must_not_be_begun_twice_is_asked_of_nobody_else(bench: Workbench, trouble: Serve) -> None:
    await bench.serve("ab", trouble, fine)
    result = await bench.use()
    assert result.failure is not None
    assert (result.failure.cause, result.failure.begun, result.attempts) == ("replica", True, 1)
    assert len(bench.asked) == 1


@pytest.mark.parametrize("trouble", [lose, nonsense, full])
async def test_what_may_be_called_again_is_asked_of_another(bench: Workbench, trouble: Serve) -> None:
    await bench.serve("ab", trouble, fine)
    result = await bench.use(idempotent=True)
    assert (result.failure, result.attempts) == (None, 2)
    assert {name for name, _, _ in bench.asked} == {"a", "b"}
    assert [request.headers["x-request-id"] for _, request, _ in bench.asked] == ["wf-1/look/1", "wf-1/look/1.2"]


async def test_a_replica_that_was_full_or_not_there_began_nothing(bench: Workbench) -> None:
    bench.add("a", 9)
    await bench.serve("bc", full, fine)
    result = await bench.use()
    assert (result.failure, result.attempts) == (None, 3)


async def test_whoever_no_longer_waits_hangs_up(bench: Workbench) -> None:
    ended = asyncio.Event()

    async def hang(request: web.Request) -> web.StreamResponse:
        try:
            return await asyncio.Event().wait()  # type: ignore[return-value]
        finally:
            ended.set()

    await bench.serve("a", hang)
    waiting = asyncio.create_task(bench.use())
    await until(lambda: bench.asked != [])
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    async with asyncio.timeout(30.0):
        await ended.wait()
    assert [record.state for record in bench.scene.records] == ["cancelled"]
