"""Cursors of lists that have none of their own: the time and the id of the last row of a page."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

from swarmx.core.errors import NotFound

T = TypeVar("T")
Place = tuple[float, str]


def read_cursor(cursor: str | None) -> Place | None:
    """Where a page begins. Raises NotFound for what this server did not give out."""
    if cursor is None:
        return None
    try:
        place: Place = msgspec.json.decode(base64.urlsafe_b64decode(cursor), type=Place)
        return place
    except (binascii.Error, ValueError, msgspec.MsgspecError):
        raise NotFound(f"the cursor {cursor[:40]!r} is not of this server; start from the first page") from None


def page(name: str, rows: Sequence[T], limit: int, place: Callable[[T], Place]) -> dict[str, Any]:
    """A page of at most `limit` of the rows, of which there is one more if there is another page."""
    shown, more = list(rows[:limit]), len(rows) > limit
    cursor = base64.urlsafe_b64encode(msgspec.json.encode(place(shown[-1]))).decode() if more else None
    return {name: shown, "has_more": more, "next_cursor": cursor}
