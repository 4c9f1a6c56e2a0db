"""The clients' websockets: each client id has one session, however often it connects."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from aiohttp import WSMsgType, web

from swarmx.compat.comfyui.events import event_of, without_metadata

MAX_BEHIND = 2000  # messages that a client may be behind before it is hung up on
_MAX_PREVIEWS_BEHIND = 8
_MOST_AT_ONCE = 256
_AGAIN_S = 0.01
_PATIENCE_S = 1.0  # with a client that is to hang up
FEATURES: dict[str, Any] = {"supports_preview_metadata": True}


@dataclass(slots=True)
class _Waiting:
    """A frame that is to be sent, and can be another one until then."""

    frame: bytes


class _Socket:
    """One connection: what is to be sent waits here, so that a slow client holds up nobody."""

    def __init__(self, socket: web.WebSocketResponse, transport: asyncio.Transport) -> None:
        self.socket = socket
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self.metadata = False
        self.left_behind = False
        self._behind: deque[_Waiting] = deque()
        self._progress: dict[str, _Waiting] = {}  # what of it waits, and nothing else behind it
        self._slow = False
        self._next: asyncio.Handle | None = None

    def send(self, frame: bytes, *, progress: str = "") -> bool:
        """False when the client is too far behind. To a slow one, `progress` of a name takes the place of what is still
        to be told of it."""
        if self._slow and (earlier := self._progress.get(progress)) is not None:
            earlier.frame = frame
            return True
        if len(self._behind) >= MAX_BEHIND:
            return False
        waiting = _Waiting(frame)
        self._behind.append(waiting)
        if progress:
            self._progress[progress] = waiting
        else:
            self._progress.clear()
        if self._next is None:
            self._next = self._loop.call_soon(self._flush)
        return True

    def preview(self, frame: bytes) -> bool:
        """The same for a picture, which is left out where others wait."""
        return len(self._behind) > _MAX_PREVIEWS_BEHIND or self.send(frame)

    def stop(self) -> None:
        """Send no more."""
        self._behind.clear()
        if self._next is not None:
            self._next.cancel()

    def _flush(self) -> None:
        """Send what waits, once the client has taken all that it was sent. What came in the same moment leaves in one
        write: writes are most of what an event costs."""
        self._next = None
        if self.socket.closed or self._transport.is_closing():
            self._behind.clear()
            return
        self._slow = self._transport.get_write_buffer_size() > 0
        if not self._slow:
            count = min(len(self._behind), _MOST_AT_ONCE)
            self._transport.write(b"".join([self._behind.popleft().frame for _ in range(count)]))
            self._progress.clear()
        if self._behind:
            self._next = self._loop.call_later(_AGAIN_S, self._flush)


class Relay:
    """Sends events to clients by tenant and client id. `status` is what a client is told of its tenant's queue;
    `current` the node at which a job of the client is, for one that comes back."""

    def __init__(
        self,
        *,
        status: Callable[[str], dict[str, Any]],
        current: Callable[[str, str], dict[str, Any] | None],
        max_upload_bytes: int,
    ) -> None:
        self._status = status
        self._current = current
        self._features = FEATURES | {"max_upload_size": max_upload_bytes}
        self._sessions: dict[tuple[str, str], set[_Socket]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._stale = False

    @property
    def features(self) -> dict[str, Any]:
        """What this front says that it can do."""
        return dict(self._features)

    async def serve(self, request: web.Request, tenant: str) -> web.WebSocketResponse:
        """One connection, from its first message to its last. A newer one with the same id takes nothing from it."""
        client_id = request.query.get("clientId") or uuid.uuid4().hex
        response = web.WebSocketResponse(heartbeat=30.0, max_msg_size=1 << 20, compress=False)
        await response.prepare(request)
        assert request.transport is not None, "it was just written to"  # noqa: S101
        socket, key = _Socket(response, request.transport), (tenant, client_id)
        self._sessions.setdefault(key, set()).add(socket)
        try:
            socket.send(_frame(_event("status", {"status": self._status(tenant), "sid": client_id})))
            current = self._current(tenant, client_id)
            if current is not None:
                socket.send(_frame(_event("executing", current)))
            async for message in response:
                if message.type is WSMsgType.TEXT:
                    self._heard(socket, message.data)
        finally:
            socket.stop()
            self._sessions[key].discard(socket)
            if not self._sessions[key]:
                del self._sessions[key]
        return response

    def send(self, tenant: str, client_id: str | None, kind: str, data: dict[str, Any]) -> None:
        """One event to every connection of a client."""
        if self._hears(tenant, client_id):
            self.forward(tenant, client_id, _event(kind, data))

    def forward(self, tenant: str, client_id: str | None, text: bytes, *, progress: str = "") -> None:
        """One event as a server sent it. With `progress`, later ones of the same say all that it says."""
        sockets = self._hears(tenant, client_id)
        frame = _frame(text) if sockets else b""
        for socket in sockets:
            self._put(socket, socket.send(frame, progress=progress))

    def _hears(self, tenant: str, client_id: str | None) -> Sequence[_Socket]:
        return tuple(self._sessions.get((tenant, client_id), ())) if client_id is not None else ()

    def preview(self, tenant: str, client_id: str | None, frame: bytes) -> None:
        """One binary frame, with its metadata where the client asked for it."""
        for socket in self._hears(tenant, client_id):
            message = frame if socket.metadata else without_metadata(frame)
            if message is not None:
                self._put(socket, socket.preview(_frame(message, binary=True)))

    def queue_changed(self) -> None:
        """Tell every client how long the queue is; changes of the same moment are told once."""
        if not self._stale:
            self._stale = True
            asyncio.get_running_loop().call_soon(self._tell)

    async def close(self) -> None:
        """Hang up on everybody."""
        sockets = [socket for sockets in self._sessions.values() for socket in sockets]
        await asyncio.gather(*(_closed(socket, 1001) for socket in sockets))

    def _tell(self) -> None:
        self._stale = False
        frames: dict[str, bytes] = {}
        for (tenant, _), sockets in self._sessions.items():
            if tenant not in frames:
                frames[tenant] = _frame(_event("status", {"status": self._status(tenant)}))
            for socket in sockets:
                self._put(socket, socket.send(frames[tenant], progress="status"))

    def _heard(self, socket: _Socket, text: str) -> None:
        event = event_of(text)
        if event is not None and event[0] == "feature_flags":
            socket.metadata = event[1].get("supports_preview_metadata") is True
            socket.send(_frame(_event("feature_flags", self._features)))

    def _put(self, socket: _Socket, sent: bool) -> None:
        if not socket.left_behind and not sent:
            socket.left_behind = True
            task = asyncio.get_running_loop().create_task(_closed(socket, 1013), name="comfyui client")
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)


async def _closed(socket: _Socket, code: int) -> None:
    with contextlib.suppress(ConnectionError, TimeoutError):
        async with asyncio.timeout(_PATIENCE_S):
            await socket.socket.close(code=code)


def _event(kind: str, data: dict[str, Any]) -> bytes:
    return msgspec.json.encode({"type": kind, "data": data})


def _frame(payload: bytes, *, binary: bool = False) -> bytes:
    """A whole message as one frame of a server (RFC 6455, 5.2)."""
    first, size = 0x82 if binary else 0x81, len(payload)
    if size < 126:
        return struct.pack(">BB", first, size) + payload
    if size < 1 << 16:
        return struct.pack(">BBH", first, 126, size) + payload
    return struct.pack(">BBQ", first, 127, size) + payload
