"""Requests that outlast a restart of the server: asked again, with the same key, for as long as is said to wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from secrets import randbelow
from typing import Any
from uuid import uuid4

import aiohttp
import msgspec

from swarmx.core.errors import ConfigError
from swarmx.sdk.errors import Problem, Unreachable, problem_of

_FIRST_REST_S, _LONGEST_REST_S = 0.1, 5.0
_SILENCE_S = 45.0  # of a stream; the server says something every 15 s
BROKEN = (aiohttp.ClientError, ConnectionError, TimeoutError, msgspec.DecodeError)
"""What a connection or a body that breaks raises."""


class Answer(msgspec.Struct, frozen=True):
    """A good answer; `body` is decoded if it is JSON, else bytes."""

    status: int
    headers: Mapping[str, str]
    body: Any


class Transport:
    """Connections to one server with one token. `patience_s`: how long a request is tried before it is given up."""

    def __init__(self, url: str, token: str, *, patience_s: float, timeout_s: float) -> None:
        self.url = url.rstrip("/")
        self._token = token
        self._patience_s = patience_s
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close the connections; a later request opens new ones."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def ask(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str | int | None] | None = None,
        data: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        key: str | None = None,
        wait_s: float = 0.0,
    ) -> Answer:
        """The answer to a request, which is made again when that may help and can do no harm.

        Whatever is not a GET goes with an idempotency key, a new one unless it is given. `wait_s` is how long the
        server was asked to take. Raises Problem and Unreachable.
        """
        named = dict(headers or {})
        if method != "GET":
            named["idempotency-key"] = key or uuid4().hex
        given = {name: value for name, value in (params or {}).items() if value is not None}
        timeout = aiohttp.ClientTimeout(total=self._timeout_s + wait_s)
        patience = self.patience()
        while True:
            try:
                async with self._open().request(
                    method, self.url + path, params=given, data=data, headers=named, timeout=timeout
                ) as response:
                    body = await _body(response)
                    if response.status < 400:
                        return Answer(response.status, response.headers, body)
                    raise problem_of(response.status, response.headers, body)
            except (Problem, *BROKEN) as error:
                await patience.outlast(error)

    @asynccontextmanager
    async def stream(self, path: str, *, headers: Mapping[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        """One attempt at an answer that is read as it comes. Raises Problem, and aiohttp's errors."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._timeout_s, sock_read=_SILENCE_S)
        async with self._open().get(self.url + path, headers=dict(headers), timeout=timeout) as response:
            if response.status >= 400:
                raise problem_of(response.status, response.headers, await _body(response))
            yield response

    def patience(self) -> Patience:
        """The patience for one request."""
        return Patience(self.url, self._patience_s)

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:  # only inside a running loop
            self._session = aiohttp.ClientSession(
                headers={"authorization": f"Bearer {self._token}"},
                connector=aiohttp.TCPConnector(limit=0),
                read_bufsize=1 << 20,  # of an event, which is one line
            )
        return self._session


class Patience:
    """How long a request is still tried. Rests grow, and are a little random, so that not all come back at once."""

    def __init__(self, url: str, patience_s: float) -> None:
        self._url = url
        self._patience_s = patience_s
        self._until_s = asyncio.get_running_loop().time() + patience_s
        self._rest_s = _FIRST_REST_S

    async def outlast(self, error: Exception) -> None:
        """Wait before the next attempt, as long as the server advised at least.

        Raises the error, as one of this client, when another attempt is of no use or there is no time for one.
        """
        if isinstance(error, Problem) and not error.passing:
            raise error
        if isinstance(error, aiohttp.InvalidURL | aiohttp.NonHttpUrlClientError):
            raise ConfigError(f"{self._url!r} is not an address such as http://127.0.0.1:8100.") from error
        rest_s = self._rest_s * (0.5 + randbelow(1000) / 2000)
        self._rest_s = min(_LONGEST_REST_S, 2.0 * self._rest_s)
        if isinstance(error, Problem):
            rest_s = max(rest_s, error.retry_after_s or 0.0)
        if asyncio.get_running_loop().time() + rest_s <= self._until_s:
            await asyncio.sleep(rest_s)
        elif isinstance(error, Problem):
            raise error
        else:
            raise Unreachable(
                f"no answer from {self._url} within {self._patience_s:g} s ({error!r}). Is a server running there, "
                "started with `swarmx up`, and is the address right?"
            ) from error


async def _body(response: aiohttp.ClientResponse) -> Any:
    raw = await response.read()
    is_json = response.content_type == "application/json" or response.content_type.endswith("+json")
    return msgspec.json.decode(raw) if is_json else raw
