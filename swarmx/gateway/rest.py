"""The REST API of calls and of the fleet: what became of a call and why, replicas, policies, blobs; and health."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Path, Query
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat
from starlette.requests import Request
from starlette.responses import Response

from swarmx.agents.counterfactual import explain_instead, instead
from swarmx.agents.explain import explain
from swarmx.agents.policies import POLICIES, check_policy, describe, parameters_of
from swarmx.core.control import Diff, PolicyStatus, ToolCall
from swarmx.core.errors import NotFound, Refused
from swarmx.core.messages import ServiceCurvePublished
from swarmx.core.nouns import Decision
from swarmx.core.records import CallRecord
from swarmx.gateway import shown
from swarmx.gateway.context import Context
from swarmx.gateway.keys import Key
from swarmx.gateway.openapi import answers, header, refuses
from swarmx.gateway.tags import check_match, tag_of_value, unchanged

IF_MATCH = header("If-Match", "The `ETag` of what you saw: 412 if it is not as it was.")
_TAG = {"ETag": "Stands for the active policy, for `If-Match`."}
_ID = Annotated[str, Path(min_length=1, max_length=300)]


class RoutingPolicy(BaseModel):
    """The policy to route by."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": {"policy": "round_robin"}})

    policy: str = Field(description="Name of a policy; GET /api/v1/policies lists them.")
    parameters: dict[str, FiniteFloat] = Field({}, description="Its parameters; those left out take their defaults.")


def _authenticated(request: Request) -> Key:
    context: Context = request.app.state.context
    return context.keys.check(request.headers.get("authorization"))


Caller = Annotated[Key, Depends(_authenticated)]


