"""The asynchronous client: submit workflows, wait for them, follow them, and change their course."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import aiohttp
import msgspec

from swarmx.core.errors import ConfigError
from swarmx.sdk.errors import Problem, WorkflowEnded
from swarmx.sdk.models import Begun, Call, Page, State, Why, Workflow, WorkflowEvent, WorkflowSummary
from swarmx.sdk.transport import BROKEN, Patience, Transport

URL = "http://127.0.0.1:8100"
PATIENCE_S = 60.0
TIMEOUT_S = 30.0
_WORKFLOWS = "/api/v1/workflows"
_WAIT_S = 30  # a request, of a longer wait
_LAST = frozenset({"Finished", "Failed", "Cancelled", "ProgramEnded"})
_COMMON = frozenset({"seq", "at_s", "type"})

T = TypeVar("T")
Definition = Mapping[str, Any] | str | Path
"""A workflow as data, as YAML or JSON text, or as the file that it is in."""


class AsyncClient:
    """A client of one server, for asyncio. Use it as a context manager, or `close` it.

    `url` and `token` are taken from $SWARMX_URL and $SWARMX_TOKEN when they are left out. A request that the server
    cannot take now, or that is not answered, is made again for `patience_s`; one attempt may take `timeout_s`. Each
    request that changes something carries an idempotency key, so it is carried out once, however often it is made.

    Every method raises `Problem` (the server's explanation, a subclass for each status) and `Unreachable`.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        patience_s: float = PATIENCE_S,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        token = token if token is not None else os.environ.get("SWARMX_TOKEN", "").strip()
        if not token:
            raise ConfigError(
                "no token: pass one, or set $SWARMX_TOKEN. `swarmx up` leaves one in .swarmx/admin.token, "
                "`swarmx keys add` makes another."
            )
        url = url if url is not None else os.environ.get("SWARMX_URL", URL)
        self._transport = Transport(url, token, patience_s=patience_s, timeout_s=timeout_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._transport.close()

    async def submit(
        self, workflow: Definition, inputs: Mapping[str, Any] | None = None, *, key: str | None = None
    ) -> str:
        """Have a workflow run; returns its id once the server has it on disk.

        The same `key` within 24 hours gives the same workflow, whoever sends it; without one each call is a new one.
        Raises Unprocessable for a definition or inputs that cannot be accepted.
        """
        return await self._begin("", {"workflow": _definition(workflow), "inputs": dict(inputs or {})}, key)

    async def run(
        self,
        workflow: Definition,
        inputs: Mapping[str, Any] | None = None,
        *,
        key: str | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        """Submit and wait; returns the outputs. Raises WorkflowEnded for one without, TimeoutError as `wait` does."""
        ended = await self.wait(await self.submit(workflow, inputs, key=key), timeout_s=timeout_s)
        if ended.state != "finished":
            raise WorkflowEnded(ended)
        return ended.outputs

    async def get(self, workflow_id: str) -> Workflow:
        """A workflow as it is now, with its nodes and calls."""
        return await self._get(_path(workflow_id), Workflow)

    async def wait(self, workflow_id: str, *, timeout_s: float | None = None) -> Workflow:
        """The workflow once it has ended, however it has. Raises TimeoutError; the workflow goes on then."""
        loop = asyncio.get_running_loop()
        until_s = None if timeout_s is None else loop.time() + timeout_s
        while True:
            left_s = _WAIT_S if until_s is None else min(float(_WAIT_S), max(0.0, until_s - loop.time()))
            wait_s = max(1, round(left_s))
            asked_s = loop.time()
            try:
                async with asyncio.timeout_at(until_s):
                    workflow = await self._get(
                        _path(workflow_id), Workflow, headers={"prefer": f"wait={wait_s}"}, wait_s=wait_s
                    )
            except TimeoutError:
                raise TimeoutError(f"the workflow {workflow_id} has not ended within {timeout_s:g} s") from None
            if workflow.ended:
                return workflow
            if loop.time() - asked_s < wait_s / 2:  # it did not wait as it was asked to: it stops, or has much to do
                await asyncio.sleep(0.2)

    async def events(self, workflow_id: str, *, after: int = 0) -> AsyncGenerator[WorkflowEvent, None]:
        """What happened to a workflow behind event `after`, and what happens, to its end; no gap, nothing twice.

        A connection that breaks is made again, also across a restart of the server. Fields above 16 KiB are left out;
        `data["omitted"]` names them.
        """
        patience: Patience | None = None
        while True:
            came = False
            try:
                async with (
                    self._transport.stream(f"{_path(workflow_id)}/events", headers=_resumed(after)) as response,
                    aclosing(_events_in(response)) as events,
                ):
                    patience = None
                    async for event in events:
                        after, came = event.seq, True
                        yield event
                        if event.type in _LAST:
                            return
                if not came and (await self.get(workflow_id)).ended and not await self._more(workflow_id, after):
                    return
                raise ConnectionResetError("the stream of events ended before the workflow")
            except (Problem, *BROKEN) as error:
                patience = patience or self._transport.patience()
                await patience.outlast(error)

    async def cancel(self, workflow_id: str, *, key: str | None = None) -> WorkflowSummary:
        """Ask a workflow to end: its calls are let go first. Returns at once; `wait` tells when it has ended."""
        return await self._change(f"{_path(workflow_id)}/cancel", key)

    async def kill(self, workflow_id: str, *, key: str | None = None) -> WorkflowSummary:
        """End a workflow at once, whatever its calls do."""
        return await self._change(f"{_path(workflow_id)}/kill", key)

    async def signal(self, workflow_id: str, name: str, value: Any = None, *, key: str | None = None) -> None:
        """Send a workflow a signal that its definition declares, with any JSON value."""
        path = f"{_path(workflow_id)}/signals/{quote(name, safe='')}"
        await self._post(path, msgspec.json.encode(value), key=key)

    async def retry(self, workflow_id: str, *, key: str | None = None) -> str:
        """Begin a new workflow that does a failed one's failed node anew, and what follows; returns its id."""
        return await self._begin(f"/{quote(workflow_id, safe='')}/retry", None, key)

    async def fork(
        self, workflow_id: str, from_node: str, inputs: Mapping[str, Any] | None = None, *, key: str | None = None
    ) -> str:
        """Begin a new workflow that shares another's beginning up to a node, which is done anew; returns its id."""
        body: dict[str, Any] = {"from_node": from_node}
        if inputs is not None:
            body["inputs"] = dict(inputs)
        return await self._begin(f"/{quote(workflow_id, safe='')}/fork", body, key)

    async def page(self, *, state: State | None = None, limit: int = 50, cursor: str | None = None) -> Page:
        """One page of workflows, newest first."""
        params = {"state": state, "limit": limit, "cursor": cursor}
        return _typed((await self._transport.ask("GET", _WORKFLOWS, params=params)).body, Page)

    async def list(self, *, state: State | None = None) -> AsyncIterator[WorkflowSummary]:
        """All workflows that the token may see, newest first, page by page."""
        cursor: str | None = None
        while True:
            page = await self.page(state=state, limit=200, cursor=cursor)
            for workflow in page.workflows:
                yield workflow
            cursor = page.next_cursor
            if cursor is None:
                return

    async def call(self, call_id: str) -> Call:
        """What became of a call that has ended."""
        return await self._get(f"/api/v1/calls/{quote(call_id, safe='')}", Call)

    async def why(self, call_id: str, *, policy: str | None = None) -> Why:
        """Why a call went where it went; with `policy`, also what that one would have done instead."""
        path = f"/api/v1/calls/{quote(call_id, safe='')}/why"
        return _typed((await self._transport.ask("GET", path, params={"policy": policy})).body, Why)

    async def blob(self, sha256: str) -> bytes:
        """The bytes of an image that a workflow made; outputs refer to it by this hash."""
        body = (await self._transport.ask("GET", f"/api/v1/blobs/{quote(sha256, safe='')}")).body
        return body if isinstance(body, bytes) else msgspec.json.encode(body)

    async def _more(self, workflow_id: str, after: int) -> bool:
        """Whether there are events behind that one: a stream may end because the server stops."""
        params, headers = {"after": after, "limit": 1}, {"accept": "application/json"}
        found = await self._transport.ask("GET", f"{_path(workflow_id)}/events", params=params, headers=headers)
        return bool(found.body["events"])

    async def _begin(self, path: str, body: Any, key: str | None) -> str:
        data = None if body is None else msgspec.json.encode(body)
        return _typed(await self._post(f"{_WORKFLOWS}{path}", data, key=key), Begun).workflow_id

    async def _change(self, path: str, key: str | None) -> WorkflowSummary:
        return _typed(await self._post(path, None, key=key), WorkflowSummary)

    async def _post(self, path: str, data: bytes | None, *, key: str | None) -> Any:
        headers = {} if data is None else {"content-type": "application/json"}
        return (await self._transport.ask("POST", path, data=data, headers=headers, key=key)).body

    async def _get(
        self, path: str, kind: type[T], *, headers: Mapping[str, str] | None = None, wait_s: float = 0.0
    ) -> T:
        return _typed((await self._transport.ask("GET", path, headers=headers, wait_s=wait_s)).body, kind)


def _path(workflow_id: str) -> str:
    return f"{_WORKFLOWS}/{quote(workflow_id, safe='')}"


def _typed(body: Any, kind: type[T]) -> T:
    try:
        return msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        raise Problem(200, f"the server answered otherwise than a SwarmX server does: {error}") from error


def _definition(workflow: Definition) -> Any:
    """What goes into the envelope: a mapping as it is, text as text. Raises ConfigError for a file without."""
    if isinstance(workflow, Path):
        try:
            return workflow.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the workflow {workflow} cannot be read: {error}.") from None
    return workflow


def _resumed(after: int) -> dict[str, str]:
    headers = {"accept": "text/event-stream"}
    return headers | {"last-event-id": str(after)} if after else headers


async def _events_in(response: aiohttp.ClientResponse) -> AsyncGenerator[WorkflowEvent, None]:
    """The events of a stream; comments and other fields are passed over."""
    data: list[bytes] = []
    async for raw in response.content:
        line = raw.rstrip(b"\r\n")
        if line.startswith(b"data:"):
            data.append(line[5:].lstrip(b" "))
        elif not line and data:
            row = msgspec.json.decode(b"\n".join(data), type=dict[str, Any])
            data.clear()
            fields = {name: value for name, value in row.items() if name not in _COMMON}
            yield WorkflowEvent(seq=row["seq"], at_s=row["at_s"], type=row["type"], data=fields)
