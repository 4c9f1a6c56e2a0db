"""What is sent to a running workflow from outside: its bytes in the store, and the event that it becomes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import assert_never

import msgspec

from swarmx.core.errors import Refused, WorkflowError
from swarmx.core.ports import Store
from swarmx.core.records import TERMINAL, Input, StoredEvent
from swarmx.runtime.folding import folded
from swarmx.workflows.events import CancelRequested, SignalReceived, decode_event
from swarmx.workflows.signals import check_signal
from swarmx.workflows.spec import WorkflowSpec
from swarmx.workflows.state import Run
from swarmx.workflows.values import Json

log = logging.getLogger(__name__)

_SHOWN_CHARS = 120


class _Cancel(msgspec.Struct, frozen=True, kw_only=True, tag="cancel", tag_field="input"):
    pass


class _Signal(msgspec.Struct, frozen=True, kw_only=True, tag="signal", tag_field="input"):
    name: str
    value: Json
    signal_id: str


_decoder = msgspec.json.Decoder(_Cancel | _Signal)

CANCEL = msgspec.json.encode(_Cancel())


def encode_signal(name: str, value: Json, *, signal_id: str) -> bytes:
    return msgspec.json.encode(_Signal(name=name, value=value, signal_id=signal_id))


async def may_signal(store: Store, workflow_id: str, name: str, value: Json, *, signal_id: str) -> bool:
    """Whether the workflow may be sent the signal; False: this one waits for its owner, or has become an event already.

    Raises WorkflowError when the workflow has ended or does not take it, Refused when another one came before.
    """
    waiting = await store.inputs(workflow_id)  # first: what its owner takes meanwhile is among the events
    spec, received = await folded(await store.events(workflow_id), _signals_of)
    record = await store.workflow(workflow_id, tenant=None)
    came: SignalReceived | _Signal | None = received.get(name)
    if came is None:
        came = next((signal for given in waiting if (signal := _signal_of(given, name)) is not None), None)
    if came is not None and came.signal_id == signal_id:
        return False
    if record is None or record.state in TERMINAL:
        state = "gone" if record is None else record.state
        raise WorkflowError(f"the workflow {workflow_id} has ended ({state}) and takes no signals")
    check_signal(spec, name, value)
    if came is not None:
        how = "was given its default, as none came in time" if came.signal_id is None else "has come already"
        text = msgspec.json.encode(came.value).decode()
        shown = text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."
        raise Refused(f"the signal {name!r} {how}: {shown}; it has one value in a run", rule="signal")
    return True


def _signals_of(stored: Sequence[StoredEvent]) -> tuple[WorkflowSpec, dict[str, SignalReceived]]:
    """The definition, and the signals that have come, by name."""
    events = [decode_event(event.body) for event in stored]
    received = {event.name: event for event in events if isinstance(event, SignalReceived)}
    return Run.rebuild(events[:1]).graph.spec, received


def _signal_of(given: Input, name: str) -> _Signal | None:
    with suppress(msgspec.DecodeError, RecursionError):
        asked = _decoder.decode(given.body)
        if isinstance(asked, _Signal) and asked.name == name:
            return asked
    return None


def event_of(run: Run, given: Input) -> CancelRequested | SignalReceived | None:
    """What follows from the input; None where it changes nothing: the run stops anyway, or has that signal already.

    The same goes for what cannot be read, which only a program of another version posts.
    """
    try:
        asked = _decoder.decode(given.body)
    except (msgspec.DecodeError, RecursionError) as error:
        log.error("input %d of workflow %s cannot be read and is dropped: %s", given.number, run.workflow_id, error)
        return None
    match asked:
        case _Cancel():
            return None if run.ended or run.cancelling else CancelRequested()
        case _Signal(name=name):
            if run.ended or run.stopping or name in run.signals or name not in run.graph.spec.signals:
                return None
            return SignalReceived(name=name, value=asked.value, signal_id=asked.signal_id)
        case _:
            assert_never(asked)
