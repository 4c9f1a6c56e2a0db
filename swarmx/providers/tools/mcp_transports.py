"""Ways to an MCP server that the sandbox and the guard watch: a program's pipes, and HTTP to a checked address."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio
import httpx2
from mcp.client._transport import TransportStreams
from mcp.shared.message import SessionMessage
from mcp.types import jsonrpc_message_adapter

from swarmx.providers.tools.egress import Denied, Guard
from swarmx.providers.tools.jail import Inmate, Jail
from swarmx.providers.tools.pipes import read_some, write_all
from swarmx.providers.tools.profile import Program


class TooLong(Exception):
    """A server sent a message longer than it may."""


@asynccontextmanager
async def through_pipes(
    jail: Jail, program: Program, *, limit_bytes: int, ended: Callable[[str], None], flooded: Callable[[], None]
) -> AsyncIterator[TransportStreams]:
    """A server in the sandbox, which is ended on leaving. `ended` is told when, and why, it will say nothing more.

    A message of more than `limit_bytes` ends it too, and is told to `flooded` instead.
    """
    async with jail.running(program) as inmate:
        said_writer, said = anyio.create_memory_object_stream[SessionMessage | Exception](0)
        told, told_reader = anyio.create_memory_object_stream[SessionMessage](0)

        async def listen() -> None:
            async with said_writer:
                try:
                    async for line in _lines(inmate, limit_bytes):
                        await said_writer.send(_message(line))
                except TooLong:
                    flooded()
                except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                    return
                else:
                    ended("its program ended")

        async def speak() -> None:
            async with told_reader:
                async for message in told_reader:
                    text = message.message.model_dump_json(by_alias=True, exclude_unset=True)
                    try:
                        await write_all(inmate.stdin, text.encode() + b"\n")
                    except OSError:
                        return  # it has ended, as `listen` finds

        async with said, told, anyio.create_task_group() as tasks:
            tasks.start_soon(listen)
            tasks.start_soon(speak)
            tasks.start_soon(_drain, inmate.stderr)
            try:
                yield said, told
            finally:
                tasks.cancel_scope.cancel()


class GuardedTransport(httpx2.AsyncBaseTransport):
    """HTTP to the address that the guard has seen, under the server's own name; redirects are errors.

    `flooded` is told when the answer to a POST has more than `limit_bytes`, and is cut.
    """

    def __init__(self, guard: Guard, *, limit_bytes: int, flooded: Callable[[], None]) -> None:
        self._guard = guard
        self._limit_bytes = limit_bytes
        self._flooded = flooded
        self._inner = httpx2.AsyncHTTPTransport(trust_env=False)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send one request."""
        host = request.url.raw_host.decode()  # as it is asked for, and not as it is shown
        try:
            addresses = await self._guard.addresses(host)
        except Denied as denied:
            raise httpx2.ConnectError(str(denied), request=request) from None
        pinned = httpx2.Request(
            request.method,
            request.url.copy_with(host=str(addresses[0])),
            headers=request.headers,
            stream=request.stream,
            extensions={**request.extensions, "sni_hostname": host},
        )
        response = await self._inner.handle_async_request(pinned)
        if response.is_redirect:
            await response.aclose()
            raise httpx2.ConnectError("the server redirects, which is not followed", request=request)
        if request.method == "POST" and isinstance(response.stream, httpx2.AsyncByteStream):
            response.stream = _Capped(response.stream, self._limit_bytes, self._flooded)
        return response

    async def aclose(self) -> None:
        """Close all connections."""
        await self._inner.aclose()


class _Capped(httpx2.AsyncByteStream):
    """A body that ends with an error when it gets too long."""

    def __init__(self, inner: httpx2.AsyncByteStream, limit_bytes: int, flooded: Callable[[], None]) -> None:
        self._inner = inner
        self._limit_bytes = limit_bytes
        self._flooded = flooded

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for chunk in self._inner:
            size += len(chunk)
            if size > self._limit_bytes:
                self._flooded()
                raise httpx2.ReadError(f"the answer has more than {self._limit_bytes} bytes")
            yield chunk

    async def aclose(self) -> None:
        await self._inner.aclose()


async def _lines(inmate: Inmate, limit_bytes: int) -> AsyncIterator[bytes]:
    """What it says, by line. Raises TooLong."""
    buffer = bytearray()
    while chunk := await read_some(inmate.stdout):
        buffer += chunk
        *lines, rest = buffer.split(b"\n")
        for line in lines:
            if line.strip():
                yield bytes(line)
        buffer = bytearray(rest)
        if len(buffer) > limit_bytes:
            raise TooLong


def _message(line: bytes) -> SessionMessage | Exception:
    try:
        return SessionMessage(jsonrpc_message_adapter.validate_json(line, by_name=False))
    except ValueError as error:
        return error


async def _drain(descriptor: int) -> None:
    """Its log is nobody's business, but must not block it."""
    while await read_some(descriptor):
        pass
