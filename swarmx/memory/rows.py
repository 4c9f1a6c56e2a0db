"""What the stores have in common: the columns of a workflow, cursors of pages, and the words of their errors."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from swarmx.core.errors import KeyReused, NotFound, StoreError
from swarmx.core.records import CallRecord, Idempotency, WorkflowPage, WorkflowRecord

T = TypeVar("T")
FIELDS = WorkflowRecord.__struct_fields__
COLUMNS = ", ".join(FIELDS)
OPEN = "state IN ('running', 'cancelling')"
ENDED = "state IN ('finished', 'failed', 'cancelled')"
KEPT_STARTUPS = 20  # per group
NEWEST = (float("inf"), "")  # a time and an id behind all that there are
_MAX_PAGE = 1000
_EVENTS_AT_ONCE = 5000  # that are deleted while others wait to write


def values_of(record: WorkflowRecord) -> tuple[object, ...]:
    """A record in the order of `COLUMNS`."""
    return tuple(getattr(record, column) for column in FIELDS)


def record_of(row: Sequence[object]) -> WorkflowRecord:
    """A row in the order of `COLUMNS`."""
    return msgspec.convert(dict(zip(FIELDS, row, strict=True)), WorkflowRecord)


def decoded(body: bytes, kind: type[T]) -> T:
    """A stored value. Raises StoreError."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise StoreError(
            f"a stored {kind.__name__} cannot be read: {error}; was it written by another version?"
        ) from error


def finished(bodies: Sequence[bytes]) -> list[CallRecord]:
    """Of these calls, newest first, those that finished, oldest first: what predictors learn from."""
    records = [decoded(body, CallRecord) for body in reversed(bodies)]
    return [record for record in records if record.state == "finished"]


def page_of(records: list[WorkflowRecord], limit: int) -> WorkflowPage:
    """The first `limit` of the records, with a cursor to the others if there are any."""
    shown = records[:limit]
    return WorkflowPage(workflows=shown, next_cursor=_cursor(shown[-1]) if len(records) > limit else None)


def read_cursor(cursor: str) -> tuple[float, str]:
    """The time and the id behind which the page begins. Raises NotFound for a cursor of somebody else's."""
    try:
        return msgspec.json.decode(base64.urlsafe_b64decode(cursor), type=tuple[float, str])
    except (binascii.Error, ValueError, msgspec.DecodeError) as error:
        raise NotFound(f"the cursor {cursor[:40]!r} is not of this server; start from the first page") from error


def few_events(found: Sequence[Sequence[Any]]) -> list[str]:
    """The first of these workflows, ids with numbers of events, that have few together; one at least."""
    ids: list[str] = []
    events = 0
    for workflow_id, seq in found:
        events += seq
        if ids and events > _EVENTS_AT_ONCE:
            break
        ids.append(workflow_id)
    return ids


def checked(limit: int, what: str) -> int:
    """The limit. Raises StoreError if it is out of range."""
    if not 1 <= limit <= _MAX_PAGE:
        raise StoreError(f"a page of {limit} {what} was asked for, 1 to {_MAX_PAGE} can be had")
    return limit


def already_exists(workflow_id: str) -> StoreError:
    return StoreError(f"the workflow {workflow_id!r} already exists; use a new id")


def never_accepted(workflow_id: str) -> NotFound:
    return NotFound(f"there is no workflow {workflow_id!r}; accept it before its events are written")


def unknown(workflow_id: str) -> NotFound:
    return NotFound(f"there is no workflow {workflow_id!r}; `swarmx workflows` lists those that there are")


def key_reused(idempotency: Idempotency, workflow_id: str) -> KeyReused:
    return KeyReused(
        f"the idempotency key {idempotency.key[:80]!r} came with another request before, "
        f"which became {workflow_id}; use a new key for a new request"
    )


def _cursor(record: WorkflowRecord) -> str:
    key = msgspec.json.encode([record.created_at_s, record.workflow_id])
    return base64.urlsafe_b64encode(key).decode()
