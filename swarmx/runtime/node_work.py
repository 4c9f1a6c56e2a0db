"""One piece of a workflow's work: has the call of a node answered, and says what that means to the node."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from swarmx.core.errors import SwarmXError
from swarmx.core.failures import Failure
from swarmx.core.ports import Caller
from swarmx.core.records import Blob, CallRecord, ModelRequest, WorkflowRecord
from swarmx.runtime.requests import BadRequest
from swarmx.workflows.answers import Unusable
from swarmx.workflows.plan import StartModelCall, read_answer
from swarmx.workflows.state import Run

log = logging.getLogger(__name__)

_MAX_ERROR_CHARS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """What came of one attempt at a node: its output, or what went wrong; and what is to be kept with either."""

    path: str
    attempt: int
    output: Any = None
    failure: Failure | None = None
    call_id: str | None = None
    record: CallRecord | None = None
    blobs: tuple[Blob, ...] = ()


async def work_on(caller: Caller, record: WorkflowRecord, run: Run, call: StartModelCall) -> Answered:
    """Have the call answered. Whatever goes wrong is a value; only a cancellation is not."""
    request = request_of(record, run, call)
    call_id: str | None = None
    kept: CallRecord | None = None
    try:
        result = await caller.complete(request)
        call_id, kept = result.call_id, result.record
        if result.answer is None:
            failure = result.failure or Failure(cause="replica", error="refused")
        else:
            read = read_answer(run, call.path, result.answer)
            if not isinstance(read, Unusable):
                return Answered(
                    path=call.path,
                    attempt=call.attempt,
                    output=read.output,
                    call_id=call_id,
                    record=kept,
                    blobs=read.blobs,
                )
            failure = Failure(cause="invalid", error=read.error)
    except BadRequest as error:
        failure = Failure(cause="rejected", error=str(error))
    except SwarmXError as error:
        failure = Failure(cause="replica", error=str(error))
    except Exception as error:
        log.exception("the call of %s in workflow %s ran into a defect", call.path, record.workflow_id)
        failure = Failure(cause="defect", error=f"{type(error).__name__}: {error}")
    failure = Failure(cause=failure.cause, error=plain(failure.error), retry_after_s=failure.retry_after_s)
    return Answered(path=call.path, attempt=call.attempt, failure=failure, call_id=call_id, record=kept)


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
    """An error text that can be stored and shown: valid Unicode, of bounded length."""
    return text.encode("utf-8", "replace").decode()[:_MAX_ERROR_CHARS]
