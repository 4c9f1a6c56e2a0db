"""The HTTP side that all emulated servers share: bodies in, OpenAI errors out, and noticing that a client left."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = (b"x-swarmx-emulated", b"1")
MAX_BODY_BYTES = 32 * 1024 * 1024

T = TypeVar("T")


class ApiError(Exception):
    """An answer in OpenAI's error shape."""

    def __init__(self, status: int, message: str, *, kind: str = "BadRequestError", param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param

    def response(self) -> Response:
        """The error as it goes over the wire."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}
        return json_response({"error": error}, self.status)


def json_response(body: Any, status: int = 200) -> Response:
    """Any msgspec value as JSON."""
    return Response(msgspec.json.encode(body), status, media_type="application/json")


def unknown_model(asked: str, served: str) -> ApiError:
    """The model of the request is not the one here."""
    return ApiError(
        404, f"The model `{asked}` does not exist, this server has `{served}`.", kind="NotFoundError", param="model"
    )


async def read(request: Request, kind: type[T]) -> T:
    """The body of a request. Raises ApiError when it is not JSON of this kind."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(413, f"The body is larger than {MAX_BODY_BYTES} bytes.")
    try:
        return msgspec.json.decode(bytes(body), type=kind)
    except msgspec.ValidationError as error:
        raise ApiError(400, f"The request is not valid: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"The body is not JSON: {error}") from error


async def or_gone(waited: asyncio.Future[None], receive: Receive) -> bool:
    """Wait until the future resolves (true) or the client hangs up (false). The body must have been read."""
    gone = asyncio.ensure_future(hang_up(receive))
    try:
        await asyncio.wait((waited, gone), return_when=asyncio.FIRST_COMPLETED)
        return waited.done()
    finally:
        gone.cancel()


async def hang_up(receive: Receive) -> None:
    """Return when the client closes the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def start_events(send: Send) -> None:
    """Begin a stream of server-sent events."""
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def write(send: Send, body: bytes, *, more: bool = True) -> None:
    """Send a part of a response."""
    await send({"type": "http.response.body", "body": body, "more_body": more})


class Endpoint:
    """An ASGI endpoint: reads, answers through `send`, turns ApiError into a response."""

    def __init__(self, answer: Callable[[Request, Send], Awaitable[Response | None]]) -> None:
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; None from `answer` means that it wrote the response itself, or that nobody listens."""
        request = Request(scope, receive)
        try:
            response = await self._answer(request, send)
        except ApiError as error:
            response = error.response()
        except ClientDisconnect:
            return
        if response is not None:
            await response(scope, receive, send)


class Labelled:
    """Marks every response as emulated."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app with the header added to each response."""

        async def labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), HEADER]
            await send(message)

        await self._app(scope, receive, labelled)
