"""The events of a workflow as server-sent events: first those in the store, then each one as it is stored."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from swarmx.core.errors import Unauthorized
from swarmx.core.ports import Store
from swarmx.core.records import TERMINAL, StoredEvent
from swarmx.gateway.waiting import POLL_S
from swarmx.runtime.changes import Changes, Watch
from swarmx.runtime.requests import BadRequest

LARGEST_BYTES = 16 * 1024
_PAGE = 100
_STALLED_S = 60.0  # a client that takes nothing for so long is let go; it can come back for the rest
_NUMBER = re.compile(r"[0-9]{1,18}")
_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


def server_event(name: str, number: int, data: bytes) -> bytes:
    """One server-sent event; `data` has no line breaks."""
    return b"event: %b\nid: %d\ndata: %b\n\n" % (name.encode(), number, data)


def resumed_after(request: Request, after: int) -> int:
    """Where the client left off: by the header that browsers send when they connect again, or by its own wish."""
    text = request.headers.get("last-event-id", "").strip()
    if not text:
        return after
    if not _NUMBER.fullmatch(text):
        raise BadRequest(
            f"Last-Event-ID {text[:40]!r}: the number of an event was expected, as it came in `id`.",
            param="last-event-id",
        )
    return int(text)


def event_row(event: StoredEvent, *, largest_bytes: int | None = None) -> dict[str, Any]:
    """One event as plain data with its number, time and type.

    The definition is left out, and so are fields above `largest_bytes`, which `omitted` names.
    """
    fields = msgspec.json.decode(event.body, type=dict[str, msgspec.Raw])
    if "event" in fields:  # a declared workflow's, in its envelope of versions
        fields = msgspec.json.decode(fields["event"], type=dict[str, msgspec.Raw])
    fields.pop("spec", None)
    large = [name for name, value in fields.items() if largest_bytes is not None and len(bytes(value)) > largest_bytes]
    for name in large:
        del fields[name]
    return {"seq": event.seq, "at_s": event.at_s, **fields, **({"omitted": large} if large else {})}


class EventFeed(StreamingResponse):
    """Ends after the workflow's last event, when the server stops, and when the client's token is revoked.

    A client that reads slowly costs one page of events: the next is read when it has taken the last. `here` says
    whether this process runs the workflow, so that all its changes are heard of; else the store is asked every second.
    A comment keeps a quiet connection open.
    """

    def __init__(
        self,
        store: Store,
        changes: Changes,
        workflow_id: str,
        *,
        tenant: str | None,
        after: int,
        here: Callable[[], bool],
        may_go_on: Callable[[], object],
        comment_every_s: float = 15.0,
    ) -> None:
        self._store = store
        self._changes = changes
        self._workflow_id = workflow_id
        self._tenant = tenant
        self._after = after
        self._here = here
        self._may_go_on = may_go_on
        self._comment_every_s = comment_every_s
        self._place: AbstractContextManager[Watch] = changes.watching(workflow_id)
        self._watch = self._place.__enter__()  # now: that there are too many is told before the first byte
        super().__init__(self._events(), 200, _HEADERS, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sent(message: Message) -> None:
            async with asyncio.timeout(_STALLED_S):
                await send(message)

        try:
            await super().__call__(scope, receive, sent)
        finally:
            self._place.__exit__(None, None, None)

    async def _events(self) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        yield b"retry: 1000\n\n"
        told_s = loop.time()
        while not self._changes.closed:
            record = await self._store.workflow(self._workflow_id, tenant=self._tenant)
            found = await self._store.events(self._workflow_id, after=self._after, limit=_PAGE)
            for event in found:
                data = event_row(event, largest_bytes=LARGEST_BYTES)
                name = msgspec.json.decode(data["type"], type=str)
                yield server_event(name, event.seq, msgspec.json.encode(data))
                self._after = event.seq
            if record is None or (record.state in TERMINAL and self._after >= record.seq):
                return
            try:
                self._may_go_on()
            except Unauthorized:
                return
            if found:
                told_s = loop.time()
                continue
            if loop.time() - told_s >= self._comment_every_s:
                yield b": nothing new\n\n"
                told_s = loop.time()
            quiet_s = max(0.0, told_s + self._comment_every_s - loop.time())
            await self._watch.wait(quiet_s if self._here() else min(quiet_s, POLL_S))
