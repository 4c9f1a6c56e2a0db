"""What happened to a workflow: one closed union of events, and their bytes in the store."""

from __future__ import annotations

import msgspec

from swarmx.core.errors import WorkflowError
from swarmx.workflows.values import Json

EVENTS_VERSION = 1


class _Event(msgspec.Struct, frozen=True, kw_only=True, tag=True, tag_field="type", omit_defaults=True):
    pass


class Submitted(_Event, frozen=True, kw_only=True):
    """The workflow was accepted: its definition as JSON text, and its bound inputs."""

    spec: str
    inputs: dict[str, Json]


class NodeStarted(_Event, frozen=True, kw_only=True):
    """A model call of this node is about to be made."""

    path: str
    kind: str


class NodeExpanded(_Event, frozen=True, kw_only=True):
    """A map got its items (`items`), or a loop began its next iteration with the last result (`previous`)."""

    path: str
    items: list[Json] | None = None
    iteration: int | None = None
    previous: Json = None


class NodeFinished(_Event, frozen=True, kw_only=True):
    """A node left its output. `call_id` names the model call that gave it, if one did."""

    path: str
    output: Json
    call_id: str | None = None


class NodeFailed(_Event, frozen=True, kw_only=True):
    """A node cannot have an output, and so its workflow cannot finish."""

    path: str
    error: str
    call_id: str | None = None


class CancelRequested(_Event, frozen=True, kw_only=True):
    """Somebody no longer wants the workflow."""


class Cancelled(_Event, frozen=True, kw_only=True):
    """Terminal: ended on request."""


class Finished(_Event, frozen=True, kw_only=True):
    """Terminal: every node is finished."""

    outputs: dict[str, Json]


class Failed(_Event, frozen=True, kw_only=True):
    """Terminal: ended by an error, of the node `path` if it names one."""

    error: str
    path: str | None = None


Event = (
    Submitted | NodeStarted | NodeExpanded | NodeFinished | NodeFailed | CancelRequested | Cancelled | Finished | Failed
)
Terminal = Cancelled | Finished | Failed


class _Stored(msgspec.Struct, frozen=True, kw_only=True):
    v: int
    event: Event


class _Version(msgspec.Struct, frozen=True, kw_only=True):
    v: int


_decoder = msgspec.json.Decoder(_Stored)
_encoder = msgspec.json.Encoder()


def encode_event(event: Event) -> bytes:
    """The event as JSON with its version."""
    return _encoder.encode(_Stored(v=EVENTS_VERSION, event=event))


def decode_event(body: bytes) -> Event:
    """The event from its JSON; fields that a newer version added are ignored. Raises WorkflowError."""
    try:
        return _decoder.decode(body).event
    except (msgspec.DecodeError, RecursionError) as error:
        try:
            version = msgspec.json.decode(body, type=_Version).v
        except (msgspec.DecodeError, RecursionError):
            version = EVENTS_VERSION
        if version > EVENTS_VERSION:
            message = f"an event has version {version}, this program knows {EVENTS_VERSION}; use a newer one"
        else:
            message = f"an event of the workflow cannot be read: {error}"
        raise WorkflowError(message) from error
