"""The server-sent events of a streamed answer: how they begin, what they say of usage and tools, how they end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress

import msgspec

from swarmx.runtime.upstream import NOT_JSON, AttemptFailed, Usage, usage_of

_LINGER_S = 1.0
_MOST_OF_A_LINE = 1 << 16
_MOST_TOOLS = 32  # of one answer
_LONGEST_NAME = 64
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


class ToolsAsked:
    """Reads from the chunks of a stream, as they come, which tools the answer asks for.

    An event is decoded only where it names a tool, which is one event a tool: all others cost one search for bytes.
    """

    def __init__(self) -> None:
        self._names: dict[int, str] = {}  # by the place of the tool in the answer: some servers repeat them
        self._rest = b""  # of an event whose end has not come

    @property
    def names(self) -> tuple[str, ...]:
        """Those that were read so far."""
        return tuple(self._names.values())

    def read(self, chunk: bytes) -> None:
        """Take in the next chunk."""
        if not self._rest and b'"tool_calls"' not in chunk and chunk.endswith(b"\n"):
            return
        lines = self._rest + chunk
        end = lines.rfind(b"\n") + 1
        self._rest = lines[end:] if len(lines) - end <= _MOST_OF_A_LINE else b""
        if b'"tool_calls"' not in lines[:end]:
            return
        for line in lines[:end].split(b"\n"):
            if line.startswith(b"data:") and b'"tool_calls"' in line and b'"name"' in line:
                with suppress(*NOT_JSON):
                    for place, name in _named(msgspec.json.decode(line[5:].strip()), "delta"):
                        if len(self._names) < _MOST_TOOLS:
                            self._names.setdefault(place, name)


def tools_of(answer: object) -> tuple[str, ...]:
    """The tools that a whole answer asks for, in its order."""
    return tuple(name for _, name in _named(answer, "message"))[:_MOST_TOOLS]


def _named(answer: object, said: str) -> list[tuple[int, str]]:
    """Places and names of the tools in the first choice; nothing where an answer or a chunk has another shape."""
    try:
        asked = answer["choices"][0][said]["tool_calls"]  # type: ignore[index]
        found = [(call.get("index", i), call.get("function", {}).get("name")) for i, call in enumerate(asked or ())]
    except (AttributeError, IndexError, KeyError, TypeError):
        return []
    named = [(at, name[:_LONGEST_NAME]) for at, name in found if type(at) is int and isinstance(name, str)]
    return [(at, name) for at, name in named if name and name.isprintable()]


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
    return _error(f"The replica failed while it answered: {failure.detail}", "upstream_error", failure.reason)


def stopped_event(message: str) -> bytes:
    """Tells the client of a stream that somebody stopped it."""
    return _error(message, "invalid_request_error", "cancelled")


def _error(message: str, kind: str, code: str) -> bytes:
    error = {"message": message, "type": kind, "param": None, "code": code}
    return b"data: " + msgspec.json.encode({"error": error}) + b"\n\n"
