"""What a server says over its websocket: a fresh connection each time, and messages that can be understood."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import struct
import uuid
from collections.abc import Callable
from typing import Any

import aiohttp
import msgspec

from swarmx.compat.comfyui.server import ComfyServer, repaired

log = logging.getLogger(__name__)

_RETRY_S = 0.5
_PREVIEW, _PREVIEW_WITH_METADATA = 1, 4
_IMAGE_TYPES = {"image/jpeg": 1, "image/png": 2}

OnEvent = Callable[[str, str | None, bytes], None]
"""Hears the type of an event, the job that it is about, and its text as it came."""
OnBinary = Callable[[bytes], None]


class Listener:
    """Follows one server. A ComfyUI server that is asked twice for the same client id loses that client's events for
    good, so that each connection has an id of its own; what was missed in between, polling finds.
    """

    def __init__(
        self, server: ComfyServer, *, on_event: OnEvent, on_binary: OnBinary, on_drop: Callable[[], None]
    ) -> None:
        self._server = server
        self._on_event = on_event
        self._on_binary = on_binary
        self._on_drop = on_drop
        self.client_id = uuid.uuid4().hex
        self.connected = False

    async def run(self) -> None:
        """Connect, listen, connect again, for ever."""
        while True:
            self.client_id = uuid.uuid4().hex
            try:
                async with self._server.listen(self.client_id) as socket:
                    flags = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}
                    await socket.send_str(msgspec.json.encode(flags).decode())
                    self.connected = True
                    async for message in socket:
                        self._hear(message)
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                log.debug("no events from %s: %r", self._server.name, error)
            except Exception:  # what a server says must not end the listening to all of them
                log.exception("an event of %s could not be told", self._server.name)
            finally:
                dropped, self.connected = self.connected, False
            if dropped:
                self._on_drop()
            await asyncio.sleep(_RETRY_S)

    def _hear(self, message: aiohttp.WSMessage) -> None:
        if message.type is aiohttp.WSMsgType.BINARY:
            self._on_binary(message.data)
        elif message.type is aiohttp.WSMsgType.TEXT:
            heading, text = heading_of(message.data), message.data
            if heading is None:
                with contextlib.suppress(ValueError, RecursionError):
                    text = repaired(text)
                    heading = heading_of(text)
            if heading is not None:
                self._on_event(*heading, text)


class _About(msgspec.Struct):
    prompt_id: str | None = None


class _Heading(msgspec.Struct):
    type: str
    data: _About


_headings = msgspec.json.Decoder(_Heading)


def heading_of(text: bytes) -> tuple[str, str | None] | None:
    """The type of a message and the job that it is about; None for what is no event. The rest is not read: most events
    are passed on as they are, and those of a long graph are long."""
    try:
        if not text.isascii():  # what is not read might be no UTF-8
            text.decode()
        heading = _headings.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return heading.type, heading.data.prompt_id


def event_of(text: str | bytes) -> tuple[str, dict[str, Any]] | None:
    """The type and the data of a message; None for what is no event."""
    try:
        event = msgspec.json.decode(text)
    except (msgspec.MsgspecError, RecursionError):
        return None
    if not isinstance(event, dict) or not isinstance(event.get("type"), str) or not isinstance(event.get("data"), dict):
        return None
    return event["type"], event["data"]


def prompt_of(frame: bytes) -> str | None:
    """The job that a binary frame says it belongs to."""
    metadata = _metadata(frame)
    found = metadata.get("prompt_id") if metadata else None
    return found if isinstance(found, str) else None


def renamed(frame: bytes, prompt_id: str) -> bytes:
    """The frame as one of this job, if it says to which one it belongs."""
    metadata = _metadata(frame)
    if metadata is None or "prompt_id" not in metadata:
        return frame
    about = msgspec.json.encode(metadata | {"prompt_id": prompt_id})
    image = frame[8 + int.from_bytes(frame[4:8], "big") :]
    return frame[:4] + len(about).to_bytes(4, "big") + about + image


def without_metadata(frame: bytes) -> bytes | None:
    """A preview for clients that did not ask for metadata; None for a frame that is cut short."""
    if len(frame) < 4:
        return None
    if int.from_bytes(frame[:4], "big") != _PREVIEW_WITH_METADATA:
        return frame
    metadata = _metadata(frame)
    if metadata is None:
        return None
    image = frame[8 + int.from_bytes(frame[4:8], "big") :]
    return struct.pack(">II", _PREVIEW, _IMAGE_TYPES.get(str(metadata.get("image_type")), 1)) + image


def _metadata(frame: bytes) -> dict[str, Any] | None:
    if len(frame) < 8 or int.from_bytes(frame[:4], "big") != _PREVIEW_WITH_METADATA:
        return None
    end = 8 + int.from_bytes(frame[4:8], "big")
    try:
        found = msgspec.json.decode(frame[8:end])
    except (msgspec.MsgspecError, RecursionError):
        return None
    return found if isinstance(found, dict) and end <= len(frame) else None
