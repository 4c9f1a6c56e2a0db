"""The use of a tool as a call: what the scheduler sees of it, what its replica is sent, and what comes of it."""

from __future__ import annotations

from typing import Any, assert_never

import msgspec

from swarmx.core.errors import WorkflowError
from swarmx.core.failures import Cause, Failure
from swarmx.core.nouns import Call
from swarmx.core.prompt_key import prompt_key
from swarmx.core.prompts import PromptText
from swarmx.core.records import ModelRequest, WorkflowRecord
from swarmx.core.toolbox import ToolCall, ToolCause, ToolResult, ToolSpec
from swarmx.runtime.requests import new_id
from swarmx.workflows.limits import OUTPUT_CHARS
from swarmx.workflows.values import Json, checked
from swarmx.workflows.work import StartToolCall

_UNREAD = PromptText(text=b"", total_bytes=0, messages=0, tools=0, returns_tools=False)


def tool_request(record: WorkflowRecord, start: StartToolCall, spec: ToolSpec, *, priority: int) -> ModelRequest:
    """What the caller is asked for. The key is the same in every life of the server and for every attempt.

    The replica is told whose the call is, by when it must have ended, and nothing else.
    """
    key = f"{record.workflow_id}/{start.path}"
    due = [at_s for at_s in (record.deadline_at_s, start.timeout_at_s) if at_s is not None]
    call = ToolCall(
        tool=start.tool,
        arguments=start.arguments,
        key=key,
        request_id=f"{key}/{start.attempt}",
        tenant=record.tenant,
        deadline_at_s=min(due, default=None),
    )
    return ModelRequest(
        tenant=record.tenant,
        workflow_id=record.workflow_id,
        workflow_kind=record.kind,
        node=start.path,
        role=start.tool,
        kind="tool",
        model=spec.pool,
        body=msgspec.to_builtins(call),
        deadline_at_s=record.deadline_at_s,
        priority=priority,
        request_id=call.request_id,
        idempotency_key=key,
        owned=True,
        timeout_s=spec.timeout_s,
        once=not start.idempotent,
    )


def tool_call_of(request: ModelRequest) -> tuple[Call, PromptText]:
    """The use of a tool as a call, whose work are seconds, and a prompt that says nothing.

    Its arguments are data, often a secret, and say little about how long a tool takes: they are counted, not read.
    """
    size = len(msgspec.json.encode(request.body["arguments"]))
    call = Call(
        call_id=new_id("call"),
        tenant=request.tenant,
        kind="tool",
        model=request.model,
        role=request.role,
        workflow_id=request.workflow_id,
        workflow_kind=request.workflow_kind,
        node=request.node,
        prompt_key=prompt_key("", request.role),
        prompt_bytes=size,
        prompt_tokens=1,
        work_limit=_LONGEST_S if request.timeout_s is None else request.timeout_s,
        deadline_at_s=request.deadline_at_s,
        priority=request.priority,
        once=request.once,
    )
    return call, _UNREAD


_LONGEST_S = 3600.0


def outcome_of(answer: dict[str, Any]) -> tuple[Json, Failure | None]:
    """The output of a tool, or why there is none, from the answer of its replica."""
    result = msgspec.convert(answer, ToolResult)
    if not result.cause:
        try:
            return checked(result.output, limit=OUTPUT_CHARS), None
        except WorkflowError as error:
            return None, Failure(cause="tool", error=f"its output cannot be used: {error}", begun=True)
    return None, Failure(cause=_cause(result.cause), error=result.error, begun=result.cause != "refused")


def _cause(cause: ToolCause) -> Cause:
    match cause:
        case "timeout":
            return "timeout"
        case "unavailable":
            return "replica"
        case "refused":
            return "rejected"
        case "tool" | "limit" | "":
            return "tool"
        case _:
            assert_never(cause)
