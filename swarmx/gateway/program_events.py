"""What is seen of a workflow that nobody declared: one closed union of events, and their bytes in the store."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from swarmx.core.errors import StoreError
from swarmx.core.records import StoredEvent

Why = Literal["final", "silence", "cancelled"]


class _Event(msgspec.Struct, frozen=True, kw_only=True, tag=True, tag_field="type", omit_defaults=True):
    at_s: float


class ProgramStarted(_Event, frozen=True, kw_only=True):
    """Its first call came; `source` is whose headers named it, `parent_id` the workflow that started it."""

    source: str
    parent_id: str | None = None


class SubagentSeen(_Event, frozen=True, kw_only=True):
    """Another workflow, of this id, calls this one its parent."""

    workflow_id: str


class CallSeen(_Event, frozen=True, kw_only=True):
    """A call came; it may ask for `tools_offered` different tools."""

    call_id: str
    role: str
    model: str
    prompt_tokens: int
    tools_offered: int = 0


class CallAnswered(_Event, frozen=True, kw_only=True):
    """The whole answer has gone to the client, and asks for these tools."""

    call_id: str
    tools: tuple[str, ...] = ()


class ToolGap(_Event, frozen=True, kw_only=True):
    """The results of the tools came back, `gap_s` after they were asked for."""

    tools: tuple[str, ...]
    gap_s: float


class ProgramEnded(_Event, frozen=True, kw_only=True):
    """No more calls; `lost` events before this one could not be kept."""

    why: Why
    lost: int = 0


ProgramEvent = ProgramStarted | SubagentSeen | CallSeen | CallAnswered | ToolGap | ProgramEnded

encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(ProgramEvent).decode


def program_events(stored: Iterable[StoredEvent]) -> list[ProgramEvent]:
    """The events of a stored program. Raises StoreError for what is none of them."""
    try:
        return [_decode(event.body) for event in stored]
    except msgspec.DecodeError as error:
        raise StoreError(
            f"a stored event of a program cannot be read: {error}; was it written by another version?"
        ) from error


def outline(events: Iterable[ProgramEvent]) -> dict[str, Any]:
    """Plain data: source, parent_id, subagents (ids), tools (with how often), gaps_s (of all together), ended_by."""
    shown: dict[str, Any] = {
        "source": None, "parent_id": None, "subagents": [], "tools": {}, "gaps_s": 0.0, "ended_by": None,
    }  # fmt: skip
    for event in events:
        match event:
            case ProgramStarted():
                shown |= {"source": event.source, "parent_id": event.parent_id}
            case SubagentSeen():
                shown["subagents"].append(event.workflow_id)
            case CallAnswered():
                for tool in event.tools:
                    shown["tools"][tool] = shown["tools"].get(tool, 0) + 1
            case ToolGap():
                shown["gaps_s"] += event.gap_s
            case ProgramEnded():
                shown["ended_by"] = event.why
            case CallSeen():
                pass  # the calls themselves are listed beside this
    return shown
