"""The HTTP side of a tool replica: calls in, results out, and a caller that hangs up ends its call."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Iterable

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from swarmx.core.toolbox import Offer, ToolCall, ToolResult
from swarmx.providers.tools.toolbox import Toolbox

MAX_BODY_BYTES = 4 * 1024 * 1024
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class ToolServer(Collector):
    """Serves the tools of a toolbox to whoever has the token, `slots` calls at a time and at most `waiting` more."""

    def __init__(self, toolbox: Toolbox, *, pool: str, slots: int, waiting: int, token: str) -> None:
        self._toolbox = toolbox
        self._pool = pool
        self._slots = slots
        self._most_waiting = waiting
        self._token = f"Bearer {token}".encode()
        self._free = asyncio.Semaphore(slots)
        self._running = 0
        self._waiting = 0
        self._ended: dict[str, int] = {}
        self._calls: set[asyncio.Task[ToolResult]] = set()
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self.app = Starlette(
            routes=[
                Route("/v1/tools/call", _Call(self), methods=["POST"]),
                Route("/v1/tools", self._offer),
                Route("/health", self._health),
                Route("/metrics", self._metrics),
            ]
        )

    async def close(self) -> None:
        """End all calls, then the toolbox."""
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)
        await self._toolbox.close()

    async def answer(self, request: Request, receive: Receive) -> Response | None:
        """One call; None when the caller left, and everything of the call is ended."""
        if not self._knows(request):
            return _problem(401, "The token is missing or wrong.")
        try:
            call = msgspec.json.decode(await _body(request), type=ToolCall)
        except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return _problem(400, f"Not a tool call: {error}")
        except _TooLarge:
            return _problem(413, f"The body is larger than {MAX_BODY_BYTES} bytes.")
        if self._waiting >= self._most_waiting and self._free.locked():
            return _problem(503, f"{self._waiting} calls wait already.")
        task = asyncio.create_task(self._called(call), name=f"tool {call.tool}")
        self._calls.add(task)
        gone = asyncio.create_task(_hang_up(receive))
        try:
            await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait((task,))
            self._calls.discard(task)
        if task.cancelled():
            self._count("cancelled")
            return None
        result = task.result()
        self._count(result.cause or "done")
        return Response(
            msgspec.json.encode(result),
            media_type="application/json",
            headers={"x-request-id": "".join(c if " " <= c <= "~" else "?" for c in call.request_id)},
        )

    def collect(self) -> Iterable[Metric]:
        """All metric families (called by the registry)."""
        for name, text, value in (
            ("num_requests_running", "Calls that have a slot.", self._running),
            ("num_requests_waiting", "Calls that wait for a slot.", self._waiting),
            ("slots", "Calls that can run at a time.", self._slots),
        ):
            family = GaugeMetricFamily(f"swarmx_tools:{name}", text, labels=["pool"])
            family.add_metric([self._pool], value)
            yield family
        ended = CounterMetricFamily("swarmx_tools:calls", "Calls by how they ended.", labels=["pool", "cause"])
        for cause, count in self._ended.items():
            ended.add_metric([self._pool, cause], count)
        yield ended

    async def _called(self, call: ToolCall) -> ToolResult:
        self._waiting += 1
        try:
            await self._free.acquire()
        finally:
            self._waiting -= 1
        self._running += 1
        try:
            return await self._toolbox.call(call)
        finally:
            self._running -= 1
            self._free.release()

    def _count(self, end: str) -> None:
        self._ended[end] = self._ended.get(end, 0) + 1

    def _knows(self, request: Request) -> bool:
        return hmac.compare_digest(request.headers.get("authorization", "").encode(), self._token)

    async def _offer(self, request: Request) -> Response:
        if not self._knows(request):
            return _problem(401, "The token is missing or wrong.")
        offer = Offer(pool=self._pool, slots=self._slots, tools=self._toolbox.tools(), refused=self._toolbox.refused)
        return Response(msgspec.json.encode(offer), media_type="application/json")

    async def _health(self, request: Request) -> Response:
        return Response()

    async def _metrics(self, request: Request) -> Response:
        return Response(generate_latest(self._registry), headers={"content-type": _METRICS_TYPE})


class _Call:
    """The endpoint of calls, which needs to hear when the caller hangs up."""

    def __init__(self, server: ToolServer) -> None:
        self._server = server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = await self._server.answer(Request(scope, receive), receive)
        except ClientDisconnect:
            return
        if response is not None:
            await response(scope, receive, send)


class _TooLarge(Exception):
    """A body has more bytes than is allowed."""


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise _TooLarge
    return bytes(body)


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _problem(status: int, detail: str) -> Response:
    return Response(msgspec.json.encode({"error": detail}), status, media_type="application/json")
