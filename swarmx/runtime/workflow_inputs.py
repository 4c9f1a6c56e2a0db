"""What is sent to a running workflow from outside: its bytes in the store, and the event that it becomes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import assert_never

import msgspec

from swarmx.core.errors import WorkflowError
from swarmx.core.records import TERMINAL, Input, WorkflowRecord
from swarmx.workflows.events import CancelRequested, Event, SignalReceived
from swarmx.workflows.signals import check_signal
from swarmx.workflows.state import Run
from swarmx.workflows.values import Json

log = logging.getLogger(__name__)


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


def check_signal_for(
    record: WorkflowRecord, events: Sequence[Event], name: str, value: Json, *, signal_id: str
) -> bool:
    """Whether the workflow with these events may be sent the signal; False: it has become an event already.

    Raises WorkflowError when the workflow has ended, does not take it, or has got it from somebody else.
    """
    came = next((event for event in events if isinstance(event, SignalReceived) and event.name == name), None)
    if came is not None and came.signal_id == signal_id:
        return False
    if record.state in TERMINAL:
        raise WorkflowError(f"the workflow {record.workflow_id} has ended ({record.state}) and takes no signals")
    check_signal(Run.rebuild(events[:1]).graph.spec, name, value)
    if came is not None:
        how = "was given its default, as none came in time" if came.signal_id is None else "has come already"
        raise WorkflowError(f"the signal {name!r} {how}; it has one value in a run")
    return True


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
