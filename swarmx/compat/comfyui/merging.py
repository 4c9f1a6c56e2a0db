"""What the client of a job that runs in parts is told: one job's events, and one entry of history. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from swarmx.compat.comfyui.drafts import is_ours
from swarmx.compat.comfyui.history import messages_of
from swarmx.compat.comfyui.jobs import Event, Job, Outcome, State

_FURTHER = {"pending": 0, "running": 1, "error": 2, "finished": 3}


@dataclass(slots=True)
class MergedEvents:
    """Makes one job's events of those of its parts: a node that several parts run is told of by the first that comes
    to it, and the job begins once. `prompt_id` is the job's."""

    prompt_id: str
    _begun: bool = False
    _teller: dict[str, int] = field(default_factory=dict)  # part by node
    _cached: set[str] = field(default_factory=set)
    _states: dict[int, Mapping[str, Any]] = field(default_factory=dict)

    def heard(self, part: int, kind: str, data: dict[str, Any]) -> Event | None:
        """What the client hears of an event of a part; None where that is nothing."""
        told = data | {"prompt_id": self.prompt_id}
        match kind:
            case "execution_start":
                first, self._begun = not self._begun, True
                return (kind, told) if first else None
            case "execution_cached":
                nodes = [node for node in data.get("nodes") or () if not is_ours(node) and node not in self._cached]
                first, self._cached = not self._cached and part == 0, self._cached.union(nodes)
                return (kind, told | {"nodes": nodes}) if nodes or first else None
            case "progress_state":
                states = data.get("nodes")
                self._states[part] = states if isinstance(states, dict) else {}
                return kind, told | {"nodes": self._union()}
            case _:
                node = data.get("display_node") or data.get("node")
                if not isinstance(node, str):
                    return kind, told
                if is_ours(node) or self._teller.setdefault(node, part) != part:
                    return None
                return kind, told

    def _union(self) -> dict[str, Any]:
        """The progress of every node, where it is furthest."""
        found: dict[str, Any] = {}
        for states in self._states.values():
            for node, state in states.items():
                if is_ours(node) or not isinstance(state, dict):
                    continue
                if node not in found or _how_far(state) > _how_far(found[node]):
                    found[node] = state | {"prompt_id": self.prompt_id}
        return found


def merged(job: Job, ends: Sequence[Outcome], *, cancelled: bool, facts: dict[str, Any]) -> Outcome:
    """What became of the job whose parts ended so. The first part that failed speaks for it."""
    failed = next((end for end in ends if end.state == "failed"), None)
    stopped = max((end for end in ends if end.state == "cancelled"), key=lambda end: bool(end.status), default=None)
    outputs: dict[str, Any] = {}
    meta: dict[str, Any] = {}
    for end in ends:
        outputs = {node: output for node, output in end.outputs.items() if not is_ours(node)} | outputs
        meta = {node: row for node, row in end.meta.items() if not is_ours(node)} | meta
    state: State = (
        "cancelled" if cancelled and stopped else "failed" if failed else "cancelled" if stopped else "completed"
    )
    speaker = (stopped if state == "cancelled" else failed) or ends[-1]
    status = speaker.status | {"messages": _messages(ends)} if state == "completed" else speaker.status
    status = _renamed(status, job.prompt_id)
    told = [(kind, data | {"prompt_id": job.prompt_id}) for kind, data in speaker.told]
    return Outcome(state=state, outputs=outputs, status=status, meta=meta, facts=facts, told=told)


def _messages(ends: Sequence[Outcome]) -> list[Any]:
    """The messages of parts that came to their end as those of one job: begun first, cached together, ended last."""
    rows = [row for end in ends for row in messages_of(end.status)]
    begun = sorted((row for row in rows if row[0] == "execution_start"), key=_time)[:1]
    nodes = dict.fromkeys(node for kind, data in rows if kind == "execution_cached" for node in data.get("nodes") or ())
    cached = [(kind, data | {"nodes": list(nodes)}) for kind, data in rows if kind == "execution_cached"][:1]
    ended = sorted((row for row in rows if row[0] == "execution_success"), key=_time)[-1:]
    return [list(row) for row in (*begun, *cached, *ended)]


def _renamed(status: dict[str, Any], prompt_id: str) -> dict[str, Any]:
    return status and status | {
        "messages": [[kind, data | {"prompt_id": prompt_id}] for kind, data in messages_of(status)]
    }


def _time(row: Any) -> float:
    found = row[1].get("timestamp")
    return float(found) if isinstance(found, int | float) else 0.0


def _how_far(state: Mapping[str, Any]) -> tuple[int, float]:
    value, most = state.get("value"), state.get("max")
    share = value / most if isinstance(value, int | float) and isinstance(most, int | float) and most else 0.0
    return _FURTHER.get(str(state.get("state")), 0), share
