"""One ComfyUI server over HTTP, as the front asks it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec

from swarmx.compat.comfyui.graph import Graph

_MAX_ANSWER_BYTES = 256 << 20
_SLOW_BYTES_PER_S = 1e6


class ServerAway(Exception):
    """The server did not answer, or not as ComfyUI does. `refused`: nothing listens at its address."""

    def __init__(self, detail: str, *, refused: bool = False) -> None:
        super().__init__(detail)
        self.refused = refused


class FileAway(ServerAway):
    """A file that the server `owner` made cannot be had; with `gone`, that server has it no more."""

    def __init__(self, detail: str, *, owner: str, gone: bool = False, refused: bool = False) -> None:
        super().__init__(detail, refused=refused)
        self.owner = owner
        self.gone = gone


class ComfyServer:
    """`name` is ours, `url` where it listens."""

    def __init__(self, name: str, url: str, session: aiohttp.ClientSession, *, timeout_s: float) -> None:
        self.name = name
        self.url = url.rstrip("/")
        self._session = session
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)

    async def object_info(self) -> dict[str, Any]:
        """Every node class that it has."""
        return _object(await self._json("GET", "/object_info"))

    async def system_stats(self) -> dict[str, Any]:
        return _object(await self._json("GET", "/system_stats"))

    async def get(self, path: str) -> Any:
        """The JSON at a path that only reads; None where it has no such thing."""
        status, answer = await self._ask("GET", path)
        return answer if status == 200 else None

    async def submit(
        self, prompt_id: str, graph: Graph, *, client_id: str, extra: Mapping[str, Any], targets: Sequence[str]
    ) -> tuple[int, dict[str, Any]]:
        """Hand it a job, to make these outputs; 200, or 400 with its own word on the graph. Raises ServerAway for any
        other answer."""
        body = {
            "prompt": graph,
            "prompt_id": prompt_id,
            "client_id": client_id,
            "extra_data": extra,
            "partial_execution_targets": targets,
        }
        status, answer = await self._ask("POST", "/prompt", body)
        if status not in (200, 400) or not isinstance(answer, dict):
            raise ServerAway(f"it answered a graph with status {status}")
        return status, answer

    async def history(self, prompt_id: str) -> dict[str, Any] | None:
        """What it kept of a job that has ended there; None while there is nothing."""
        entry = _object(await self._json("GET", f"/history/{prompt_id}")).get(prompt_id)
        return entry if isinstance(entry, dict) else None

    async def queue(self) -> frozenset[str]:
        """The ids of the jobs that it runs, or that wait there."""
        answer = _object(await self._json("GET", "/queue"))
        rows = [*(answer.get("queue_running") or ()), *(answer.get("queue_pending") or ())]
        return frozenset(row[1] for row in rows if isinstance(row, list) and len(row) > 1 and isinstance(row[1], str))

    async def stop(self, prompt_id: str) -> None:
        """Interrupt the job if it runs there, and take it out of the queue if it waits there."""
        await self._ask("POST", "/queue", {"delete": [prompt_id]})
        if prompt_id in await self.queue():
            await self._ask("POST", "/interrupt", {"prompt_id": prompt_id})

    async def forget(self, prompt_ids: Iterable[str]) -> None:
        """Take ended jobs out of its history."""
        await self._ask("POST", "/history", {"delete": list(prompt_ids)})

    async def free(self, wanted: Mapping[str, Any]) -> None:
        await self._ask("POST", "/free", dict(wanted))

    async def upload(self, name: str, data: bytes) -> None:
        """Put a file into its input folder, in the place of one of the same name."""
        status, answer = await self._ask("POST", "/upload/image", _form(name, data), bytes_out=len(data))
        if status != 200 or not isinstance(answer, dict) or answer.get("name") != name:
            raise ServerAway(f"it took the file {name!r} with status {status}")

    async def masked(self, picture: str, mask: bytes, name: str) -> bytes | None:
        """A picture of its input folder with another one's transparency, called `name` there; None where it cannot."""
        form = _form(name, mask)
        form.add_field(
            "original_ref", msgspec.json.encode({"filename": picture, "subfolder": "", "type": "input"}).decode()
        )
        status, _ = await self._ask("POST", "/upload/mask", form, bytes_out=len(mask))
        if status != 200:
            return None
        async with self.view({"filename": name, "subfolder": "", "type": "input"}, {}) as response:
            return await response.read() if response.status == 200 else None

    @asynccontextmanager
    async def view(self, query: Mapping[str, str], headers: Mapping[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        """A file of its own, as a stream."""
        timeout = aiohttp.ClientTimeout(sock_connect=self._timeout.total, sock_read=self._timeout.total)
        try:
            async with self._session.get(
                f"{self.url}/view", params=query, headers=headers, timeout=timeout, allow_redirects=False
            ) as response:
                yield response
        except aiohttp.ClientConnectorError as error:
            raise ServerAway(f"nothing listens at {self.url}: {error}", refused=True) from None
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise ServerAway(f"no file from it: {error!r}") from None

    async def size(self, query: Mapping[str, str]) -> int | None:
        """Bytes of a file of its own; None where it has none. Raises ServerAway."""
        try:
            async with self._session.head(
                f"{self.url}/view", params=query, timeout=self._timeout, allow_redirects=False
            ) as response:
                return response.content_length or 0 if response.status == 200 else None
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise ServerAway(f"no size of a file from it: {error!r}") from None

    def listen(self, client_id: str) -> Any:
        """Its event stream, a context manager; texts come as bytes. A message may be as large as a preview."""
        return self._session.ws_connect(
            f"{self.url}/ws",
            params={"clientId": client_id},
            decode_text=False,
            max_msg_size=64 << 20,
            heartbeat=30.0,
            timeout=aiohttp.ClientWSTimeout(ws_close=1.0),
        )

    async def _json(self, method: str, path: str) -> Any:
        status, answer = await self._ask(method, path)
        if status != 200:
            raise ServerAway(f"{path} answered with status {status}")
        return answer

    async def _ask(self, method: str, path: str, body: object = None, *, bytes_out: int = 0) -> tuple[int, Any]:
        """Status and JSON. A request of many bytes may take longer, at a slow line's pace."""
        timeout = aiohttp.ClientTimeout(total=(self._timeout.total or 0.0) + bytes_out / _SLOW_BYTES_PER_S)
        form = body if isinstance(body, aiohttp.FormData) else None
        data = form if form is not None or body is None else msgspec.json.encode(body)
        headers = {"content-type": "application/json"} if data is not None and form is None else {}
        try:
            async with self._session.request(
                method, self.url + path, data=data, headers=headers, timeout=timeout, allow_redirects=False
            ) as response:
                raw = bytearray()
                async for chunk in response.content.iter_chunked(1 << 16):
                    raw += chunk
                    if len(raw) > _MAX_ANSWER_BYTES:
                        raise ServerAway(f"{path} answered with more than {_MAX_ANSWER_BYTES} bytes")
                told = raw and response.status in (200, 400)  # other answers may be any text
                return response.status, decoded(raw) if told else None
        except aiohttp.ClientConnectorError as error:
            raise ServerAway(f"nothing listens at {self.url}: {error}", refused=True) from None
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise ServerAway(f"{path} was not answered: {error!r}") from None
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise ServerAway(f"{path} was answered with what is not JSON: {error}") from None


def decoded(raw: bytes | bytearray) -> Any:
    """What a server says as JSON. Raises msgspec.MsgspecError, ValueError, RecursionError."""
    try:
        return msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return msgspec.json.decode(repaired(raw))


def repaired(raw: bytes | bytearray) -> bytes:
    """What Python writes as JSON as the standard has it: NaN and the infinities become null, and what a file name holds
    that is no text a question mark. Raises ValueError, RecursionError."""
    found = json.loads(raw.decode(errors="replace"), parse_constant=lambda _: None)
    return json.dumps(found, ensure_ascii=False).encode(errors="replace")


def _form(name: str, data: bytes) -> aiohttp.FormData:
    form = aiohttp.FormData()
    form.add_field("image", data, filename=name, content_type="application/octet-stream")
    form.add_field("overwrite", "true")
    return form


def _object(answer: Any) -> dict[str, Any]:
    if not isinstance(answer, dict):
        raise ServerAway(f"an object was expected, it answered with {type(answer).__name__}")
    return answer
