"""How a declared workflow begins: with what was submitted, or with the beginning of another that it is forked from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swarmx.core.records import StoredEvent, WorkflowRecord
from swarmx.workflows.events import Event, Submitted, decode_event
from swarmx.workflows.forks import fork
from swarmx.workflows.spec import WorkflowSpec
from swarmx.workflows.state import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """A workflow that is not in the store yet: its record without an owner, and its first events, which `run` has."""

    record: WorkflowRecord
    run: Run
    events: Sequence[Event]


def submitted(
    spec: WorkflowSpec,
    inputs: Mapping[str, Any],
    *,
    workflow_id: str,
    tenant: str,
    now_s: float,
    deadline_at_s: float | None,
) -> Beginning:
    """The deadline is absolute; without one the definition's counts from now. Raises WorkflowError."""
    if deadline_at_s is None and spec.deadline_s is not None:
        deadline_at_s = now_s + spec.deadline_s
    run, first = Run.start(spec, dict(inputs), workflow_id=workflow_id, deadline_at_s=deadline_at_s)
    return Beginning(record=_record(run, first, tenant, now_s), run=run, events=[first])


def forked(
    old: WorkflowRecord,
    stored: Sequence[StoredEvent],
    path: str,
    *,
    workflow_id: str,
    now_s: float,
    inputs: dict[str, Any] | None,
) -> Beginning:
    """What `old` had before the node `path`, with its definition, whose deadline counts from now.

    Raises WorkflowError when there is no such node or input, or the events cannot be read.
    """
    events = [decode_event(event.body) for event in stored]
    deadline_s = Run.rebuild(events[:1]).graph.spec.deadline_s
    begun = fork(
        events,
        path,
        forked_from=old.workflow_id,
        workflow_id=workflow_id,
        deadline_at_s=None if deadline_s is None else now_s + deadline_s,
        inputs=inputs,
    )
    run, first = Run.rebuild(begun), begun[0]
    assert isinstance(first, Submitted)  # noqa: S101  # a fork begins with it
    return Beginning(record=_record(run, first, old.tenant, now_s), run=run, events=begun)


def _record(run: Run, first: Submitted, tenant: str, now_s: float) -> WorkflowRecord:
    spec = run.graph.spec
    return WorkflowRecord(
        workflow_id=first.workflow_id,
        tenant=tenant,
        mode="declared",
        kind=spec.kind,
        name=spec.name,
        state="running",
        created_at_s=now_s,
        deadline_at_s=first.deadline_at_s,
        spec_sha256=first.spec_sha256,
        forked_from=first.forked_from,
    )
