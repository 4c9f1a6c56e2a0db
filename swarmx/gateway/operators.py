"""The operators' REST API: the console, tools, proposals, the audit log, scaling and the coordinator's episodes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from swarmx.core.audit import MAX_TEXT
from swarmx.core.control import CoordinatorStatus, Diff, Proposal, ProposalState, ToolCall, Via
from swarmx.gateway import shown
from swarmx.gateway.context import Context
from swarmx.gateway.event_feed import server_event
from swarmx.gateway.openapi import SERVER_EVENT, Described, answers, ref, refuses
from swarmx.gateway.pages import page, read_cursor
from swarmx.gateway.rest import IF_MATCH, Caller, json_answer
from swarmx.gateway.tags import LARGEST_SEQ, check_match, tag_of_value
from swarmx.runtime.console import MOST_CHARACTERS, ConsoleEvent, Done, Failed, Proposed, Shown, Told
from swarmx.tools.schema import schema_of
from swarmx.tools.tool import ControlTool, ReadTool, Tool

_Name = Annotated[str, Path(min_length=1, max_length=300)]
_Cursor = Annotated[str | None, Query(max_length=500, description="`next_cursor` of the page before.")]

_USED: Described = {
    200: {
        "description": "What a reading tool saw; of a changing one what it would change, or what became of it.",
        "headers": {
            "ETag": {
                "description": "Of a dry run: stands for what would change, for `If-Match`.",
                "schema": {"type": "string"},
            }
        },
        "content": {
            "application/json": {"schema": {"anyOf": [ref(shown.ToolResult), ref(shown.DryRun), ref(Proposal)]}}
        },
    }
}


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


def router(context: Context) -> APIRouter:
    """Routes under /api/v1."""
    routes = APIRouter(prefix="/api/v1", tags=["control"], default_response_class=Response)

    @routes.post(
        "/console",
        summary="Ask or order in plain English; answers as server-sent events, or as one JSON",
        responses={
            200: {
                "description": "Events text, evidence, proposal, error and done; one JSON if `Accept` asks for it.",
                "content": {
                    "text/event-stream": {"schema": SERVER_EVENT},
                    "application/json": {"schema": ref(shown.ConsoleAnswer)},
                },
            }
        },
    )
    async def console(sentence: Sentence, request: Request, key: Caller) -> Response:
        key.require("read_all")
        events = context.console.answer(sentence.text, actor=key.actor, via="console")
        if "application/json" in request.headers.get("accept", ""):
            return json_answer(await _collected(events))
        return StreamingResponse(
            _streamed(events), media_type="text/event-stream", headers={"cache-control": "no-store"}
        )

    @routes.get(
        "/tools",
        summary="What can be looked at and changed, with the schema of the arguments",
        responses=answers(shown.ToolList, "All of them."),
    )
    async def tools(key: Caller) -> Response:
        key.require("read_all")
        return json_answer({"tools": [_tool(tool) for tool in context.desk.registry.tools.values()]})

    @routes.post(
        "/tools/{name}",
        summary="Use a tool: look, try it dry, or do it",
        responses=_USED | refuses(409, 412),
        openapi_extra={"parameters": [IF_MATCH]},
    )
    async def use(name: _Name, wanted: ToolUse, request: Request, key: Caller) -> Response:
        call = ToolCall(tool=name, arguments=wanted.arguments)
        if isinstance(context.desk.registry.understand(call).tool, ReadTool):
            key.require("read_all")
            return json_answer({"result": await context.desk.read(call, key.actor)})
        key.require("read_all")  # the desk asks for more, and notes in the audit log who lacks it
        seen: Diff | None = None
        if wanted.dry_run or "if-match" in request.headers:
            verdict, seen = await context.desk.dry_run(call, actor=key.actor)
            tag = tag_of_value(seen.changes)
            if wanted.dry_run:
                return json_answer({"verdict": verdict, "diff": seen}, headers={"etag": tag})
            check_match(request, tag, f"what {name} would change")
        order = context.desk.order(call, actor=key.actor, via=_via(request), reason=wanted.reason, seen=seen)
        return json_answer(await order)

    @routes.get(
        "/proposals",
        summary="Proposals, newest first",
        responses=answers(shown.ProposalList, "A page.") | refuses(404),
    )
    async def proposals(
        key: Caller,
        state: Annotated[list[ProposalState] | None, Query(description="Only those in one of these states.")] = None,
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
        cursor: _Cursor = None,
    ) -> Response:
        key.require("read_all")
        found = await context.control.proposals(states=state, limit=limit + 1, before=read_cursor(cursor))
        return json_answer(page("proposals", found, limit, lambda row: (row.at_s, row.proposal_id)))

    @routes.get(
        "/proposals/{proposal_id}",
        summary="One proposal: what it would change, and what became of it",
        responses=answers(Proposal, "As it is now."),
    )
    async def proposal(proposal_id: _Name, key: Caller) -> Response:
        key.require("read_all")
        return json_answer(await context.desk.proposal(proposal_id))

    @routes.post(
        "/proposals/{proposal_id}/approve",
        summary="Approve a proposal: it is applied at once",
        responses=answers(Proposal, "Applied.") | refuses(409),
    )
    async def approve(proposal_id: _Name, request: Request, key: Caller) -> Response:
        key.require("read_all")
        return json_answer(await context.desk.approve(proposal_id, actor=key.actor, via=_via(request)))

    @routes.post(
        "/proposals/{proposal_id}/deny",
        summary="Deny a proposal",
        responses=answers(Proposal, "Denied.") | refuses(409),
    )
    async def deny(proposal_id: _Name, request: Request, key: Caller, denial: Denial | None = None) -> Response:
        key.require("read_all")
        reason = denial.reason if denial is not None else ""
        return json_answer(await context.desk.deny(proposal_id, actor=key.actor, via=_via(request), reason=reason))

    @routes.get(
        "/audit",
        summary="The audit log, oldest first, up to its end or to a record",
        responses=answers(shown.AuditPage, "A page."),
    )
    async def audit(
        key: Caller,
        limit: Annotated[int, Query(ge=1, le=1000)] = 50,
        before: Annotated[
            int | None, Query(ge=1, le=LARGEST_SEQ, description="Only records with smaller numbers.")
        ] = None,
    ) -> Response:
        key.require("read_all")
        records = await context.audit.tail(limit=limit, before=before)
        return json_answer({"records": records, "has_more": bool(records) and records[0].seq > 1})

    @routes.get(
        "/audit/verify",
        summary="Whether the audit log is as it was written",
        responses=answers(shown.AuditCheck, "What was found."),
    )
    async def verify(key: Caller) -> Response:
        key.require("read_all")
        report = await context.check_audit()
        return json_answer({"sound": report.sound, "report": report})

    @routes.get(
        "/scaling",
        summary="The scaling policy, each model's bounds and replicas, the last plans and alerts",
        responses=answers(shown.Scaling, "As it is now."),
    )
    async def scaling(key: Caller) -> Response:
        key.require("read_all")
        view = await context.overview.view()
        models = list(view.models.values())
        return json_answer({"active": view.scaling, "models": models, "plans": view.plans, "alerts": view.alerts})

    @routes.get(
        "/coordinator",
        summary="Who thinks for the coordinator, and whether its model is up",
        responses=answers(CoordinatorStatus, "As it is now."),
    )
    async def coordinator(key: Caller) -> Response:
        key.require("read_all")
        return json_answer(context.coordinator())

    @routes.get(
        "/episodes",
        summary="Turns of the coordinator, newest first",
        responses=answers(shown.EpisodeList, "A page.") | refuses(404),
    )
    async def episodes(
        key: Caller, limit: Annotated[int, Query(ge=1, le=200)] = 20, cursor: _Cursor = None
    ) -> Response:
        key.require("read_all")
        found = await context.control.episodes(limit=limit + 1, before=read_cursor(cursor))
        return json_answer(page("episodes", found, limit, lambda row: (row.at_s, row.episode_id)))

    return routes


def _via(request: Request) -> Via:
    """What the client says of itself, for the audit log; it gives no right."""
    return "cli" if request.headers.get("x-swarmx-via") == "cli" else "rest"


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
