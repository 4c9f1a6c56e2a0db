"""Tools of MCP servers, in the sandbox or at a URL; what a server says is a stranger's text."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any, cast

import httpx2
from mcp import Client, MCPError
from mcp.client.streamable_http import streamable_http_client
from mcp.types import CONNECTION_CLOSED, CallToolResult, TextContent, Tool
from mcp_types import RequestParamsMeta
from yarl import URL

from swarmx.core.errors import ConfigError
from swarmx.core.toolbox import ToolCall, ToolResult, ToolSpec
from swarmx.providers.tools.egress import Denied, Guard, Resolve, resolve
from swarmx.providers.tools.http_tool import secret_headers
from swarmx.providers.tools.jail import Jail
from swarmx.providers.tools.mcp_transports import GuardedTransport, through_pipes
from swarmx.providers.tools.profile import Program
from swarmx.providers.tools.settings import McpServer
from swarmx.providers.tools.toolbox import over_limit
from swarmx.workflows.json_schema import without_unusable_patterns

# The client reports odd servers to its logs with their own words.
logging.getLogger("mcp").setLevel(logging.CRITICAL)

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_PAGES = 20
_DESCRIPTION_CHARACTERS = 2000
_STOP_S = 10.0
_KEY = "swarmx/idempotency-key"


class McpProvider:
    """A ToolProvider of one MCP server, connected while it is open and again when a call finds it gone.

    Calls share the server. One that is cancelled tells the server so, and retires it: a program is ended with the last
    of the calls that it has, at once if there is no other, and the next call gets a new one.
    """

    def __init__(self, server: McpServer, *, pool: str, jail: Jail | None, resolve: Resolve = resolve) -> None:
        self.name = server.name
        self._server = server
        self._pool = pool
        self._jail = jail
        self._resolve = resolve
        self._specs: tuple[ToolSpec, ...] = ()
        self._link: _Link | None = None
        self._linking: asyncio.Task[_Link | str] | None = None
        self._links: set[_Link] = set()

    async def open(self) -> None:
        """Connect and list the tools. Raises ConfigError."""
        if self._jail is not None:
            await self._jail.open()
        try:
            link = await self._linked()
            tools = await asyncio.wait_for(_listed(link.client), self._server.start_s)
        except (TimeoutError, _Gone, MCPError) as error:
            await self.close()
            raise ConfigError(f"the MCP server {self.name} cannot be used: {error or 'it lists no tools'}") from None
        self._specs = tuple(self._spec(tool) for tool in tools if self._wanted(tool))

    async def close(self) -> None:
        """Disconnect; a program is ended."""
        if self._linking is not None:
            self._linking.cancel()
            await asyncio.wait((self._linking,))
        self._link = None
        await asyncio.gather(*(link.close() for link in list(self._links)))
        self._links.clear()
        if self._jail is not None:
            await self._jail.close()

    def tools(self) -> Sequence[ToolSpec]:
        """What it listed when it was opened."""
        return self._specs

    async def call(self, call: ToolCall) -> ToolResult:
        """Have the server call its tool."""
        tool = call.tool.removeprefix(f"{self.name}.")
        try:
            link = await self._linked()
        except _Gone as gone:
            return ToolResult(error=f"{call.tool}: the server cannot be reached: {gone}", cause="unavailable")
        meta = cast(RequestParamsMeta, {_KEY: call.key})  # its type knows the keys of the specification only
        link.calls += 1
        floods = link.floods
        try:
            return self._result(call.tool, await link.client.call_tool(tool, call.arguments, meta=meta))
        except asyncio.CancelledError:
            self._retire(link)
            raise
        except MCPError as error:
            if error.code == CONNECTION_CLOSED:
                link.gone = link.gone or error.message
            return self._lost(call.tool, link, floods) or ToolResult(
                error=f"{call.tool}: {error.message}", cause="tool"
            )
        except Exception as error:  # noqa: BLE001  # the client lets through what its transports raise
            self._retire(link)
            return self._lost(call.tool, link, floods) or ToolResult(
                error=f"{call.tool}: the server answered outside its protocol ({type(error).__name__})", cause="tool"
            )
        finally:
            link.calls -= 1
            if link is not self._link and link.calls == 0:
                await self._drop(link)

    async def _linked(self) -> _Link:
        """The connection to use. One that is being made is everybody's: a call that gives up does not end it.

        Raises _Gone.
        """
        if self._link is None or self._link.gone:
            if self._linking is None or self._linking.done():
                self._linking = asyncio.create_task(self._connect(), name=f"connecting to {self.name}")
            found = await asyncio.shield(self._linking)
            if isinstance(found, str):
                raise _Gone(found)
            return found
        return self._link

    async def _connect(self) -> _Link | str:
        fresh = _Link(self._server, jail=self._jail, resolve=self._resolve)
        self._links.add(fresh)
        try:
            await asyncio.wait_for(fresh.open(), self._server.start_s)
        except (TimeoutError, _Gone) as error:
            await self._drop(fresh)
            return str(error) or f"it did not answer within {self._server.start_s:g} s"
        former, self._link = self._link, fresh
        if former is not None and former.calls == 0:
            await self._drop(former)
        return fresh

    async def _drop(self, link: _Link) -> None:
        await link.close()
        self._links.discard(link)

    def _retire(self, link: _Link) -> None:
        if self._link is link:
            self._link = None

    def _lost(self, tool: str, link: _Link, floods: int) -> ToolResult | None:
        """The result of a call whose connection ended, or that was answered too much; `floods` were there before."""
        if link.gone:
            self._retire(link)
        if link.floods > floods:
            return over_limit(tool, self._server.result_limit_bytes)
        if link.gone:
            return ToolResult(error=f"{tool}: the connection was lost: {link.gone}", cause="unavailable")
        return None

    def _wanted(self, tool: Tool) -> bool:
        return _NAME.fullmatch(tool.name) is not None and (not self._server.only or tool.name in self._server.only)

    def _spec(self, tool: Tool) -> ToolSpec:
        server = self._server
        return ToolSpec(
            name=f"{self.name}.{tool.name}",
            description=_plain((tool.description or "")[:_DESCRIPTION_CHARACTERS]),
            parameters=without_unusable_patterns(tool.input_schema),
            pool=self._pool,
            timeout_s=server.timeout_s,
            idempotent=server.idempotent,
            tenants=server.tenants,
            result_limit_bytes=server.result_limit_bytes,
        )

    def _result(self, tool: str, answer: CallToolResult) -> ToolResult:
        texts = [block.text for block in answer.content if isinstance(block, TextContent)]
        if answer.is_error:
            return ToolResult(error=f"{tool}: {' '.join(texts) or 'it failed, and said nothing'}", cause="tool")
        if answer.structured_content is not None:
            return ToolResult(output=answer.structured_content)
        if len(texts) == len(answer.content):
            return ToolResult(output="\n".join(texts))
        blocks = [block.model_dump(mode="json", by_alias=True, exclude_none=True) for block in answer.content]
        return ToolResult(output=blocks)


def _plain(text: str) -> str:
    """Without characters that command terminals, or turn what is shown around."""
    return "".join(char if char.isprintable() or char == "\n" else " " for char in text)


class _Gone(Exception):
    """There is no connection to a server; the text says why."""


class _Link:
    """One connection. The client's scopes are entered and left by one task, whoever calls."""

    def __init__(self, server: McpServer, *, jail: Jail | None, resolve: Resolve) -> None:
        self.calls = 0
        self.gone = ""
        self.floods = 0
        self.client: Client
        self._server = server
        self._jail = jail
        self._resolve = resolve
        self._opened: asyncio.Future[Client] = asyncio.get_running_loop().create_future()
        self._leaving = asyncio.Event()
        self._owner = asyncio.create_task(self._own(), name=f"MCP server {server.name}")

    async def open(self) -> None:
        """Returns once the server has shaken hands. Raises _Gone."""
        await asyncio.wait((self._opened, self._owner), return_when=asyncio.FIRST_COMPLETED)
        if not self._opened.done():
            raise _Gone(self.gone or "it ended at its start")
        self.client = self._opened.result()

    async def close(self) -> None:
        """Disconnect, and end its program. Returns when that is done, cancelled or not."""
        self._leaving.set()
        cancelled = False
        patience_s = _STOP_S if self._opened.done() else 0.0
        while not self._owner.done():
            try:
                done, _ = await asyncio.wait((self._owner,), timeout=patience_s)
                if not done:
                    self._owner.cancel()
            except asyncio.CancelledError:
                cancelled = True
            patience_s = 1.0
        if cancelled:
            raise asyncio.CancelledError

    async def _own(self) -> None:
        try:
            async with AsyncExitStack() as stack:
                transport = await self._transport(stack)
                client = await stack.enter_async_context(Client(transport, cache=None))
                # The session would match a stranger's regular expressions on this loop; `Toolbox` bounds what it says.
                client.session.validate_tool_result = _as_it_is  # type: ignore[method-assign]
                self._opened.set_result(client)
                await self._leaving.wait()
        except asyncio.CancelledError:
            self._end("it was told to stop")
            raise
        except Exception as error:  # noqa: BLE001  # a server can fail in any way, and its client with it
            self._end(_why(error))
        else:
            self._end("it was closed")

    async def _transport(self, stack: AsyncExitStack) -> Any:
        server = self._server
        # A text arrives escaped, and often twice: as content, and as structured content.
        limit_bytes = 4 * server.result_limit_bytes + 64 * 1024
        headers = secret_headers(server.secret_headers, of=server.name)
        if self._jail is not None:
            program = Program(
                argv=server.argv,
                limits=server.limits(),
                stdin=None,
                mounts=server.mounts,
                environment=server.environment,
            )
            return through_pipes(self._jail, program, limit_bytes=limit_bytes, ended=self._end, flooded=self._flood)
        guard = _guard(server, self._resolve)
        client = httpx2.AsyncClient(
            transport=GuardedTransport(guard, limit_bytes=limit_bytes, flooded=self._flood),
            headers=headers,
            timeout=httpx2.Timeout(server.timeout_s),
            trust_env=False,
            follow_redirects=False,
        )
        await stack.enter_async_context(client)
        return streamable_http_client(
            server.url, http_client=client, terminate_on_close=False, max_sse_event_size=2 * limit_bytes
        )

    def _flood(self) -> None:
        self.floods += 1
        self._end("it sent too much")

    def _end(self, why: str) -> None:
        self.gone = self.gone or why
        self._leaving.set()


def _guard(server: McpServer, resolve: Resolve) -> Guard:
    """Lets requests to the one server through. Raises _Gone when its URL is none."""
    try:
        url = URL(server.url)
        guard = Guard(
            hosts=[f"[{url.raw_host}]" if ":" in str(url.raw_host) else str(url.raw_host)],
            ports=[url.port or 0],
            schemes=[url.scheme],
            networks=server.networks,
            resolve=resolve,
        )
        guard.read(server.url)
    except (Denied, ValueError) as error:
        raise _Gone(f"{server.url} may not be asked: {error}") from None
    return guard


async def _listed(client: Client) -> list[Tool]:
    tools: list[Tool] = []
    cursor: str | None = None
    for _ in range(_PAGES):
        page = await client.list_tools(cursor=cursor)
        tools += page.tools
        cursor = page.next_cursor
        if cursor is None:
            break
    return tools


async def _as_it_is(name: str, result: CallToolResult) -> None:
    """Takes the result of a tool for what it is, whatever schema the server gave for it."""


def _why(error: BaseException) -> str:
    """The first cause in a group of errors."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) or type(error).__name__
