"""The REST API: workflows for applications, replicas and policies for operators, and the why of every call."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from swarmx.agents.counterfactual import explain_instead, instead
from swarmx.agents.explain import explain
from swarmx.agents.policies import POLICIES, describe, make_policy, parameters_of
from swarmx.core.control import ToolCall
from swarmx.core.errors import NotFound, Refused, WorkflowError
from swarmx.core.messages import ServiceCurvePublished
from swarmx.core.nouns import Decision
from swarmx.core.records import CallRecord, WorkflowRecord, WorkflowState
from swarmx.gateway.context import Context
from swarmx.gateway.keys import Key
from swarmx.workflows.nodes import WorkflowSpec
from swarmx.workflows.source import read_source
from swarmx.workflows.spec import parse_workflow


class RoutingPolicy(BaseModel):
    """The policy to route by."""

    model_config = ConfigDict(extra="forbid")

    policy: str = Field(description="Name of a policy; GET /api/v1/policies lists them.")
    parameters: dict[str, FiniteFloat] = Field({}, description="Its parameters; those left out take their defaults.")


def _authenticated(request: Request) -> Key:
    context: Context = request.app.state.context
    return context.keys.check(request.headers.get("authorization"))


Caller = Annotated[Key, Depends(_authenticated)]


def router(context: Context) -> APIRouter:
    """Routes under /api/v1."""
    routes = APIRouter(prefix="/api/v1")

    @routes.post("/workflows", status_code=202, tags=["workflows"], summary="Submit a workflow, YAML or JSON")
    async def submit(request: Request, key: Caller) -> Response:
        key.require("submit")
        spec, inputs = await asyncio.to_thread(_submission, await request.body())
        workflow_id = await context.workflows.submit(spec, inputs, key.tenant)
        location = f"/api/v1/workflows/{workflow_id}"
        return JSONResponse({"workflow_id": workflow_id, "state": "running"}, 202, {"location": location})

    @routes.get("/workflows", tags=["workflows"], summary="Workflows, newest first")
    async def list_workflows(
        key: Caller,
        state: WorkflowState | None = None,
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
        cursor: str | None = None,
    ) -> Response:
        key.require("read")
        page = await context.store.workflows(tenant=key.sees, state=state, limit=limit, cursor=cursor)
        rows = [_summary(record) for record in page.workflows]
        return JSONResponse({"workflows": rows, "next_cursor": page.next_cursor})

    @routes.get("/workflows/{workflow_id}", tags=["workflows"], summary="One workflow: nodes, calls, outputs")
    async def show(workflow_id: str, key: Caller) -> Response:
        key.require("read")
        await context.flush()
        row = await context.workflows.describe(workflow_id, key.sees)
        calls = [_call(call) for call in await context.store.calls(workflow_id, tenant=key.sees)]
        remaining = context.remaining(workflow_id) if row["state"] == "running" else None
        program = await context.transparent.outline(workflow_id) if row["mode"] == "transparent" else None
        return JSONResponse({**row, "calls": calls, "remaining": msgspec.to_builtins(remaining), "program": program})

    @routes.post("/workflows/{workflow_id}/cancel", status_code=202, tags=["workflows"], summary="Cancel a workflow")
    async def cancel(workflow_id: str, key: Caller) -> Response:
        key.require("submit")
        record = await context.transparent.cancel(workflow_id, key.sees)
        return JSONResponse(_summary(record or await context.workflows.cancel(workflow_id, key.sees)), 202)

    @routes.get("/calls/{call_id}", tags=["calls"], summary="What became of a call")
    async def call(call_id: str, key: Caller) -> Response:
        key.require("read")
        await context.flush()
        record = await context.store.call(call_id, tenant=key.sees)
        if record is None:
            raise NotFound(f"no call {call_id!r} has ended here; ids are in the header x-swarmx-call-id.")
        return JSONResponse(_call(record))

    @routes.get("/calls/{call_id}/why", tags=["calls"], summary="Why a call went where it went")
    async def why(call_id: str, key: Caller, policy: str | None = None) -> Response:
        key.require("read")
        if policy is not None:
            make_policy(policy)
        await context.flush()
        decisions = await context.store.decisions(call_id, tenant=key.sees)
        if not decisions:
            raise NotFound(f"no decision about a call {call_id!r} is known here.")
        rows = [_why(decision, policy) for decision in decisions]
        return JSONResponse({"call_id": call_id, "decisions": rows})

    @routes.get("/replicas", tags=["operators"], summary="Replicas, their state and load")
    async def replicas(key: Caller) -> Response:
        key.require("read_all")
        return JSONResponse({"replicas": msgspec.to_builtins(context.book.statuses())})

    @routes.get("/replicas/{replica_id}/service_curve", tags=["operators"], summary="What a call would take there now")
    async def service_curve(replica_id: str, key: Caller) -> Response:
        key.require("read_all")
        return JSONResponse(_curve(context.book.service_curve(replica_id), context.clock.now_s()))

    @routes.get("/policies", tags=["operators"], summary="Routing policies and the one in force")
    async def policies(key: Caller) -> Response:
        key.require("read")
        rows = [{"name": n, "description": describe(n), "parameters": parameters_of(n)} for n in POLICIES]
        return JSONResponse({"active": msgspec.to_builtins(context.routing()), "policies": rows})

    @routes.put("/policies/routing", tags=["operators"], summary="Route by another policy from now on")
    async def set_policy(wanted: RoutingPolicy, key: Caller) -> Response:
        key.require("read_all")  # the desk asks for more, and notes in the audit log who lacks it
        make_policy(wanted.policy, wanted.parameters)
        call = ToolCall(tool="set_routing_policy", arguments=wanted.model_dump())
        try:
            await context.desk.order(call, actor=key.actor, via="rest")
        except Refused as refused:
            if refused.rule != "no_effect":  # it is in force already: a PUT may be repeated
                raise
        return JSONResponse(msgspec.to_builtins(context.routing()))

    @routes.get("/blobs/{sha256}", tags=["workflows"], summary="An image that a workflow made")
    async def blob(sha256: str, key: Caller) -> Response:
        key.require("read")
        found = await context.store.blob(sha256, tenant=key.sees)
        if found is None:
            raise NotFound(f"no blob {sha256!r} is kept here.")
        media_type, data = found
        return Response(
            data, media_type=media_type, headers={"etag": f'"{sha256}"', "x-content-type-options": "nosniff"}
        )

    return routes


def health(context: Context) -> APIRouter:
    """Liveness and readiness, open to all; metrics, for those who may read."""
    routes = APIRouter(tags=["health"])

    @routes.get("/healthz", summary="The process is alive")
    async def healthz() -> dict[Literal["status"], str]:
        return {"status": "ok"}

    @routes.get("/readyz", summary="At least one replica takes calls")
    async def readyz() -> Response:
        ready = context.book.ready()
        return JSONResponse({"ready_replicas": ready}, 200 if ready else 503)

    @routes.get("/metrics", summary="Prometheus metrics")
    async def metrics(request: Request) -> Response:
        context.keys.check(request.headers.get("authorization")).require("read_all")
        return Response(context.telemetry.text(), media_type="text/plain; version=0.0.4")

    return routes


class _Envelope(msgspec.Struct, forbid_unknown_fields=True):
    workflow: msgspec.Raw
    inputs: dict[str, Any] = {}


def _submission(body: bytes) -> tuple[WorkflowSpec, dict[str, Any]]:
    """A definition by itself, or `{"workflow": definition or its YAML, "inputs": {...}}`. Raises WorkflowError.

    Of a JSON envelope only the definition is held to the size of a definition; its inputs may be larger.
    """
    try:
        envelope = msgspec.json.decode(body, type=_Envelope)
        text = bytes(envelope.workflow)
        return parse_workflow(msgspec.json.decode(text, type=str) if text.startswith(b'"') else text), envelope.inputs
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass  # not an envelope, or a bad one, which is told below
    data = read_source(body)
    if "workflow" not in data:
        return parse_workflow(data), {}
    inputs = data.get("inputs", {})
    unknown = sorted(set(data) - {"workflow", "inputs"})
    if unknown or not isinstance(inputs, dict):
        raise WorkflowError(
            f"a submission has the fields workflow and inputs (a mapping), not {', '.join(unknown) or 'inputs'}."
        )
    return parse_workflow(data["workflow"]), inputs


def _summary(record: WorkflowRecord) -> dict[str, Any]:
    row: dict[str, Any] = msgspec.to_builtins(record)
    del row["owner"]
    row["outcome"] = msgspec.json.decode(record.outcome) if record.outcome is not None else None
    return row


def _why(decision: Decision, policy: str | None) -> dict[str, Any]:
    """The decision, and what the policy would have done instead."""
    row = {"explanation": explain(decision), "decision": msgspec.to_builtins(decision)}
    if policy is not None:
        other = instead(decision, policy)
        row["instead"] = {**msgspec.to_builtins(other), "explanation": explain_instead(decision, other)}
    return row


def _curve(curve: ServiceCurvePublished, now_s: float) -> dict[str, Any]:
    """The curve with its numbers nested: completion_s [work][uncached][levels], ttft_s [uncached][levels]."""
    ttft_s = _rows(curve.ttft_s, len(curve.levels))
    completion_s = _rows(_rows(curve.completion_s, len(curve.levels)), len(curve.uncached))
    row: dict[str, Any] = msgspec.to_builtins(curve)
    return row | {"age_s": now_s - curve.measured_at_s, "completion_s": completion_s, "ttft_s": ttft_s}


def _rows(values: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [values[i : i + size] for i in range(0, len(values), size)]


def _call(record: CallRecord) -> dict[str, Any]:
    """All of the record but the encoding of its prompt, which is for predictors only."""
    row: dict[str, Any] = msgspec.to_builtins(record)
    del row["encoding"]
    return row
