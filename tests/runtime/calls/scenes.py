"""A router and a call service before servers on loopback that answer, fail or hang as a test says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

from aiohttp import web

from swarmx.agents.router import RouterAgent
from swarmx.agents.router_settings import RouterSettings
from swarmx.core.actions import Cancel, Dispatch, Refuse
from swarmx.core.messages import DecisionMade, Message, TimerFired
from swarmx.core.nouns import Decision, ReplicaState
from swarmx.core.ports import Forecaster
from swarmx.core.prompts import PromptText
from swarmx.core.records import CallRecord, ModelRequest
from swarmx.runtime.calls import CallService
from swarmx.runtime.clock import WallClock
from swarmx.runtime.fleet_book import FleetBook
from swarmx.runtime.journal import MemoryJournal
from swarmx.runtime.live import LiveShell
from swarmx.runtime.switchboard import Switchboard
from swarmx.runtime.upstream import Upstream
from tests.agents.worlds import PROMPT, a_call, changed

ANSWER = b'{"choices":[{"message":{"content":"42"}}],  "usage":{"prompt_tokens":11,"completion_tokens":5}}'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":11,"completion_tokens":3}}\n\n'
EVENTS = [b'data: {"choices":[{"delta":{"content":"%d"}}]}\n\n' % i for i in range(3)]
STREAM = [*EVENTS, USAGE, b"data: [DONE]\n\n"]

Serve = Callable[[web.Request], Awaitable[web.StreamResponse]]


class InterruptedUpstream(Upstream):
    """Does something between the last byte of an answer and the moment in which the call hears of it."""

    then: Callable[[], None] | None = None

    async def read(self, response: Any) -> Any:
        found = await super().read(response)
        if self.then is not None:
            self.then()
        return found


class Scene:
    """A router, its live shell and a call service before servers that do what the test says."""

    def __init__(self, stack: AsyncExitStack, settings: RouterSettings, forecaster: Forecaster, **more: Any) -> None:
        self.records: list[CallRecord] = []
        self.heard: list[Message] = []
        self.router = RouterAgent(settings)
        self._stack = stack
        self._urls: dict[str, str] = {}
        clock = WallClock()
        self.book = FleetBook(clock)
        self.switchboard = Switchboard([self.router], epoch=1, journal=MemoryJournal(limit=0))
        self.forecaster = forecaster
        self.upstream = InterruptedUpstream(connect_timeout_s=1.0)
        self.calls = CallService(
            post=lambda message: self.shell.post(message),
            clock=clock,
            forecaster=self.forecaster,
            upstream=self.upstream,
            book=self.book,
            on_record=self.records.append,
            **more,
        )
        self.shell = LiveShell(
            self.switchboard,
            clock,
            {
                Dispatch: self.calls.perform_dispatch,
                Cancel: self.calls.perform_cancel,
                Refuse: self.calls.perform_refuse,
            },
        )
        self.switchboard.observers += [
            self.book.observe,
            self.calls.observe,
            lambda message, now_s: self.heard.append(message),
        ]

    def announce(self) -> None:
        """A replica of the model is starting, so calls wait for it."""
        self.shell.post(changed("later", "starting"))

    async def serve(self, name: str, *serve: Serve) -> None:
        """A replica that answers its first calls by the functions, and all later ones by the last."""
        left = list(serve)

        async def handle(request: web.Request) -> web.StreamResponse:
            await request.read()
            return await (left.pop(0) if len(left) > 1 else left[0])(request)

        app = web.Application()
        app.router.add_post("/v1/chat/completions", handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.add(name, runner.addresses[0][1])

    def add(self, name: str, port: int) -> None:
        self._urls[name] = f"http://127.0.0.1:{port}"
        self.change(name, "ready")

    def change(self, name: str, state: ReplicaState) -> None:
        self.shell.post(changed(name, state, url=self._urls[name]))

    async def ask(self, prompt: PromptText = PROMPT) -> bytes:
        return (await self.calls.answer(a_call("c"), prompt, b"{}")).body

    async def ask_stream(self) -> list[bytes]:
        return [chunk async for chunk in self.calls.stream(a_call("c", stream=True), PROMPT, b"{}")]

    def run_out_of_patience(self) -> None:
        """The router's timer for the answer, sooner than its time."""
        self.shell.post(TimerFired(key="answer:c"), to="router")

    def decisions(self, call_id: str = "c") -> list[Decision]:
        made = [message.decision for message in self.heard if isinstance(message, DecisionMade)]
        return [decision for decision in made if decision.call.call_id == call_id]

    async def occupy(self, name: str, stack: AsyncExitStack) -> None:
        """Another call is at the replica, and stays there until the stack is closed."""
        others = [other for other in self._urls if other != name]
        for other in others:
            self.change(other, "cordoned")
        task = asyncio.create_task(self.calls.answer(a_call(f"at {name}"), PROMPT, b"{}"))
        while not self.router.in_flight(name):
            await asyncio.sleep(0)
        for other in others:
            self.change(other, "ready")

        async def leave() -> None:
            task.cancel()
            await asyncio.wait({task})

        stack.push_async_callback(leave)

    def attempts_in_flight(self) -> int:
        return sum(self.router.in_flight(name) for name in self._urls)

    def check_settled(self, state: str) -> CallRecord:
        """Exactly one record, and nothing left anywhere."""
        (record,) = self.records
        assert record.state == state
        assert self.attempts_in_flight() == self.calls.in_flight == self.switchboard.faults == 0
        assert not any(status.in_flight for status in self.book.statuses())
        self.router.validate()
        return record


Make = Callable[..., Scene]


async def plain(request: web.Request) -> web.StreamResponse:
    return web.Response(body=ANSWER, content_type="application/json")


def with_status(status: int, body: bytes = b"{}") -> Serve:
    async def serve(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, body=body)

    return serve


def saying(body: bytes) -> Serve:
    async def serve(request: web.Request) -> web.StreamResponse:
        return web.Response(body=body)

    return serve


def streaming(*chunks: bytes, breaks: bool = False) -> Serve:
    async def serve(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for chunk in chunks:
            await response.write(chunk)
            await asyncio.sleep(0)
        if breaks:
            transport_of(request).close()
        return response

    return serve


async def closing(request: web.Request) -> web.StreamResponse:
    transport_of(request).close()
    return web.Response()


class Hanging:
    """Starts to answer with `chunks` and then says nothing more; knows when its client has left."""

    def __init__(self, *chunks: bytes, status: int = 200) -> None:
        self.entered = asyncio.Event()
        self.left = asyncio.Event()
        self._chunks = chunks
        self._status = status

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        try:
            response = web.StreamResponse(status=self._status)
            if self._chunks:
                await response.prepare(request)
            for chunk in self._chunks:
                await response.write(chunk)
            self.entered.set()
            await asyncio.Event().wait()
        finally:
            self.left.set()
        return response


def transport_of(request: web.Request) -> asyncio.Transport:
    assert isinstance(request.transport, asyncio.Transport)
    return request.transport


def a_request(**more: Any) -> ModelRequest:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1000}
    return ModelRequest(
        tenant="t", workflow_id="w", workflow_kind="k", node="n", role="r", kind="llm", model="m", body=body, **more
    )
