"""Tools that make HTTP requests for workflows, through the guard and to the address that it has seen."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp
import msgspec
from yarl import URL

from swarmx.core.errors import ConfigError
from swarmx.core.toolbox import ToolCall, ToolCause, ToolResult, ToolSpec
from swarmx.providers.tools.egress import Denied, Guard, Pinned, Resolve, resolve
from swarmx.providers.tools.settings import HttpTool
from swarmx.providers.tools.toolbox import over_limit

_CONNECT_S = 15.0
_CHUNK_BYTES = 64 * 1024
_SHOWN_CHARACTERS = 500
_KEPT = ("content-type", "content-language", "etag", "last-modified", "link", "location", "retry-after")
# What belongs to the connection, or would change whom the other side takes us for (RFC 9110, 7.6.1).
_NOT_THEIRS = frozenset(
    ("host", "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te",
     "trailer", "transfer-encoding", "upgrade", "content-length", "expect", "accept-encoding", "forwarded", "via",
     "idempotency-key")
)  # fmt: skip
_LATER = frozenset((429, 502, 503, 504))


class HttpProvider:
    """A ToolProvider of guarded requests: no redirects, no proxy, no cookies, nothing kept between calls."""

    name = "http"

    def __init__(self, tools: Sequence[HttpTool], *, pool: str, resolve: Resolve = resolve) -> None:
        self._tools = {tool.name: tool for tool in tools}
        self._specs = tuple(
            msgspec.structs.replace(tool.spec(pool), parameters=_parameters(tool.methods)) for tool in tools
        )
        self._guards = {
            tool.name: Guard(
                hosts=tool.hosts, ports=tool.ports, schemes=tool.schemes, networks=tool.networks, resolve=resolve
            )
            for tool in tools
        }
        self._headers: dict[str, dict[str, str]] = {}

    async def open(self) -> None:
        """Read the secret headers. Raises ConfigError when one is not in the environment."""
        for tool in self._tools.values():
            self._headers[tool.name] = {**tool.headers, **secret_headers(tool.secret_headers, of=tool.name)}

    async def close(self) -> None:
        """Nothing is kept open."""

    def tools(self) -> Sequence[ToolSpec]:
        """All of them."""
        return self._specs

    async def call(self, call: ToolCall) -> ToolResult:
        """Make the request."""
        tool, guard = self._tools[call.tool], self._guards[call.tool]
        try:
            url = guard.read(call.arguments["url"])
            headers = self._all_headers(tool, call)
            addresses = await guard.addresses(str(url.raw_host))
            return await self._request(tool, guard, Pinned(addresses), url, call, headers)
        except Denied as denied:
            return ToolResult(error=f"{tool.name}: {denied}", cause="refused")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return ToolResult(error=f"{tool.name}: {type(error).__name__}: {error}", cause="unavailable")

    def _all_headers(self, tool: HttpTool, call: ToolCall) -> dict[str, str]:
        headers = {}
        for name, value in call.arguments.get("headers", {}).items():
            if name.lower() in _NOT_THEIRS:
                raise Denied(f"the header {name} cannot be set")
            if not value.replace("\t", " ").isprintable():
                raise Denied(f"the header {name} has characters that headers cannot have")
            headers[name.lower()] = value
        headers |= {name.lower(): value for name, value in self._headers[tool.name].items()}
        if call.arguments.get("method", tool.methods[0]) not in ("GET", "HEAD"):
            headers["idempotency-key"] = call.key
        return {**headers, "accept-encoding": "identity"}

    async def _request(
        self, tool: HttpTool, guard: Guard, pinned: Pinned, url: URL, call: ToolCall, headers: Mapping[str, str]
    ) -> ToolResult:
        body: bytes | None = None
        if "json" in call.arguments:
            body = msgspec.json.encode(call.arguments["json"])
            headers = {"content-type": "application/json", **headers}
        elif "body" in call.arguments:
            body = call.arguments["body"].encode()
        connector = aiohttp.TCPConnector(
            resolver=pinned, socket_factory=guard.open_socket, use_dns_cache=False, force_close=True, limit=1
        )
        async with (
            aiohttp.ClientSession(
                connector=connector,
                trust_env=False,
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None, connect=_CONNECT_S),
            ) as session,
            session.request(
                call.arguments.get("method", tool.methods[0]), url, headers=headers, data=body, allow_redirects=False
            ) as response,
        ):
            return await _read(tool, response)


async def _read(tool: HttpTool, response: aiohttp.ClientResponse) -> ToolResult:
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        return ToolResult(error=f"{tool.name}: the answer is compressed, unasked", cause="tool")
    content = bytearray()
    async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
        content += chunk
        if len(content) > tool.result_limit_bytes:
            return over_limit(tool.name, tool.result_limit_bytes)
    text = content.decode(errors="replace")
    if 300 <= response.status < 400 and response.status != 304:
        where = response.headers.get("location", "nowhere")[:_SHOWN_CHARACTERS]
        return ToolResult(
            error=f"{tool.name}: redirected to {where}; redirects are not followed, ask for that URL", cause="refused"
        )
    if response.status >= 400:
        cause: ToolCause = "unavailable" if response.status in _LATER else "tool"
        return ToolResult(error=f"{tool.name}: HTTP {response.status}: {text[:_SHOWN_CHARACTERS]}", cause=cause)
    headers = {name: response.headers[name] for name in _KEPT if name in response.headers}
    output: dict[str, Any] = {"status": response.status, "headers": headers}
    if "json" in response.content_type:
        try:
            return ToolResult(output={**output, "json": msgspec.json.decode(content)})
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            pass  # it is no JSON, whatever it says
    return ToolResult(output={**output, "body": text})


def secret_headers(names: Mapping[str, str], *, of: str) -> dict[str, str]:
    """The headers with their values from the environment. Raises ConfigError when one is not there."""
    missing = [variable for variable in names.values() if not os.environ.get(variable)]
    if missing:
        raise ConfigError(f"{of}: the environment does not have {', '.join(missing)}, the secret of a header")
    return {header: os.environ[variable] for header, variable in names.items()}


def _parameters(methods: Sequence[str]) -> dict[str, Any]:
    text = {"type": "string", "maxLength": 8192}
    properties: dict[str, Any] = {
        "url": {"type": "string", "maxLength": 2048},
        "method": {"enum": list(methods)},
        "headers": {"type": "object", "maxProperties": 32, "additionalProperties": text,
                    "propertyNames": {"pattern": "^[A-Za-z0-9-]{1,64}$"}},
    }  # fmt: skip
    if set(methods) - {"GET", "HEAD"}:
        properties |= {"json": {}, "body": {"type": "string"}}
    return {"type": "object", "properties": properties, "required": ["url"], "additionalProperties": False}
