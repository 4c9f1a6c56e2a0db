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
    SignalReceived,
    Spent,
    Submitted,
    decode_event,
)
from swarmx.workflows.nodes import Budget
from swarmx.workflows.signals import missing
from swarmx.workflows.state import NodeRun, Run

_OF_RECORD = (
    "workflow_id", "tenant", "mode", "kind", "name", "state", "created_at_s", "deadline_at_s", "forked_from",
)  # fmt: skip


def describe_run(record: WorkflowRecord, stored: Sequence[StoredEvent]) -> dict[str, Any]:
    """Plain data about a workflow. Raises WorkflowError when its events cannot be read.

    Keys: workflow_id, tenant, mode, kind, name, state, created_at_s, deadline_at_s, forked_from, ended_at_s, outputs
    (when finished), error and error_node (when failed), inputs, spent (steps, tokens, money and seconds of replicas)
    and budget, signals (name, state, timeout_at_s, value), and nodes: path, parent, kind, state, needs, role, model,
    ready_at_s, started_at_s, ended_at_s, call_id, attempt, not_before_s (of a node that rests before another attempt),
    awaits (the signals without which it does not go on), error (of the last attempt, while there is no later one),
    spent and budget (with all that is inside it). Times are Unix seconds; what does not apply is None. The nodes of a
    workflow that failed or was cancelled keep the state in which that met them.
    """
    shown: dict[str, Any] = {name: getattr(record, name) for name in _OF_RECORD}
    shown |= {"ended_at_s": record.ended_at_s, "outputs": None, "error": None, "error_node": None}
    outcome = msgspec.json.decode(record.outcome) if record.outcome is not None else None
    if record.state == "finished":
        shown["outputs"] = outcome
    elif outcome is not None:
        shown |= {"error": outcome.get("error"), "error_node": outcome.get("node")}
    shown |= {"inputs": {}, "spent": None, "budget": None, "signals": [], "nodes": []}
    return shown | (_declared(stored) if record.mode == "declared" and stored else {})


def _declared(stored: Sequence[StoredEvent]) -> dict[str, Any]:
    events = [(event.at_s, decode_event(event.body)) for event in stored]
    run = Run.rebuild(event for _, event in events)
    times: dict[str, dict[str, Any]] = {}
    for at_s, event in events:
        _note(times, at_s, event)
    first = events[0][1]
    defaulted = {e.name for _, e in events if isinstance(e, SignalReceived) and e.signal_id is None}
    return {
        "inputs": first.inputs if isinstance(first, Submitted) else {},
        "spent": _fields(run.ledger.spent_by("")),
        "budget": _budget(run.graph.spec),
        "signals": [_signal(run, name, defaulted) for name in run.graph.spec.signals],
        "nodes": [_node(run, node, times, events[0][0]) for node in run.nodes.values()],
    }


def _signal(run: Run, name: str, defaulted: set[str]) -> dict[str, Any]:
    """States: unused (nothing waits for it yet), awaited, received, defaulted (none came in time)."""
    state = "awaited" if name in run.awaited else "unused"
    if name in run.signals:
        state = "defaulted" if name in defaulted else "received"
    return {
        "name": name,
        "state": state,
        "timeout_at_s": run.awaited.get(name),
        "value": run.signals.get(name),
    }


def _fields(spent: Spent) -> dict[str, Any]:
    return {name: getattr(spent, name) for name in spent.__struct_fields__}


def _budget(declared: Any) -> dict[str, Any] | None:
    budget: Budget | None = getattr(declared, "budget", None)
    return None if budget is None else budget.model_dump()


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
        "awaits": missing(run, node) if node.path in run.due else [],
        "error": noted.get("error"),
        "spent": _fields(run.ledger.spent[node.path]) if node.path in run.ledger.spent else None,
        "budget": _budget(declared),
    }


def _ready_at_s(run: Run, node: NodeRun, times: dict[str, dict[str, Any]], submitted_at_s: float) -> float | None:
    """When the last thing that the node waited for was there; None for one that waits, or was given up before that."""
    if node.scope.waiting[node.step.id]:
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
