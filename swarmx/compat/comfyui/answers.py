"""Requests in and answers out, as JSON: errors have ComfyUI's shape everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from aiohttp import web

from swarmx.compat.comfyui.validation import Error, error

_MOST = 2**63 - 1


class BadRequest(Exception):
    """The request cannot be understood; `problem` says why, as clients are told."""

    def __init__(self, problem: Error) -> None:
        super().__init__(problem["message"])
        self.problem = problem


def answer(body: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """Any value as JSON."""
    raw = msgspec.json.encode(body)
    return web.Response(body=raw, status=status, headers=headers, content_type="application/json")


def refusal(status: int, problem: Error, headers: Mapping[str, str] | None = None) -> web.Response:
    """One error, about no node."""
    return answer({"error": problem, "node_errors": {}}, status=status, headers=headers)


async def read_json(request: web.Request, limit: int, *, lenient: bool = False) -> Any:
    """The body of a request, decoded; with `lenient`, None for what is not JSON.

    Raises BadRequest, HTTPRequestEntityTooLarge.
    """
    body = bytearray()
    async for chunk in request.content.iter_chunked(1 << 16):
        body += chunk
        if len(body) > limit:
            raise web.HTTPRequestEntityTooLarge(max_size=limit, actual_size=len(body))
    try:
        return _decoded(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as problem:
        if lenient:
            return None
        raise BadRequest(error("invalid_json", "the body is not JSON", str(problem))) from None


def _decoded(body: bytearray, spare: int = 200) -> Any:
    """The value. It is read this many calls deeper than here: what is nested so deep that the stack just holds it could
    not be written again from elsewhere, to the store, to a server, into history."""
    return _decoded(body, spare - 1) if spare else msgspec.json.decode(body)


def whole_number(request: web.Request, name: str) -> int | None:
    """A parameter of the query, as 63 bits hold it; None where it is not there. Raises BadRequest."""
    raw = request.query.get(name)
    try:
        return None if raw is None else max(-_MOST, min(_MOST, int(raw)))
    except ValueError:
        raise BadRequest(error("invalid_query", f"{name} is a whole number", raw[:100] if raw else "")) from None
