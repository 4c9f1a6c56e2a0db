"""Entity tags: for who has something already, and for who wants to change only what it has seen."""

from __future__ import annotations

import re
from hashlib import sha256
from typing import Any

import msgspec
from starlette.requests import Request

from swarmx.core.errors import Outdated
from swarmx.core.records import WorkflowRecord

LARGEST_SEQ = 10**15
"""Larger numbers of events and records are nobody's; the store counts in 64 bits."""

_TAG = re.compile(r'(?:W/)?("[^"]*")')


def tag_of(record: WorkflowRecord) -> str:
    """The tag of a workflow: weak, because forecasts about it move on while nothing happens to it."""
    return f'W/"{record.workflow_id}-{record.seq}"'


def tag_of_value(value: Any) -> str:
    """The tag of plain values: the same for equal ones."""
    return f'"{sha256(msgspec.json.encode(value, order="deterministic")).hexdigest()[:32]}"'


def unchanged(request: Request, tag: str) -> bool:
    """Whether `If-None-Match` names the tag."""
    return _names(request.headers.getlist("if-none-match"), tag)


def check_match(request: Request, tag: str, what: str) -> bool:
    """Whether the client sent `If-Match`. Raises Outdated if it names another tag than that of what there is."""
    wanted = request.headers.getlist("if-match")
    if wanted and not _names(wanted, tag):
        raise Outdated(f"{what} is not as you saw it (If-Match {', '.join(wanted)[:80]}); look again, then ask anew")
    return bool(wanted)


def _names(values: list[str], tag: str) -> bool:
    """Whether one of the header's tags is this one, or any will do; weak tags compare like strong ones."""
    opaque = tag.removeprefix("W/")
    return any(value.strip() == "*" or opaque in _TAG.findall(value) for value in values)
