"""The `priority` of a request to an engine, which orders the calls that wait inside it."""

from __future__ import annotations

import msgspec

from swarmx.core.nouns import Priorities

_PER_S = 1e6  # microseconds: a float of Unix seconds is not much finer
_MOST = 2**53 - 1  # what every reader of JSON takes as a whole number; enough until the year 2255


def priority_of(urgency: float, *, low_first: bool) -> int:
    """The urgency of a dispatch as a whole number that an engine orders by.

    The urgency, of which the lower one goes first, is mostly a time in Unix seconds, but some policies have indices of
    their own: counted in millionths, without an origin, both keep their order, on every router and for good.
    """
    value = round(max(-_MOST, min(_MOST, _PER_S * urgency)))
    return value if low_first else -value


def prioritised(body: bytes, urgency: float, priorities: Priorities) -> bytes:
    """The body, a JSON object, with the priority that this urgency means for such an engine; its own gives way.

    An engine that ignores priorities, or even refuses them, is sent the body as it is.
    """
    if priorities == "ignored":
        return body
    priority = priority_of(urgency, low_first=priorities == "low_first")
    if b'"priority"' in body:  # the word may be anywhere: only then the whole of it is read
        return msgspec.json.encode({**msgspec.json.decode(body), "priority": priority})
    head = body.rstrip()[:-1].rstrip()
    return b'%s%s"priority":%d}' % (head, b"" if head.endswith(b"{") else b",", priority)
