"""The REST API of workflows: submit, look, wait, follow, and whatever changes their course."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Annotated, Any
from uuid import uuid4

import msgspec
from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from swarmx.core.errors import NotFound, Refused
from swarmx.core.records import TERMINAL, Accepted, WorkflowRecord, WorkflowState
from swarmx.gateway import shown
from swarmx.gateway.context import Context
from swarmx.gateway.event_feed import EventFeed, event_row, resumed_after
from swarmx.gateway.idempotency import REPLAYED
from swarmx.gateway.keys import Key
from swarmx.gateway.openapi import SERVER_EVENT, answers, header, ref, refuses
from swarmx.gateway.rest import Caller, call_row, json_answer
from swarmx.gateway.submissions import submission
from swarmx.gateway.tags import LARGEST_SEQ, tag_of, unchanged
from swarmx.gateway.waiting import APPLIED, LONGEST_S, ended, wait_of
from swarmx.runtime.requests import BadRequest
from swarmx.workflows.nodes import WorkflowSpec

_ID = Annotated[str, Path(min_length=1, max_length=300)]
_KEY = header(
    "Idempotency-Key",
    "The request is carried out once, however often it comes with this key within 24 hours.",
    maxLength=300,
)
_WAIT = header("Prefer", f"`wait=N`: answer when the workflow has ended, after N seconds at most ({LONGEST_S}).")
_PLACE = {"Location": "Where the workflow is shown."}
_ONCE = {**_PLACE, "Idempotency-Replayed": "`true`: the answer to an earlier request with this key."}
_WAITED = {"Preference-Applied": "How long the answer was waited for, at most."}
_ACCEPTED = answers(
    shown.AcceptedWorkflow,
    "It is on disk, and runs.",
    status=202,
    headers=_ONCE | _WAITED,
    example={"workflow_id": "wf-0a1b", "state": "running"},
) | answers(shown.Workflow, "It has ended while you preferred to wait.", headers=_WAITED)
_CHANGED = answers(
    shown.WorkflowSummary, "On disk; `state` says whether it has ended already.", status=202, headers=_ONCE
)
_DEFINITION = {
    "name": "one",
    "inputs": {"topic": None},
    "nodes": {"ask": {"kind": "llm", "model": "qwen3-8b", "prompt": "A fact about {{ inputs.topic }}."}},
}
_SUBMISSION = {
    "oneOf": [
        ref(WorkflowSpec),
        {
            "type": "object",
            "required": ["workflow"],
            "additionalProperties": False,
            "properties": {
                "workflow": {"anyOf": [ref(WorkflowSpec), {"type": "string", "description": "YAML or JSON text"}]},
                "inputs": {"type": "object"},
            },
        },
    ]
}


class ForkFrom(BaseModel):
    """Where a fork leaves the old workflow."""

    model_config = ConfigDict(extra="forbid")

    from_node: str = Field(max_length=1000, description="Path of the node to do anew, such as `each[1].ask`.")
    inputs: dict[str, Any] | None = Field(None, description="Inputs that replace those of the old workflow.")


def router(context: Context) -> APIRouter:
    """Routes under /api/v1/workflows."""
    routes = APIRouter(prefix="/api/v1/workflows", tags=["workflows"], default_response_class=Response)

    @routes.post(
        "",
        status_code=202,
        summary="Submit a workflow, YAML or JSON",
        responses=_ACCEPTED | refuses(409),
        openapi_extra={
            "parameters": [_KEY, _WAIT],
            "requestBody": {
                "required": True,
                "description": "A definition by itself, or with inputs.",
                "content": {
                    "application/json": {
                        "schema": _SUBMISSION,
                        "example": {"workflow": _DEFINITION, "inputs": {"topic": "lakes"}},
                    },
                    "application/yaml": {"schema": {"type": "string"}},
                },
            },
        },
    )
    async def submit(request: Request, key: Caller) -> Response:
        key.require("submit")
        body = await request.body()
        wait_s = wait_of(request)
        with context.idempotency.of(request, body, key) as idempotency:
            spec, inputs = await asyncio.to_thread(submission, body)
            accepted = await context.workflows.accept(spec, inputs, key.tenant, idempotency=idempotency)
        return await _begun(context, accepted, key, wait_s)

    @routes.get(
        "",
        summary="Workflows, newest first",
        responses=answers(shown.WorkflowPageShown, "A page.") | refuses(404),
    )
    async def list_workflows(
        key: Caller,
        state: WorkflowState | None = None,
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
        cursor: Annotated[str | None, Query(max_length=500, description="`next_cursor` of the page before.")] = None,
    ) -> Response:
        key.require("read")
        page = await context.store.workflows(tenant=key.sees, state=state, limit=limit, cursor=cursor)
        rows = [_summary(record) for record in page.workflows]
        more = page.next_cursor is not None
        return json_answer({"workflows": rows, "has_more": more, "next_cursor": page.next_cursor})

    @routes.get(
        "/{workflow_id}",
        summary="One workflow: nodes, calls, outputs",
        responses=answers(
            shown.Workflow, "The workflow as it is now.", headers={"ETag": "Changes with its events.", **_WAITED}
        )
        | {304: {"description": "As `If-None-Match` says, nothing has happened since."}},
        openapi_extra={"parameters": [_WAIT, header("If-None-Match", "The `ETag` of what you have.")]},
    )
    async def show(workflow_id: _ID, request: Request, key: Caller) -> Response:
        key.require("read")
        applied: dict[str, str] = {}
        if (wait_s := wait_of(request)) is not None:
            await ended(context.store, context.changes, workflow_id, key.sees, within_s=wait_s)
            applied = {APPLIED: f"wait={wait_s}"}
        await context.flush()
        record = await _record(context, workflow_id, key)
        program = await context.transparent.outline(workflow_id) if record.mode == "transparent" else None
        if program is not None:
            record = await _record(context, workflow_id, key)  # to outline it writes down what was seen
        tag = tag_of(record)
        if unchanged(request, tag):
            return Response(status_code=304, headers={"etag": tag, **applied})
        return json_answer(await _whole(context, workflow_id, key, program), headers={"etag": tag, **applied})

    @routes.get(
        "/{workflow_id}/events",
        summary="What happened to a workflow, and what happens",
        responses={
            200: {
                "description": "Server-sent events until the workflow has ended: `id` is the number, `event` the type, "
                "`data` an event as in the JSON page, without what is large. With `Accept: application/json` a page.",
                "content": {
                    "text/event-stream": {"schema": SERVER_EVENT},
                    "application/json": {"schema": ref(shown.EventPage)},
                },
            }
        },
        openapi_extra={"parameters": [header("Last-Event-ID", "Goes on behind this event; weighs more than `after`.")]},
    )
    async def events(
        workflow_id: _ID,
        request: Request,
        key: Caller,
        after: Annotated[int, Query(ge=0, le=LARGEST_SEQ, description="Only events behind this one.")] = 0,
        limit: Annotated[int, Query(ge=1, le=1000, description="Of a JSON page.")] = 100,
    ) -> Response:
        key.require("read")
        after = resumed_after(request, after)
        record = await _record(context, workflow_id, key)
        if after > record.seq:
            raise BadRequest(
                f"the workflow {workflow_id!r} has {record.seq} events, and none behind number {after}.", param="after"
            )
        if "application/json" in request.headers.get("accept", ""):
            found = await context.store.events(workflow_id, after=after, limit=limit)
            last = found[-1].seq if found else after
            rows = [event_row(event) for event in found]
            return json_answer({"events": rows, "has_more": last < record.seq, "next_after": last})
        authorization = request.headers.get("authorization")
        return EventFeed(
            context.store,
            context.changes,
            workflow_id,
            tenant=key.sees,
            after=after,
            here=partial(context.workflows.runs, workflow_id),
            may_go_on=lambda: context.keys.check(authorization).require("read"),
        )

    @routes.post(
        "/{workflow_id}/cancel",
        status_code=202,
        summary="Cancel a workflow, down to the engines that work on it",
        responses=_CHANGED | refuses(409),
        openapi_extra={"parameters": [_KEY, _WAIT]},
    )
    async def cancel(workflow_id: _ID, request: Request, key: Caller) -> Response:
        async def work() -> None:
            if await context.transparent.cancel(workflow_id, key.sees) is None:
                await context.workflows.cancel(workflow_id, key.sees, wait=False)

        return await _ended_by(context, workflow_id, request, key, work)

    @routes.post(
        "/{workflow_id}/kill",
        status_code=202,
        summary="End a workflow at once, whatever its calls do",
        responses=_CHANGED | refuses(409),
        openapi_extra={"parameters": [_KEY]},
    )
    async def kill(workflow_id: _ID, request: Request, key: Caller) -> Response:
        return await _ended_by(
            context, workflow_id, request, key, lambda: context.workflows.kill(workflow_id, key.sees)
        )

    @routes.post(
        "/{workflow_id}/signals/{name}",
        status_code=202,
        summary="Send a workflow a signal that its definition declares",
        responses=answers(shown.SignalTaken, "On disk.", status=202, headers=_ONCE) | refuses(409),
        openapi_extra={
            "parameters": [_KEY],
            "requestBody": {
                "required": False,
                "description": "The value, any JSON; null without a body.",
                "content": {"application/json": {"schema": {}, "example": {"approved": True}}},
            },
        },
    )
    async def signal(
        workflow_id: _ID, name: Annotated[str, Path(max_length=64)], request: Request, key: Caller
    ) -> Response:
        key.require("submit")
        body = await request.body()
        value = _json_value(body)
        with context.idempotency.of(request, body, key) as idempotency:
            dedup = f"key:{key.tenant}:{idempotency.key}" if idempotency is not None else f"post:{uuid4().hex}"
            new = True

            async def work() -> None:
                nonlocal new
                new = await context.workflows.signal(workflow_id, name, value, dedup=dedup, tenant=key.sees)

            repeated = await context.idempotency.once(idempotency, key, workflow_id, work) or not new
        taken = {"workflow_id": workflow_id, "signal": name, "repeated": repeated}
        return json_answer(taken, 202, _location(workflow_id, replayed=repeated))

    @routes.post(
        "/{workflow_id}/fork",
        status_code=202,
        summary="Begin a new workflow that shares the beginning of this one, up to a node",
        responses=_ACCEPTED | refuses(409),
        openapi_extra={"parameters": [_KEY, _WAIT]},
    )
    async def fork(workflow_id: _ID, wanted: ForkFrom, request: Request, key: Caller) -> Response:
        key.require("submit")
        return await _forked(context, workflow_id, wanted.from_node, wanted.inputs, request, key)

    @routes.post(
        "/{workflow_id}/retry",
        status_code=202,
        summary="Begin a new workflow that shares all of a failed one but what failed",
        responses=_ACCEPTED | refuses(409),
        openapi_extra={"parameters": [_KEY, _WAIT]},
    )
    async def retry(workflow_id: _ID, request: Request, key: Caller) -> Response:
        key.require("submit")
        path = _failed_node(await _record(context, workflow_id, key))
        return await _forked(context, workflow_id, path, None, request, key)

    return routes


async def _record(context: Context, workflow_id: str, key: Key) -> WorkflowRecord:
    """The workflow, if the key may see it. Raises NotFound."""
    record = await context.store.workflow(workflow_id, tenant=key.sees)
    if record is None:
        raise NotFound(f"there is no workflow {workflow_id!r}; `swarmx workflows` lists those that there are")
    return record


async def _whole(context: Context, workflow_id: str, key: Key, program: dict[str, Any] | None) -> dict[str, Any]:
    row = await context.workflows.describe(workflow_id, key.sees)
    calls = [call_row(call) for call in await context.store.calls(workflow_id, tenant=key.sees)]
    remaining = context.remaining(workflow_id) if row["state"] == "running" else None
    return {**row, "calls": calls, "remaining": msgspec.to_builtins(remaining), "program": program}


async def _begun(context: Context, accepted: Accepted, key: Key, wait_s: int | None) -> Response:
    """The answer to whoever began a workflow: where it is, or all of it once it has ended in time."""
    workflow_id = accepted.workflow_id
    headers = _location(workflow_id, replayed=accepted.replayed)
    if wait_s is not None:
        headers[APPLIED] = f"wait={wait_s}"
        record = await ended(context.store, context.changes, workflow_id, None, within_s=wait_s)
        if record.state in TERMINAL:
            await context.flush()
            return json_answer(await _whole(context, workflow_id, key, None), headers=headers)
    return json_answer({"workflow_id": workflow_id, "state": "running"}, 202, headers)


async def _ended_by(
    context: Context, workflow_id: str, request: Request, key: Key, work: Callable[[], Awaitable[object]]
) -> Response:
    """The answer to whoever wants a workflow to end."""
    key.require("submit")
    wait_s = wait_of(request)
    with context.idempotency.of(request, await request.body(), key) as idempotency:
        replayed = await context.idempotency.once(idempotency, key, workflow_id, work)
    headers = _location(workflow_id, replayed=replayed)
    record = await _record(context, workflow_id, key)
    if wait_s is not None:
        headers[APPLIED] = f"wait={wait_s}"
        record = await ended(context.store, context.changes, workflow_id, key.sees, within_s=wait_s)
    if record.state == "running":  # what was asked for is on disk, though its owner has not taken it yet
        record = msgspec.structs.replace(record, state="cancelling")
    return json_answer(_summary(record), 202, headers)


async def _forked(
    context: Context, workflow_id: str, path: str, inputs: dict[str, Any] | None, request: Request, key: Key
) -> Response:
    wait_s = wait_of(request)
    with context.idempotency.of(request, await request.body(), key) as idempotency:
        accepted = await context.workflows.fork(workflow_id, path, key.sees, inputs=inputs, idempotency=idempotency)
    return await _begun(context, accepted, key, wait_s)


def _failed_node(record: WorkflowRecord) -> str:
    """The node that a workflow failed at. Raises Refused for one that did not, or at none."""
    if record.state != "failed":
        raise Refused(
            f"the workflow {record.workflow_id} is {record.state}; one that has failed can be retried, "
            "and any can be forked at one of its nodes",
            rule="state",
        )
    outcome = msgspec.json.decode(record.outcome) if record.outcome is not None else {}
    if outcome.get("node") is None:
        raise Refused(
            f"the workflow {record.workflow_id} failed at no node ({outcome.get('error')}); "
            "fork it at a node of your choice",
            rule="state",
        )
    path: str = outcome["node"]
    return path


def _json_value(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body) if body.strip() else None
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise BadRequest(f"the value of a signal is JSON, and this is none: {error}.") from None


def _location(workflow_id: str, *, replayed: bool) -> dict[str, str]:
    headers = {"location": f"/api/v1/workflows/{workflow_id}"}
    return headers | {REPLAYED: "true"} if replayed else headers


def _summary(record: WorkflowRecord) -> dict[str, Any]:
    row: dict[str, Any] = msgspec.to_builtins(record)
    del row["owner"]
    row["outcome"] = msgspec.json.decode(record.outcome) if record.outcome is not None else None
    return row
