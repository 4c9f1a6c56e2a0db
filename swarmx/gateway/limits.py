"""Refuses a request body that is too large, before it is read into memory."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from swarmx.gateway.problems import problem

_DROPPED_BYTES = 64 * 1024 * 1024
_DROPPED_S = 10.0


class _TooLarge(Exception):
    pass


class BodyLimit:
    """ASGI middleware: answers 413 once a body says or turns out to be longer than `max_bytes`."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_bytes:
            await self._refuse(scope, receive, send)
            return
        seen, over, started = 0, False, False

        async def counted() -> Message:
            nonlocal seen, over
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > self._max_bytes:
                    over = True
                    raise _TooLarge
            return message

        async def watched(message: Message) -> None:
            nonlocal started
            if started or not over:  # what the app says of a body that broke off is not what was wrong
                started = True
                await send(message)

        with contextlib.suppress(_TooLarge):
            await self._app(scope, counted, watched)
        if over and not started:
            await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _drop(receive)
        detail = f"the body is larger than {self._max_bytes} bytes; `server.max_body_bytes` sets the limit."
        response = problem(Request(scope), 413, detail)
        response.headers["connection"] = "close"
        await response(scope, receive, send)


async def _drop(receive: Receive) -> None:
    """Read on for a while: a client whose body is cut off mostly sees a broken connection instead of the answer."""
    dropped, more = 0, True
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DROPPED_S):
            while more and dropped < _DROPPED_BYTES:
                message = await receive()
                dropped += len(message.get("body", b""))
                more = message["type"] == "http.request" and message.get("more_body", False)
