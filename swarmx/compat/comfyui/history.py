"""What `/history` shows of a job that has ended, as JSON."""

from __future__ import annotations

from typing import Any

import msgspec

from swarmx.compat.comfyui.jobs import Job


def shown(job: Job, outputs: Any, status: Any, meta: Any, facts: dict[str, Any]) -> bytes:
    """A job that a server ran to its end. `facts` are ours: where it ran, how long it waited."""
    entry = {"prompt": job.row(), "outputs": outputs, "status": status, "meta": meta or {}, "swarmx": facts}
    return msgspec.json.encode(entry)


def given_up(job: Job, kind: str, detail: str) -> tuple[bytes, dict[str, Any]]:
    """A job that no server ran to its end, and the event that tells its client."""
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
    return shown(job, {}, status, {}, {"server": None}), data


def refused_by_server(job: Job, body: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """A job that no server took, though it looked right when it was accepted."""
    found = body.get("error")
    message = found.get("message") if isinstance(found, dict) else None
    history, data = given_up(job, "GraphRefused", f"no server takes the graph: {message or 'no reason given'}")
    return history, data | {"node_errors": body.get("node_errors", {})}
