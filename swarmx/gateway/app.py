"""Puts the front door together."""

from __future__ import annotations

from fastapi import FastAPI

import swarmx.gateway.openai as openai_front
from swarmx.gateway import decisions, openapi, operators, predictors, rest, tool_routes, web, workflow_routes
from swarmx.gateway.context import Context
from swarmx.gateway.ending import CutOff
from swarmx.gateway.limits import BodyLimit
from swarmx.gateway.problems import install


def create_app(context: Context, *, max_body_bytes: int) -> FastAPI:
    """The ASGI application over a running context."""
    app = FastAPI(
        title="SwarmX",
        summary="Scheduler agents for agentic workflows.",
        version="1",
        docs_url=None,  # its page would run scripts from elsewhere in the operators' origin
        redoc_url=None,
    )
    app.state.context = context
    install(app)
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    app.add_middleware(CutOff)
    app.include_router(openai_front.router(context))  # first: routes are tried in order, and this one is the hot path
    app.include_router(workflow_routes.router(context))
    app.include_router(rest.router(context))
    app.include_router(rest.health(context))
    app.include_router(decisions.router(context))
    app.include_router(operators.router(context))
    app.include_router(predictors.router(context))
    app.include_router(tool_routes.router(context))
    app.include_router(web.router(context))
    openapi.describe(app)
    return app
