"""The server-sent events of a streamed answer: how they begin, what they say of usage, how they end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import msgspec

from swarmx.runtime.upstream import NOT_JSON, AttemptFailed, Usage, usage_of

_LINGER_S = 1.0
_FIELDS = (b"data:", b":", b"event:", b"id:")


def begins_events(head: bytes) -> bool:
    """Whether the first bytes of an answer may be the beginning of an event stream."""
    head = head.lstrip()
    return any(head.startswith(field) or field.startswith(head) for field in _FIELDS)


def usage_in(tail: bytes) -> Usage:
    """The usage object in the last events of a stream, if the client asked for one."""
    for line in reversed(tail.split(b"\n")):
        if line.startswith(b"data:") and b'"usage"' in line:
            try:
                event = msgspec.json.decode(line[5:].strip())
            except NOT_JSON:
                return Usage()
            return usage_of(event.get("usage")) if isinstance(event, dict) else Usage()
    return Usage()


async def rest_of(chunks: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """What follows [DONE], a blank line at most: read to the end, so that the connection can be kept."""
    try:
        while True:
            async with asyncio.timeout(_LINGER_S):
                chunk = await anext(chunks, b"")
            if not chunk:
                return
            yield chunk
    except (AttemptFailed, TimeoutError):
        return


def error_event(failure: AttemptFailed) -> bytes:
    """Tells the client of a stream that it will not go on."""
    error = {"message": f"The replica failed while it answered: {failure.detail}", "type": "upstream_error"}
    return b"data: " + msgspec.json.encode({"error": {**error, "param": None, "code": failure.reason}}) + b"\n\n"
