"""Jobs as ComfyUI's newer jobs API shows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from swarmx.compat.comfyui.files import files_in
from swarmx.compat.comfyui.jobs import ENDED
from swarmx.compat.comfyui.store import JobLine, StoredJob

_STATES = ("pending", "in_progress", "completed", "failed", "cancelled")
_MOST = 1000
_SHOWN = frozenset({"images", "video", "audio", "3d", "text"})  # kinds of outputs that the web page can show
_SORTS = ("created_at", "execution_duration")


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Which jobs a list shows, and what it says of the rest."""

    lines: list[JobLine]
    pagination: dict[str, Any]


def page_of(lines: list[JobLine], query: Mapping[str, str]) -> Page:
    """One page of jobs, by the query's `status`, `sort_by`, `sort_order`, `limit` and `offset`. Raises ValueError."""
    wanted = [s for s in query.get("status", "").split(",") if s] or list(_STATES)
    sort_by, order = query.get("sort_by", "created_at"), query.get("sort_order", "desc")
    try:
        limit, offset = int(query.get("limit", _MOST)), int(query.get("offset", 0))
    except ValueError:
        raise ValueError("limit and offset are whole numbers") from None
    if any(state not in _STATES for state in wanted):
        raise ValueError(f"status is one or several of {', '.join(_STATES)}")
    if sort_by not in _SORTS or order not in ("asc", "desc"):
        raise ValueError(f"sort_by is one of {', '.join(_SORTS)}, sort_order asc or desc")
    if limit < 1 or offset < 0:
        raise ValueError("limit is at least 1, offset at least 0")
    limit = min(limit, _MOST)
    found = [line for line in lines if line.state in wanted]
    found.sort(key=_created if sort_by == "created_at" else _duration, reverse=order == "desc")
    page = found[offset : offset + limit]
    more = offset + len(page) < len(found)
    return Page(lines=page, pagination={"offset": offset, "limit": limit, "total": len(found), "has_more": more})


def brief(row: StoredJob) -> dict[str, Any]:
    """A job as a list shows it. Times are Unix milliseconds."""
    history = _history(row)
    outputs = history.get("outputs", {})
    shown: dict[str, Any] = {
        "id": row.job.prompt_id,
        "status": row.state,
        "priority": row.job.number,
        "create_time": _ms(row.job.created_s),
        "execution_start_time": _ms(row.started_s),
        "execution_end_time": _ms(row.ended_s) if row.state in ENDED else None,
        "outputs_count": sum(1 for output in outputs.values() for _ in files_in(output)),
        "preview_output": _preview(outputs),
        "workflow_id": row.job.workflow_id,
    }
    failure = _failure(history)
    if row.state == "failed" and failure is not None:
        shown["execution_error"] = failure
    return {key: value for key, value in shown.items() if value is not None}


def detailed(row: StoredJob) -> dict[str, Any]:
    """One job with its graph and outputs."""
    history = _history(row)
    return brief(row) | {
        "workflow": {"prompt": row.job.graph, "extra_data": row.job.row()[3]},
        "outputs": history.get("outputs", {}),
        "execution_status": history.get("status"),
        "execution_meta": history.get("meta"),
        "swarmx": history.get("swarmx"),
    }


def _history(row: StoredJob) -> dict[str, Any]:
    found = msgspec.json.decode(row.history) if row.history else {}
    return found if isinstance(found, dict) else {}


def _failure(history: dict[str, Any]) -> Any:
    status = history.get("status")
    messages = status.get("messages") if isinstance(status, dict) else None
    found = [m[1] for m in messages or () if isinstance(m, list) and len(m) > 1 and m[0] == "execution_error"]
    return found[0] if found else None


def _preview(outputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The file that stands for a job: the first that was saved, or else the first that was only shown."""
    first = None
    for node_id, output in outputs.items():
        for kind, items in output.items() if isinstance(output, dict) else ():
            for item in items if isinstance(items, list) else ():
                if not isinstance(item, dict) or not isinstance(item.get("filename"), str):
                    continue
                if kind in _SHOWN or str(item.get("format")).startswith(("video/", "audio/")):
                    shown = {"mediaType": kind} | item | {"nodeId": node_id}
                    if item.get("type") == "output":
                        return shown
                    first = first or shown
    return first


def _created(line: JobLine) -> float:
    return line.created_s


def _duration(line: JobLine) -> float:
    return (line.ended_s or 0.0) - (line.started_s or line.ended_s or 0.0)


def _ms(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds * 1000)
