"""The operators' REST API: the console, tools, proposals, the audit log, scaling and the coordinator's episodes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from swarmx.core.audit import MAX_TEXT
from swarmx.core.control import ProposalState, ToolCall, Via
from swarmx.gateway.context import Context
from swarmx.gateway.rest import Caller
from swarmx.runtime.console import MOST_CHARACTERS, ConsoleEvent, Done, Failed, Proposed, Shown, Told
from swarmx.tools.schema import schema_of
from swarmx.tools.tool import ControlTool, ReadTool, Tool


class Sentence(BaseModel):
    """A question or an order in plain English."""

    model_config = ConfigDict(extra="forbid")

    text: str = Field(min_length=1, max_length=MOST_CHARACTERS, description="What you want to know, or to have done.")


class ToolUse(BaseModel):
    """One use of a tool."""

    model_config = ConfigDict(extra="forbid")

    arguments: dict[str, Any] = Field({}, description="Its arguments; GET /api/v1/tools has their schema.")
    reason: str = Field("", max_length=MAX_TEXT, description="Why, for the audit log.")
    dry_run: bool = Field(True, description="Only say what would change, and whether it is allowed.")


class Denial(BaseModel):
    """Why a proposal is denied."""

    model_config = ConfigDict(extra="forbid")

    reason: str = Field("", max_length=MAX_TEXT, description="Why, for the audit log and for who proposed it.")


def server_event(name: str, number: int, data: bytes) -> bytes:
    """One server-sent event; `data` has no line breaks."""
    return b"event: %b\nid: %d\ndata: %b\n\n" % (name.encode(), number, data)


def router(context: Context) -> APIRouter:
    """Routes under /api/v1."""
    routes = APIRouter(prefix="/api/v1", tags=["control"])

    @routes.post("/console", summary="Ask or order in plain English; answers as server-sent events, or as one JSON")
    async def console(sentence: Sentence, request: Request, key: Caller) -> Response:
        key.require("read_all")
        events = context.console.answer(sentence.text, actor=key.actor, via="console")
        if "application/json" in request.headers.get("accept", ""):
            return JSONResponse(await _collected(events))
        return StreamingResponse(
            _streamed(events), media_type="text/event-stream", headers={"cache-control": "no-store"}
        )

    @routes.get("/tools", summary="What can be looked at and changed, with the schema of the arguments")
    async def tools(key: Caller) -> Response:
        key.require("read_all")
        return JSONResponse({"tools": [_tool(tool) for tool in context.desk.registry.tools.values()]})

    @routes.post("/tools/{name}", summary="Use a tool: look, try it dry, or do it")
    async def use(name: str, wanted: ToolUse, request: Request, key: Caller) -> Response:
        call = ToolCall(tool=name, arguments=wanted.arguments)
        if isinstance(context.desk.registry.understand(call).tool, ReadTool):
            key.require("read_all")
            return _json({"result": await context.desk.read(call, key.actor)})
        if wanted.dry_run:
            key.require("read_all")
            verdict, diff = await context.desk.dry_run(call, actor=key.actor)
            return _json({"verdict": verdict, "diff": diff})
        key.require("read_all")  # the desk asks for more, and notes in the audit log who lacks it
        return _json(await context.desk.order(call, actor=key.actor, via=_via(request), reason=wanted.reason))

    @routes.get("/proposals", summary="Proposals, newest first")
    async def proposals(
        key: Caller,
        state: Annotated[list[ProposalState] | None, Query(description="Only those in one of these states.")] = None,
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
    ) -> Response:
        key.require("read_all")
        return _json({"proposals": await context.desk.proposals(states=state, limit=limit)})

    @routes.get("/proposals/{proposal_id}", summary="One proposal: what it would change, and what became of it")
    async def proposal(proposal_id: str, key: Caller) -> Response:
        key.require("read_all")
        return _json(await context.desk.proposal(proposal_id))

    @routes.post("/proposals/{proposal_id}/approve", summary="Approve a proposal: it is applied at once")
    async def approve(proposal_id: str, request: Request, key: Caller) -> Response:
        key.require("read_all")
        return _json(await context.desk.approve(proposal_id, actor=key.actor, via=_via(request)))

    @routes.post("/proposals/{proposal_id}/deny", summary="Deny a proposal")
    async def deny(proposal_id: str, request: Request, key: Caller, denial: Denial | None = None) -> Response:
        key.require("read_all")
        reason = denial.reason if denial is not None else ""
        return _json(await context.desk.deny(proposal_id, actor=key.actor, via=_via(request), reason=reason))

    @routes.get("/audit", summary="The audit log, oldest first, up to its end or to a record")
    async def audit(
        key: Caller,
        limit: Annotated[int, Query(ge=1, le=1000)] = 50,
        before: Annotated[int | None, Query(ge=1, description="Only records with smaller numbers.")] = None,
    ) -> Response:
        key.require("read_all")
        return _json({"records": await context.audit.tail(limit=limit, before=before)})

    @routes.get("/audit/verify", summary="Whether the audit log is as it was written")
    async def verify(key: Caller) -> Response:
        key.require("read_all")
        report = await context.check_audit()
        return _json({"sound": report.sound, "report": report})

    @routes.get("/scaling", summary="The scaling policy, each model's bounds and replicas, the last plans and alerts")
    async def scaling(key: Caller) -> Response:
        key.require("read_all")
        view = await context.overview.view()
        models = list(view.models.values())
        return _json({"active": view.scaling, "models": models, "plans": view.plans, "alerts": view.alerts})

    @routes.get("/coordinator", summary="Who thinks for the coordinator, and whether its model is up")
    async def coordinator(key: Caller) -> Response:
        key.require("read_all")
        return _json(context.coordinator())

    @routes.get("/episodes", summary="Turns of the coordinator, newest first")
    async def episodes(key: Caller, limit: Annotated[int, Query(ge=1, le=200)] = 20) -> Response:
        key.require("read_all")
        return _json({"episodes": await context.control.episodes(limit=limit)})

    return routes


def _via(request: Request) -> Via:
    """What the client says of itself, for the audit log; it gives no right."""
    return "cli" if request.headers.get("x-swarmx-via") == "cli" else "rest"


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _tool(tool: Tool) -> dict[str, Any]:
    row = {
        "name": tool.name,
        "help": tool.help,
        "effect": tool.effect,
        "role": tool.role,
        "arguments": tool.arguments.model_json_schema(),
        "schema": schema_of(tool),
    }
    if isinstance(tool, ControlTool):
        row |= {"cooldown_s": tool.cooldown_s, "per_hour": tool.per_hour}
    return row


async def _streamed(events: AsyncIterator[ConsoleEvent]) -> AsyncIterator[bytes]:
    number = 0
    async for event in events:
        number += 1
        yield server_event(str(type(event).__struct_config__.tag), number, msgspec.json.encode(event))


async def _collected(events: AsyncIterator[ConsoleEvent]) -> dict[str, Any]:
    """All of an answer in one."""
    answer: dict[str, Any] = {"text": [], "evidence": [], "proposal": None, "error": None}
    async for event in events:
        match event:
            case Told(text=text):
                answer["text"].append(text)
            case Shown(evidence=evidence):
                answer["evidence"].append(msgspec.to_builtins(evidence))
            case Proposed(proposal=proposal):
                answer["proposal"] = msgspec.to_builtins(proposal)
            case Failed():
                answer["error"] = {"detail": event.detail, "rule": event.rule}
            case Done():
                pass
    return answer
