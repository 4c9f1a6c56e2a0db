"""The door of a replica on a node: HTTP on the node's own address, with a token, to an engine on its loopback."""

from __future__ import annotations

import asyncio
import hmac

import aiohttp
from aiohttp import web

_OPEN = frozenset({"/health", "/metrics"})
_HOP = frozenset(
    {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "content-length", "host"}
)
_MOST_BYTES = 64 * 1024 * 1024


class Door:
    """Relays each request as it is, and each answer as it comes; a caller that hangs up ends its request.

    How the engine is may be asked without the token.
    """

    def __init__(self, engine_url: str, token: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._touched_s = self._loop.time()
        self._engine_url = engine_url
        self._expected = f"Bearer {token}".encode()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=3.0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5.0),
            auto_decompress=False,
        )
        app = web.Application(client_max_size=_MOST_BYTES)
        app.router.add_route("*", "/{path:.*}", self._relay)
        self._runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, auto_decompress=False, shutdown_timeout=1.0
        )

    async def open(self, host: str) -> int:
        """Listen on a free port of the address; returns the port."""
        await self._runner.setup()
        await web.TCPSite(self._runner, host, 0).start()
        port: int = self._runner.addresses[0][1]
        return port

    async def close(self) -> None:
        """Twice is fine."""
        await self._runner.cleanup()
        await self._session.close()

    async def deserted(self, after_s: float) -> None:
        """Returns once nobody has come for so long."""
        while (left_s := self._touched_s + after_s - self._loop.time()) > 0.0:  # noqa: ASYNC110  # an end, not an event
            await asyncio.sleep(left_s)

    async def _relay(self, request: web.Request) -> web.StreamResponse:
        shown = request.headers.get("authorization", "").encode()
        if request.path not in _OPEN and not hmac.compare_digest(shown, self._expected):
            return web.json_response({"error": {"message": "the token is missing or wrong"}}, status=401)
        self._touched_s = self._loop.time()
        body = await request.read()
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP}
        begun: web.StreamResponse | None = None
        try:
            async with self._session.request(
                request.method, self._engine_url + request.path_qs, data=body, headers=headers, allow_redirects=False
            ) as answer:
                begun = web.StreamResponse(status=answer.status, reason=answer.reason)
                for name, value in answer.headers.items():
                    if name.lower() not in _HOP:
                        begun.headers.add(name, value)
                if (length := answer.headers.get("content-length")) is not None:
                    begun.content_length = int(length)
                await begun.prepare(request)
                async for chunk in answer.content.iter_any():
                    await begun.write(chunk)
                await begun.write_eof()
                return begun
        except (aiohttp.ClientError, OSError) as error:
            if begun is None:
                return web.json_response({"error": {"message": f"the engine does not answer: {error!r}"}}, status=502)
            if request.transport is not None:  # what came is not all: the caller must see that it broke off
                request.transport.abort()
            return begun
