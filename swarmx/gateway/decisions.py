"""Decisions of routers inside other systems: kept here, and explained like those that were made here."""

from __future__ import annotations

import asyncio

import msgspec
from fastapi import APIRouter, Request
from msgspec.structs import replace
from starlette.responses import Response

from swarmx.agents.explain import explain
from swarmx.agents.kept_view import view_of
from swarmx.core.nouns import Decision
from swarmx.gateway.context import Context
from swarmx.gateway.openapi import answers, refuses
from swarmx.gateway.rest import Caller, json_answer
from swarmx.runtime.requests import BadRequest

_MOST = 1000
_LINES = "application/x-ndjson"
_DECODER = msgspec.json.Decoder(Decision)


def router(context: Context) -> APIRouter:
    """The route under /api/v1."""
    routes = APIRouter(prefix="/api/v1", tags=["calls"], default_response_class=Response)

    @routes.post(
        "/decisions",
        summary="Keep decisions of a router that runs elsewhere",
        status_code=202,
        responses=answers(None, "How many were kept.", status=202, example={"kept": 2}) | refuses(400, 413),
        openapi_extra={
            "requestBody": {
                "required": True,
                "description": f"Up to {_MOST} decisions, each a line of JSON as `DecisionLog` writes it.",
                "content": {_LINES: {"schema": {"type": "string"}}},
            }
        },
    )
    async def keep(request: Request, key: Caller) -> Response:
        key.require("submit")
        found = _decisions(await request.body())
        note = f"told by the key {key.name!r}"
        mine = []
        for decision in found:  # whatever a router says of tenants, what it tells belongs to that of its key
            told = f"{decision.note}; {note}" if decision.note else note
            mine.append(replace(decision, call=replace(decision.call, tenant=key.tenant), note=told))
        await asyncio.gather(*map(context.store.record_decision, mine))
        return json_answer({"kept": len(found)}, 202)

    return routes


def _decisions(body: bytes) -> list[Decision]:
    """Raises BadRequest."""
    lines = [line for line in body.split(b"\n") if line.strip()]
    if len(lines) > _MOST:
        raise BadRequest(f"{len(lines)} decisions in one request, expected {_MOST} at most; send them in parts.")
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            decision = _DECODER.decode(line)
            _check(decision)
        except (msgspec.MsgspecError, ValueError, IndexError, OverflowError) as error:
            raise BadRequest(f"line {number} is no decision: {error}.") from None
        found.append(decision)
    return found


def _check(decision: Decision) -> None:
    """What is kept can be explained whenever somebody asks. Raises ValueError, IndexError, OverflowError."""
    seen = decision.candidates
    columns = [seen.in_flight, seen.remaining_work, seen.context_tokens, seen.signal_age_s, *seen.terms_s.values()]
    if seen.cost_s is not None:
        columns.append(seen.cost_s)
    if any(len(column) != len(seen.replica_ids) for column in columns):
        raise ValueError("not every column of its candidates has one value for each")
    if "\0" in decision.call.call_id:
        raise ValueError("its call_id has the character NUL")
    explain(decision)
    view_of(seen)