def json_answer(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """The value as JSON; it may have structs in it."""
    return Response(msgspec.json.encode(value), status, headers, media_type="application/json")


def router(context: Context) -> APIRouter:
    """Routes under /api/v1."""
    routes = APIRouter(prefix="/api/v1", default_response_class=Response)

    @routes.get(
        "/calls/{call_id}",
        tags=["calls"],
        summary="What became of a call",
        responses=answers(shown.Call, "Its record, once it has ended."),
    )
    async def call(call_id: _ID, key: Caller) -> Response:
        key.require("read")
        await context.flush()
        record = await context.store.call(call_id, tenant=key.sees)
        if record is None:
            raise NotFound(f"no call {call_id!r} has ended here; ids are in the header x-swarmx-call-id.")
        return json_answer(call_row(record))

    @routes.get(
        "/calls/{call_id}/why",
        tags=["calls"],
        summary="Why a call went where it went",
        responses=answers(shown.Why, "Its decisions, explained."),
    )
    async def why(
        call_id: _ID,
        key: Caller,
        policy: Annotated[
            str | None, Query(max_length=100, description="Also what this policy would have done.")
        ] = None,
    ) -> Response:
        key.require("read")
        if policy is not None:
            check_policy(policy)
        await context.flush()
        decisions = await context.store.decisions(call_id, tenant=key.sees)
        if not decisions:
            raise NotFound(f"no decision about a call {call_id!r} is known here.")
        rows = [_why(decision, policy) for decision in decisions]
        return json_answer({"call_id": call_id, "decisions": rows})

    @routes.get(
        "/replicas",
        tags=["operators"],
        summary="Replicas, their state and load",
        responses=answers(shown.ReplicaList, "All of them."),
    )
    async def replicas(key: Caller) -> Response:
        key.require("read_all")
        return json_answer({"replicas": context.book.statuses()})

    @routes.get(
        "/replicas/{replica_id}/service_curve",
        tags=["operators"],
        summary="What a call would take there now",
        responses=answers(shown.ServiceCurve, "Quantiles of seconds."),
    )
    async def service_curve(replica_id: _ID, key: Caller) -> Response:
        key.require("read_all")
        return json_answer(_curve(context.book.service_curve(replica_id), context.clock.now_s()))

    @routes.get(
        "/policies",
        tags=["operators"],
        summary="Routing policies and the one in force",
        responses=answers(shown.PolicyList, "All of them.", headers=_TAG)
        | {304: {"description": "The active one is still that of `If-None-Match`."}},
        openapi_extra={"parameters": [header("If-None-Match", "The `ETag` of what you have.")]},
    )
    async def policies(request: Request, key: Caller) -> Response:
        key.require("read")
        active = context.routing()
        tag = tag_of_value(active)
        if unchanged(request, tag):
            return Response(status_code=304, headers={"etag": tag})
        rows = [{"name": n, "description": describe(n), "parameters": parameters_of(n)} for n in POLICIES]
        return json_answer({"active": active, "policies": rows}, headers={"etag": tag})

    @routes.put(
        "/policies/routing",
        tags=["operators"],
        summary="Route by another policy from now on",
        responses=answers(PolicyStatus, "In force.", headers=_TAG) | refuses(409, 412),
        openapi_extra={"parameters": [IF_MATCH]},
    )
    async def set_policy(wanted: RoutingPolicy, request: Request, key: Caller) -> Response:
        key.require("read_all")  # the desk asks for more, and notes in the audit log who lacks it
        check_policy(wanted.policy, wanted.parameters)
        call = ToolCall(tool="set_routing_policy", arguments=wanted.model_dump())
        try:
            seen: Diff | None = None
            if "if-match" in request.headers:
                _, seen = await context.desk.dry_run(call, actor=key.actor)
                check_match(request, tag_of_value(context.routing()), "the routing policy")
            await context.desk.order(call, actor=key.actor, via="rest", seen=seen)
        except Refused as refused:
            if refused.rule != "no_effect":  # it is in force already: a PUT may be repeated
                raise
        return json_answer(context.routing(), headers={"etag": tag_of_value(context.routing())})

    @routes.get(
        "/blobs/{sha256}",
        tags=["workflows"],
        summary="An image that a workflow made",
        responses=answers(None, "Its bytes.", media_type="image/png", headers={"ETag": "Its hash."})
        | {304: {"description": "You have it already."}},
        openapi_extra={"parameters": [header("If-None-Match", "The `ETag` of what you have.")]},
    )
    async def blob(sha256: _ID, request: Request, key: Caller) -> Response:
        key.require("read")
        found = await context.store.blob(sha256, tenant=key.sees)
        if found is None:
            raise NotFound(f"no blob {sha256!r} is kept here.")
        media_type, data = found
        headers = {"etag": f'"{sha256}"', "x-content-type-options": "nosniff"}
        if unchanged(request, headers["etag"]):
            return Response(status_code=304, headers=headers)
        return Response(data, media_type=media_type, headers=headers)

    return routes


def health(context: Context) -> APIRouter:
    """Liveness and readiness, open to all; metrics, for those who may read."""
    routes = APIRouter(tags=["health"], default_response_class=Response)

    @routes.get("/healthz", summary="The process is alive", responses=answers(shown.Alive, "It is."))
    async def healthz() -> Response:
        return json_answer({"status": "ok"})

    @routes.get(
        "/readyz",
        summary="At least one replica takes calls",
        responses=answers(shown.Ready, "Calls are taken.") | answers(shown.Ready, "None is ready.", status=503),
    )
    async def readyz() -> Response:
        ready = context.book.ready()
        return json_answer({"ready_replicas": ready}, 200 if ready else 503)

    @routes.get(
        "/metrics",
        summary="Prometheus metrics",
        responses=answers(None, "In Prometheus' text format.", media_type="text/plain"),
    )
    async def metrics(request: Request) -> Response:
        context.keys.check(request.headers.get("authorization")).require("read_all")
        return Response(context.telemetry.text(), media_type="text/plain; version=0.0.4")

    return routes


def call_row(record: CallRecord) -> dict[str, Any]:
    """All of the record but the encoding of its prompt, which is for predictors only."""
    row: dict[str, Any] = msgspec.to_builtins(record)
    del row["encoding"]
    return row


def _why(decision: Decision, policy: str | None) -> dict[str, Any]:
    """The decision, and what the policy would have done instead."""
    row: dict[str, Any] = {"explanation": explain(decision), "decision": decision}
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
