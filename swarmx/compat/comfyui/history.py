"""What `/history` shows of a job that has ended, as JSON, and the ends that no server told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from swarmx.compat.comfyui.files import files_in
from swarmx.compat.comfyui.jobs import Event, File, Job, Outcome, State


def shown(job: Job, outcome: Outcome) -> bytes:
    """The entry of a job; empty for one that ended before it began."""
    if not outcome.status:
        return b""
    entry = {
        "prompt": job.row(),
        "outputs": outcome.outputs,
        "status": outcome.status,
        "meta": outcome.meta,
        "swarmx": outcome.facts,
    }
    return msgspec.json.encode(entry)


def outcome_of(
    entry: dict[str, Any], outputs: dict[str, Any], facts: dict[str, Any], told: list[Event], *, cancelled: bool
) -> Outcome:
    """What became of a job that its server kept so. It is cancelled where we wanted that and the server stopped."""
    kept = entry.get("status")
    status: dict[str, Any] = kept if isinstance(kept, dict) else {}
    stopped = any(kind == "execution_interrupted" for kind, _ in messages_of(status))
    state: State = "completed" if succeeded(entry) else "cancelled" if stopped and cancelled else "failed"
    meta = entry.get("meta") or {}
    return Outcome(state=state, outputs=outputs, status=status, meta=meta, facts=facts, told=told)


def files_of(outcome: Outcome) -> tuple[list[File], list[File]]:
    """The files that the outputs of a job name: those that it made, and those of nodes whose results its server had."""
    told = [data.get("nodes") for kind, data in messages_of(outcome.status) if kind == "execution_cached"]
    had = {node for nodes in told if isinstance(nodes, list) for node in nodes if isinstance(node, str)}
    made, found = list[File](), list[File]()
    for node, output in outcome.outputs.items():
        about = outcome.meta.get(node)
        shown = about.get("display_node") if isinstance(about, dict) else None  # what it was expanded from
        (found if node in had or shown in had else made).extend(files_in(output))
    return made, found


def messages_of(status: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The type and the data of what the server said of a job, as its status keeps that."""
    found = status.get("messages")
    rows = found if isinstance(found, list) else []
    return [(row[0], row[1]) for row in rows if isinstance(row, list) and len(row) == 2 and isinstance(row[1], dict)]


def succeeded(entry: dict[str, Any]) -> bool:
    """Whether the server ran the job to its end."""
    status = entry.get("status")
    return isinstance(status, dict) and status.get("status_str") == "success"


def given_up(job: Job, kind: str, detail: str, **more: Any) -> Outcome:
    """A job that no server ran to its end; its client hears `more`, too."""
    data: dict[str, Any] = {
        "prompt_id": job.prompt_id,
        "node_id": None,
        "node_type": None,
        "executed": [],
        "exception_type": f"swarmx.{kind}",
        "exception_message": detail,
        "traceback": [],
        "current_inputs": {},
        "current_outputs": [],
    }
    status = {"status_str": "error", "completed": False, "messages": [["execution_error", data]]}
    told = [("execution_error", data | more)]
    return Outcome(state="failed", status=status, facts={"server": None}, told=told)


def refused_by_server(job: Job, body: dict[str, Any]) -> Outcome:
    """A job that no server took, though it looked right when it was accepted."""
    found = body.get("error")
    message = found.get("message") if isinstance(found, dict) else None
    detail = f"no server takes the graph: {message or 'no reason given'}"
    return given_up(job, "GraphRefused", detail, node_errors=body.get("node_errors", {}))
