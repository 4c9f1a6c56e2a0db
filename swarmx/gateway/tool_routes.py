"""The tools that workflows may use, as the replicas offer them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.responses import Response

from swarmx.gateway.context import Context
from swarmx.gateway.openapi import answers
from swarmx.gateway.rest import Caller, json_answer


class WorkflowTool(BaseModel):
    """One tool, as a workflow names it."""

    name: str
    description: str = Field(description="What it does; of an MCP server, in that server's words.")
    parameters: dict[str, Any] = Field(description="JSON Schema of its arguments.")
    pool: str = Field(description="The replicas that have it: their model in /api/v1/replicas.")
    timeout_s: float
    idempotent: bool = Field(description="Whether it may be called again when nobody knows whether it was.")
    result_limit_bytes: int


class WorkflowTools(BaseModel):
    """All that the tenant may use, by name."""

    tools: list[WorkflowTool]
    refused: dict[str, dict[str, str]] = Field(
        description="Why tools are not there, by pool and by their provider in it; for operators only."
    )
    settled: bool = Field(description="Whether every pool has said what it has; until then there may be more.")


def router(context: Context) -> APIRouter:
    """Routes under /api/v1."""
    routes = APIRouter(prefix="/api/v1", default_response_class=Response)

    @routes.get(
        "/workflow_tools",
        tags=["workflows"],
        summary="Tools that workflows may use",
        response_model=WorkflowTools,
        responses=answers(WorkflowTools, "All that the tenant may use."),
    )
    async def workflow_tools(key: Caller) -> Response:
        key.require("read")
        catalogue = context.tools
        rows = [
            {field: getattr(spec, field) for field in WorkflowTool.model_fields}
            for spec in catalogue.of(key.sees).values()
        ]
        refused = catalogue.refused if key.sees is None else {}
        return json_answer({"tools": rows, "refused": refused, "settled": catalogue.is_settled})

    return routes
