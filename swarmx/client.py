"""A small client of the REST API, for the command line and the demo."""

from __future__ import annotations

import json as json_text
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

from swarmx.core.errors import ConfigError, SwarmXError

_STREAM = aiohttp.ClientTimeout(total=None, sock_connect=60.0, sock_read=300.0)  # a model may think in between


class ApiError(SwarmXError):
    """The server refused the request; the text is its own explanation."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class Api:
    """Requests to one server with one token. Use as an async context manager."""

    def __init__(self, url: str, token: str) -> None:
        self.url = url.rstrip("/")
        self._session = aiohttp.ClientSession(
            headers={"authorization": f"Bearer {token}", "x-swarmx-via": "cli"},
            timeout=aiohttp.ClientTimeout(total=60.0),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._session.close()

    async def get(self, path: str, *, headers: Mapping[str, str] | None = None, **params: str | int | None) -> Any:
        given = {name: value for name, value in params.items() if value is not None}
        return await self._request("GET", path, params=given, headers=headers)

    async def post(
        self, path: str, *, data: bytes | None = None, json: Any = None, headers: Mapping[str, str] | None = None
    ) -> Any:
        return await self._request("POST", path, data=data, json=json, headers=headers)

    async def whole(self, path: str, *, json: Any) -> Any:
        """The answer to a POST that could be streamed, in one and however long it takes."""
        return await self._request("POST", path, json=json, headers={"accept": "application/json"}, timeout=_STREAM)

    async def put(self, path: str, *, json: Any) -> Any:
        return await self._request("PUT", path, json=json)

    async def stream(self, path: str, *, json: Any) -> AsyncIterator[tuple[str, Any]]:
        """The server-sent events that answer a POST, each with its name and its decoded data. Raises like the rest."""
        headers = {"accept": "text/event-stream"}
        with self._explained():
            async with self._session.post(self.url + path, json=json, headers=headers, timeout=_STREAM) as response:
                if response.content_type != "text/event-stream":
                    await _decoded(response)
                    raise ValueError(f"an answer of type {response.content_type}")
                name = "message"
                async for raw in response.content:
                    field, _, value = raw.decode().rstrip("\r\n").partition(": ")
                    if field == "event":
                        name = value
                    elif field == "data":
                        yield name, json_text.loads(value)

    async def _request(self, method: str, path: str, **kwargs: Any) -> Any:
        """The decoded answer. Raises ApiError for a refusal, ConfigError when nobody answers."""
        with self._explained():
            async with self._session.request(method, self.url + path, **kwargs) as response:
                return await _decoded(response)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError):
            raise ConfigError(f"{self.url!r} is not an address such as http://127.0.0.1:8100.") from None
        except aiohttp.ClientConnectorError:
            raise ConfigError(
                f"nobody answers at {self.url}. Start a server with `swarmx up`, or name one with --url."
            ) from None
        except (aiohttp.ClientError, ValueError, TimeoutError) as error:
            raise ConfigError(
                f"{self.url} broke off or does not speak our protocol ({error!r}). Is it a SwarmX server?"
            ) from None


async def _decoded(response: aiohttp.ClientResponse) -> Any:
    if "json" not in response.content_type:
        text = await response.text()
        if response.status >= 400:
            raise ApiError(response.status, f"status {response.status}: {text[:300]}")
        return text
    body = await response.json(content_type=None)
    if response.status >= 400:
        detail = body.get("detail") if isinstance(body, dict) else None
        raise ApiError(response.status, str(detail or f"status {response.status}: {body!r:.300}"))
    return body


def token_for(state_dir: Path) -> str:
    """The token to use: $SWARMX_TOKEN, else the one that `swarmx up` left for its own user. Raises ConfigError."""
    if token := os.environ.get("SWARMX_TOKEN"):
        return token.strip()
    path = state_dir / "admin.token"
    try:
        return path.read_text().strip()
    except OSError:
        raise ConfigError(
            f"no token: $SWARMX_TOKEN is not set and {path} cannot be read. `swarmx up` in this folder writes it; "
            "`swarmx keys add` makes another."
        ) from None
