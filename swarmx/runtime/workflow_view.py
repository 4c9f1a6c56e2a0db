"""A workflow as people and the gateway see it: its nodes, their states and times, read from its stored events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from swarmx.core.records import StoredEvent, WorkflowRecord
from swarmx.workflows.events import (
    Event,
    NodeExpanded,
    NodeFailed,
    NodeFinished,
    NodeRetried,
    NodeStarted,
    Submitted,
    decode_event,
)
from swarmx.workflows.state import NodeRun, Run


def describe_run(record: WorkflowRecord, stored: Sequence[StoredEvent]) -> dict[str, Any]:
    """Plain data about a workflow. Raises WorkflowError when its events cannot be read.

    Keys: workflow_id, tenant, mode, kind, name, state, created_at_s, deadline_at_s, ended_at_s, outputs (when
    finished), error and error_node (when failed), inputs, and nodes: path, parent, kind, state, needs, role, model,
    ready_at_s, started_at_s, ended_at_s, call_id, attempt, not_before_s (of a node that rests before another attempt),
    error (of the last attempt, while there is no later one). Times are Unix seconds; what does not apply is None. The
    nodes of a workflow that failed or was cancelled keep the state in which that met them.
    """
    shown: dict[str, Any] = {
        name: getattr(record, name)
        for name in ("workflow_id", "tenant", "mode", "kind", "name", "state", "created_at_s", "deadline_at_s")
    }
    shown |= {"ended_at_s": record.ended_at_s, "outputs": None, "error": None, "error_node": None}
    outcome = msgspec.json.decode(record.outcome) if record.outcome is not None else None
    if record.state == "finished":
        shown["outputs"] = outcome
    elif outcome is not None:
        shown |= {"error": outcome.get("error"), "error_node": outcome.get("node")}
    inputs, nodes = _nodes(stored) if record.mode == "declared" else ({}, [])
    return shown | {"inputs": inputs, "nodes": nodes}


def _nodes(stored: Sequence[StoredEvent]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    events = [(event.at_s, decode_event(event.body)) for event in stored]
    if not events:
        return {}, []
    run = Run.rebuild(event for _, event in events)
    times: dict[str, dict[str, Any]] = {}
    for at_s, event in events:
        _note(times, at_s, event)
    first = events[0][1]
    nodes = [_node(run, node, times, events[0][0]) for node in run.nodes.values()]
    return first.inputs if isinstance(first, Submitted) else {}, nodes


def _note(times: dict[str, dict[str, Any]], at_s: float, event: Event) -> None:
    match event:
        case NodeStarted(path=path) | NodeExpanded(path=path):
            noted = times.setdefault(path, {})
            noted.setdefault("started_at_s", at_s)
            noted.pop("error", None)
            if isinstance(event, NodeExpanded):
                noted.setdefault("expanded_at_s", []).append(at_s)
        case NodeFinished(path=path) | NodeFailed(path=path):
            noted = times.setdefault(path, {})
            noted.setdefault("started_at_s", at_s)
            noted["ended_at_s"] = at_s
            noted["call_id"] = event.call_id
            noted["error"] = event.error if isinstance(event, NodeFailed) else None
        case NodeRetried(path=path):
            times[path] |= {"call_id": event.call_id, "error": event.error}
        case _:
            pass


def _node(run: Run, node: NodeRun, times: dict[str, dict[str, Any]], submitted_at_s: float) -> dict[str, Any]:
    noted = times.get(node.path, {})
    declared = node.step.node
    return {
        "path": node.path,
        "parent": node.scope.owner,
        "kind": declared.kind,
        "state": node.state,
        "needs": [node.scope.prefix + need for need in node.step.needs],
        "role": getattr(declared, "role", None),
        "model": getattr(declared, "model", None),
        "ready_at_s": _ready_at_s(run, node, times, submitted_at_s),
        "started_at_s": noted.get("started_at_s"),
        "ended_at_s": noted.get("ended_at_s"),
        "call_id": noted.get("call_id"),
        "attempt": node.attempt,
        "not_before_s": run.resting.get(node.path),
        "error": noted.get("error"),
    }


def _ready_at_s(run: Run, node: NodeRun, times: dict[str, dict[str, Any]], submitted_at_s: float) -> float | None:
    """When the last thing that the node waited for was there."""
    if node.state == "waiting":
        return None
    opened_at_s = submitted_at_s
    if node.scope.owner is not None:
        expanded = times.get(node.scope.owner, {}).get("expanded_at_s", [submitted_at_s])
        opened_at_s = expanded[0]
        if len(expanded) > 1:  # a loop: one expansion an iteration; a map has a single one
            scopes = run.nodes[node.scope.owner].scopes
            opened_at_s = expanded[next(i for i, scope in enumerate(scopes) if scope is node.scope)]
    ended = [times[node.scope.prefix + need]["ended_at_s"] for need in node.step.needs]
    return float(max([opened_at_s, *ended]))
