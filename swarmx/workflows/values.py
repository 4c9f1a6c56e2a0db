"""JSON values: the only kind of value that inputs, templates and node outputs know."""

from __future__ import annotations

import math
from difflib import get_close_matches
from typing import Any

import msgspec

from swarmx.core.errors import WorkflowError
from swarmx.workflows.limits import JSON_DEPTH, TEXT_CHARS

Json = Any  # None, bool, int, float, str, list of Json, dict of str to Json


def checked(value: Json, *, limit: int = TEXT_CHARS) -> Json:
    """Return the value itself if it is JSON of at most `limit` characters (numbers count 8); else WorkflowError."""
    size = 0
    stack: list[tuple[Json, int]] = [(value, 0)]
    while stack:
        item, depth = stack.pop()
        match item:
            case str():
                size += len(item) + 2
                if not item.isascii() and any("\ud800" <= c <= "\udfff" for c in item):
                    raise WorkflowError("a text holds half a surrogate pair, which is not Unicode; send valid UTF-8")
            case None | bool():
                size += 4
            case int():
                size += 8
                if not -(2**63) <= item < 2**63:
                    raise WorkflowError("a whole number is outside the 64 bits that JSON readers agree on")
            case float():
                size += 8
                if not math.isfinite(item):
                    raise WorkflowError(f"a number came out as {item}, which JSON cannot express")
            case list():
                size += 2 + len(item)
                stack.extend((child, depth + 1) for child in item)
            case dict():
                size += 2 + len(item)
                for key, child in item.items():
                    if not isinstance(key, str):
                        raise WorkflowError(f"the key {key!r} of a mapping is not text; quote it")
                    stack.append((key, depth + 1))
                    stack.append((child, depth + 1))
            case _:
                raise WorkflowError(f"a value of type {type(item).__name__} is not JSON")
        if size > limit:
            raise WorkflowError(f"a value is larger than {limit} characters; hand on less of it")
        if depth > JSON_DEPTH:
            raise WorkflowError(f"a value nests deeper than {JSON_DEPTH} levels")
    return value


def as_text(value: Json, *, limit: int = TEXT_CHARS) -> str:
    """Text as it is, anything else as JSON."""
    checked(value, limit=limit)
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def parse_json(text: str) -> Json:
    """Decode strictly (no NaN, nothing after the value). Raises WorkflowError."""
    try:
        return checked(msgspec.json.decode(text.encode("utf-8", "replace")))
    except (msgspec.DecodeError, RecursionError) as error:
        raise WorkflowError(f"the text is not JSON: {error}; it starts with {text[:60]!r}") from error


def nearest(name: str, known: list[str] | tuple[str, ...] | set[str] | frozenset[str]) -> str:
    """' (did you mean X?)' where something known resembles the name, else nothing."""
    close = get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
