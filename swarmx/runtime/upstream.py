"""One attempt at one replica over HTTP: sends the body, reads the answer, and says in one word what went wrong."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import aiohttp
import msgspec

from swarmx.core.nouns import FailureReason
from swarmx.core.toolbox import ToolResult

# Nesting that is too deep and bytes that are no text come with exceptions of their own.
NOT_JSON = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)
_HEADERS = {"content-type": "application/json"}
# The client was let in and its model is known here: a replica that says otherwise is set up wrongly.
_OUR_FAULT = frozenset({401, 403, 404, 405, 407, 408})
_MAX_ANSWER_BYTES = 64 * 1024 * 1024
_MAX_TOKENS = 1 << 40  # a replica that claims more is talking nonsense


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What the replica says that it read and wrote.

    `work_done` is output tokens, or the seconds of a tool; None where it did not say.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    work_done: float | None = None


class AttemptFailed(Exception):
    """The attempt ended without an answer. `body` and `status` are the replica's own when it refused the request.

    `begun`: the replica may have begun the work.
    """

    def __init__(
        self,
        reason: FailureReason,
        detail: str,
        *,
        retryable: bool,
        status: int = 502,
        body: bytes = b"",
        begun: bool = True,
    ) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.retryable = retryable
        self.status = status
        self.body = body
        self.begun = begun


class Upstream:
    """Connections to replicas, kept alive and shared by all calls."""

    def __init__(self, *, connect_timeout_s: float = 5.0) -> None:
        # Engines run uvicorn, which drops idle connections after 5 s: give up before they do.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=3.0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s),
            auto_decompress=False,
            read_bufsize=1 << 18,
        )

    async def close(self) -> None:
        await self._session.close()

    async def open(
        self, url: str, body: bytes, names: Mapping[str, str] = MappingProxyType({})
    ) -> aiohttp.ClientResponse:
        """POST the body; returns once the replica accepted it with status 200. Raises AttemptFailed.

        `names` are further headers.
        """
        headers = {**_HEADERS, **names}
        try:
            response = await self._session.post(url, data=body, headers=headers, allow_redirects=False)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise AttemptFailed("connect", f"cannot connect: {error}", retryable=True, begun=False) from None
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            raise AttemptFailed("connection_lost", f"no answer: {error!r}", retryable=True) from None
        if response.status == 200:
            return response
        text = await _read_all(response)
        status = response.status
        if status == 429:
            raise AttemptFailed("busy", "the replica is busy (status 429)", retryable=True, status=429, begun=False)
        if status < 400:
            raise AttemptFailed("bad_answer", f"status {status}, expected 200", retryable=True)
        if status in _OUR_FAULT or status >= 500:
            begun = status >= 500 and status != 503
            raise AttemptFailed("replica_error", f"status {status}", retryable=True, status=502, begun=begun)
        raise AttemptFailed("rejected", f"status {status}", retryable=False, status=status, body=text, begun=False)

    async def read(self, response: aiohttp.ClientResponse) -> tuple[bytes, dict[str, Any], Usage]:
        """The whole answer, decoded; an answer that is not a JSON object with `choices` or `data` is garbage."""
        body = await _read_all(response)
        try:
            answer = msgspec.json.decode(body)
        except NOT_JSON as error:
            raise AttemptFailed("bad_answer", f"the answer is not JSON: {error}", retryable=True) from None
        if not isinstance(answer, dict) or not any(isinstance(answer.get(k), list) for k in ("choices", "data")):
            raise AttemptFailed("bad_answer", "the answer has neither choices nor data", retryable=True)
        return body, answer, usage_of(answer.get("usage"))

    async def read_result(self, response: aiohttp.ClientResponse) -> tuple[bytes, dict[str, Any], Usage]:
        """What a tool came to, a `core.toolbox.ToolResult`."""
        body = await _read_all(response)
        try:
            result = msgspec.json.decode(body, type=ToolResult)
        except NOT_JSON as error:
            raise AttemptFailed("bad_answer", f"the answer is no result of a tool: {error}", retryable=True) from None
        seconds = result.wall_s if 0.0 <= result.wall_s < math.inf else None
        return body, msgspec.to_builtins(result), Usage(work_done=seconds)

    async def chunks(self, response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
        """The bytes of a streamed answer as they come."""
        try:
            async for chunk in response.content.iter_any():
                yield chunk
        except (aiohttp.ClientError, ConnectionError) as error:
            raise AttemptFailed("connection_lost", f"the stream broke: {error!r}", retryable=True) from None


def usage_of(raw: object) -> Usage:
    """Read an OpenAI usage object; anything that is not one says nothing."""
    if not isinstance(raw, dict):
        return Usage()
    details = raw.get("prompt_tokens_details")
    completion = _count(raw.get("completion_tokens"))
    return Usage(
        prompt_tokens=_count(raw.get("prompt_tokens")) or 0,
        cached_tokens=(_count(details.get("cached_tokens")) if isinstance(details, dict) else None) or 0,
        work_done=None if completion is None else float(completion),
    )


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < _MAX_TOKENS else None


async def _read_all(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    try:
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > _MAX_ANSWER_BYTES:
                raise AttemptFailed("bad_answer", "the answer is larger than 64 MiB", retryable=True)
    except (aiohttp.ClientError, ConnectionError) as error:
        raise AttemptFailed("connection_lost", f"the answer broke off: {error!r}", retryable=True) from None
    finally:
        hang_up(response)
    return bytes(body)


def hang_up(response: aiohttp.ClientResponse) -> None:
    """Keep the connection when the answer was read to its end; otherwise close it, which makes the engine abort."""
    if response.content.at_eof():
        response.release()
    else:
        response.close()
