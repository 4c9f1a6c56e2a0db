"""The clients' websockets: each client id has one session, however often it connects."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from aiohttp import WSMsgType, web

from swarmx.compat.comfyui.events import event_of, without_metadata

MAX_BEHIND = 2000  # messages that a client may be behind before it is hung up on
_MAX_PREVIEWS_BEHIND = 8
_MOST_AT_ONCE = 256
_PATIENCE_S = 1.0  # with a client that is to hang up
FEATURES: dict[str, Any] = {"supports_preview_metadata": True}


class _Socket:
    """One connection: what is to be sent waits here, so that a slow client holds up nobody."""

    def __init__(self, socket: web.WebSocketResponse, transport: asyncio.WriteTransport) -> None:
        self.socket = socket
        self._transport = transport
        self.metadata = False
        self.left_behind = False
        self._behind: asyncio.Queue[str | bytes] = asyncio.Queue(MAX_BEHIND)

    def send(self, message: str | bytes) -> bool:
        """False when the client is too far behind. A preview is left out where others wait."""
        if isinstance(message, bytes) and self._behind.qsize() > _MAX_PREVIEWS_BEHIND:
            return True
        try:
            self._behind.put_nowait(message)
        except asyncio.QueueFull:
            return False
        return True

    async def pump(self) -> None:
        """Send what waits. What came in the same moment leaves in one write: writes are most of what an event costs."""
        with contextlib.suppress(ConnectionError):
            while True:
                message = await self._behind.get()
                if self._is_free():
                    self._write(message)
                elif isinstance(message, bytes):
                    await self.socket.send_bytes(message)
                else:
                    await self.socket.send_str(message)

    def _is_free(self) -> bool:
        """Whether the client has taken all that it was sent; else it is for the websocket to wait for it."""
        transport = self._transport
        return not (self.socket.closed or transport.is_closing() or transport.get_write_buffer_size())

    def _write(self, message: str | bytes) -> None:
        """The message and those behind it."""
        frames = [_frame(message)]
        while not self._behind.empty() and len(frames) < _MOST_AT_ONCE:
            frames.append(_frame(self._behind.get_nowait()))
        self._transport.write(b"".join(frames))


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
        assert isinstance(request.transport, asyncio.WriteTransport), "it was just written to"  # noqa: S101
        socket, key = _Socket(response, request.transport), (tenant, client_id)
        self._sessions.setdefault(key, set()).add(socket)
        pump = asyncio.create_task(socket.pump(), name="comfyui client")
        try:
            socket.send(_text("status", {"status": self._status(tenant), "sid": client_id}))
            current = self._current(tenant, client_id)
            if current is not None:
                socket.send(_text("executing", current))
            async for message in response:
                if message.type is WSMsgType.TEXT:
                    self._heard(socket, message.data)
        finally:
            pump.cancel()
            self._sessions[key].discard(socket)
            if not self._sessions[key]:
                del self._sessions[key]
        return response

    def send(self, tenant: str, client_id: str | None, kind: str, data: dict[str, Any]) -> None:
        """One event to every connection of a client."""
        if self._hears(tenant, client_id):
            self.forward(tenant, client_id, _text(kind, data))

    def forward(self, tenant: str, client_id: str | None, text: str) -> None:
        """One event as a server sent it."""
        for socket in self._hears(tenant, client_id):
            self._put(socket, text)

    def _hears(self, tenant: str, client_id: str | None) -> Sequence[_Socket]:
        return tuple(self._sessions.get((tenant, client_id), ())) if client_id is not None else ()

    def preview(self, tenant: str, client_id: str | None, frame: bytes) -> None:
        """One binary frame, with its metadata where the client asked for it."""
        for socket in self._hears(tenant, client_id):
            message = frame if socket.metadata else without_metadata(frame)
            if message is not None:
                self._put(socket, message)

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
        texts: dict[str, str] = {}
        for (tenant, _), sockets in self._sessions.items():
            text = texts.setdefault(tenant, _text("status", {"status": self._status(tenant)}))
            for socket in list(sockets):
                self._put(socket, text)

    def _heard(self, socket: _Socket, text: str) -> None:
        event = event_of(text)
        if event is not None and event[0] == "feature_flags":
            socket.metadata = event[1].get("supports_preview_metadata") is True
            socket.send(_text("feature_flags", self._features))

    def _put(self, socket: _Socket, message: str | bytes) -> None:
        if not socket.left_behind and not socket.send(message):
            socket.left_behind = True
            task = asyncio.get_running_loop().create_task(_closed(socket, 1013), name="comfyui client")
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)


async def _closed(socket: _Socket, code: int) -> None:
    with contextlib.suppress(ConnectionError, TimeoutError):
        async with asyncio.timeout(_PATIENCE_S):
            await socket.socket.close(code=code)


def _text(kind: str, data: dict[str, Any]) -> str:
    return msgspec.json.encode({"type": kind, "data": data}).decode()


def _frame(message: str | bytes) -> bytes:
    """A whole message as one frame of a server (RFC 6455, 5.2)."""
    first, payload = (0x82, message) if isinstance(message, bytes) else (0x81, message.encode())
    size = len(payload)
    if size < 126:
        return struct.pack(">BB", first, size) + payload
    if size < 1 << 16:
        return struct.pack(">BBH", first, 126, size) + payload
    return struct.pack(">BBQ", first, 127, size) + payload
