"""One piece of a workflow's work: has the call of a node answered, and says what that means to the node."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import msgspec

from swarmx.core.errors import SwarmXError
from swarmx.core.failures import Failure
from swarmx.core.ports import Caller
from swarmx.core.records import Blob, CallRecord, ModelRequest, WorkflowRecord
from swarmx.core.toolbox import ToolSpec
from swarmx.runtime.node_spending import spent_by
from swarmx.runtime.requests import BadRequest
from swarmx.runtime.tool_calls import outcome_of, tool_request
from swarmx.workflows.answers import Unusable
from swarmx.workflows.events import Spent
from swarmx.workflows.plan import read_answer
from swarmx.workflows.spending import NO_PRICES, Prices
from swarmx.workflows.state import Run
from swarmx.workflows.work import NO_TOOLS, Start, StartModelCall, StartToolCall

log = logging.getLogger(__name__)

_MAX_ERROR_CHARS = 2000


class UnknownTool(Exception):
    """The catalogue has lost a tool between a decision and its call."""


class Answered(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one attempt at a node: its output, or what went wrong; and what is to be kept with either."""

    path: str
    attempt: int
    output: Any = None
    failure: Failure | None = None
    call_id: str | None = None
    record: CallRecord | None = None
    blobs: tuple[Blob, ...] = ()
    spent: Spent | None = None


async def work_on(
    caller: Caller,
    record: WorkflowRecord,
    run: Run,
    call: Start,
    tools: Mapping[str, ToolSpec] = NO_TOOLS,
    prices: Prices = NO_PRICES,
) -> Answered:
    """Have the call answered, by a model or by one of the `tools`. Whatever goes wrong is a value; only a cancellation
    is not."""
    call_id: str | None = None
    kept: CallRecord | None = None
    spent: Spent | None = None
    try:
        request = _request(record, run, call, tools)
        result = await caller.complete(request)
        call_id, kept, spent = result.call_id, result.record, spent_by(call, result, prices)
        if result.answer is None:
            failure = result.failure or Failure(cause="replica", error="refused")
        else:
            output, blobs, trouble = _read(run, call, result.answer)
            if trouble is None:
                return Answered(
                    path=call.path,
                    attempt=call.attempt,
                    output=output,
                    call_id=call_id,
                    record=kept,
                    blobs=blobs,
                    spent=spent,
                )
            failure = trouble
    except (BadRequest, UnknownTool) as error:
        failure = Failure(cause="rejected", error=str(error))
    except SwarmXError as error:
        failure = Failure(cause="replica", error=str(error))
    except Exception as error:
        log.exception("the call of %s in workflow %s ran into a defect", call.path, record.workflow_id)
        failure = Failure(cause="defect", error=f"{type(error).__name__}: {error}")
    failure = msgspec.structs.replace(failure, error=plain(failure.error))
    return Answered(path=call.path, attempt=call.attempt, failure=failure, call_id=call_id, record=kept, spent=spent)


def interrupted(call: Start) -> Answered | None:
    """What became of a call that was out when its process died; None where it may be made again."""
    if isinstance(call, StartModelCall) or call.idempotent:
        return None
    error = f"the server stopped while {call.tool} was called, which must not be called twice"
    failure = Failure(cause="interrupted", error=error, begun=True)
    return Answered(path=call.path, attempt=call.attempt, failure=failure)


def _request(record: WorkflowRecord, run: Run, call: Start, tools: Mapping[str, ToolSpec]) -> ModelRequest:
    if isinstance(call, StartModelCall):
        return request_of(record, run, call)
    if call.tool not in tools:
        raise UnknownTool(f"there is no tool {call.tool!r} any more")
    return tool_request(record, call, tools[call.tool], priority=run.graph.spec.priority)


def _read(run: Run, call: Start, answer: dict[str, Any]) -> tuple[Any, tuple[Blob, ...], Failure | None]:
    """The output with its blobs, or why there is none."""
    if isinstance(call, StartToolCall):
        output, failure = outcome_of(answer)
        return output, (), failure
    read = read_answer(run, call.path, answer)
    if isinstance(read, Unusable):
        return None, (), Failure(cause="invalid", error=read.error)
    return read.output, read.blobs, None


def request_of(record: WorkflowRecord, run: Run, call: StartModelCall) -> ModelRequest:
    """The call as the caller takes it. Its key is the same in every life of the server and for every attempt."""
    key = f"{record.workflow_id}/{call.path}"
    return ModelRequest(
        tenant=record.tenant,
        workflow_id=record.workflow_id,
        workflow_kind=record.kind,
        node=call.path,
        role=call.role,
        kind=call.kind,
        model=call.model,
        body=call.body,
        deadline_at_s=record.deadline_at_s,
        priority=run.graph.spec.priority,
        request_id=f"{key}/{call.attempt}",
        idempotency_key=key,
        owned=True,
    )


def plain(text: str) -> str:
    """An error text that can be stored and shown: valid Unicode of bounded length, which commands no terminal.

    Programs of strangers write them.
    """
    shown = text[:_MAX_ERROR_CHARS].encode("utf-8", "replace").decode()
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in shown)
