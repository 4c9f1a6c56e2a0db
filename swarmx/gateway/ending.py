"""Answers the requests that the end of the server cuts off."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from swarmx.gateway.problems import problem

_DETAIL = "the server is stopping; ask again. Accepted workflows go on when it starts again."


class CutOff:
    """ASGI middleware: 503 to a request that is cancelled before its answer began, which only a server does that ends.

    An answer that has begun breaks off, and its client sees that.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except asyncio.CancelledError:
            if not begun and scope["type"] == "http":
                response = problem(Request(scope), 503, _DETAIL)
                response.headers["retry-after"] = "1"
                await response(scope, receive, send)
