"""Puts one emulated replica together: its own routes, and those that every replica has."""

from __future__ import annotations

import time
from collections.abc import Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from swarmx.core.engine import EngineProfile
from swarmx.core.nouns import CallKind, EngineOrder
from swarmx.providers.emulated.images import ImageServer
from swarmx.providers.emulated.pacing import PacedEngine
from swarmx.providers.emulated.server import TextServer
from swarmx.providers.emulated.truth import Truth
from swarmx.providers.emulated.wire import ApiError, Labelled, json_response

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def replica_app(
    model: str,
    kind: CallKind,
    profile: EngineProfile,
    *,
    truth: Callable[[], Truth],
    seed: int = 0,
    engine_order: EngineOrder = "arrival",
) -> ASGIApp:
    """One replica as an ASGI app. `profile` holds wall times; `truth` is only asked for by a language model."""
    paced = PacedEngine(model=model, profile=profile, order=engine_order)
    match kind:
        case "llm":
            own = TextServer(model=model, paced=paced, truth=truth()).routes()
        case "image":
            own = ImageServer(model=model, paced=paced, seed=seed).routes()
    created = int(time.time())

    async def models(request: Request) -> Response:
        card = {"id": model, "object": "model", "created": created, "owned_by": "swarmx-emulated"}
        return json_response({"object": "list", "data": [card]})

    async def health(request: Request) -> Response:
        return Response(status_code=200)

    async def metrics(request: Request) -> Response:
        paced.catch_up()
        return Response(paced.telemetry.exposition(), headers={"content-type": METRICS_TYPE})

    async def report(request: Request) -> Response:
        return json_response(paced.telemetry.report())

    async def reset(request: Request) -> Response:
        if not paced.idle:
            return ApiError(409, "Calls are running: a reset needs an idle replica, wait or abort them.").response()
        paced.reset()
        return json_response({"reset": True})

    shared = [
        Route("/v1/models", models),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/emulator/report", report),
        Route("/emulator/reset", reset, methods=["POST"]),
    ]
    return Labelled(Starlette(routes=[*own, *shared], exception_handlers={HTTPException: _refused, Exception: _failed}))


async def _refused(request: Request, error: Exception) -> Response:
    status, detail = (error.status_code, error.detail) if isinstance(error, HTTPException) else (500, str(error))
    return ApiError(status, f"{request.method} {request.url.path}: {detail}", kind="NotFoundError").response()


async def _failed(request: Request, error: Exception) -> Response:
    return ApiError(500, f"The emulator failed: {type(error).__name__}", kind="InternalServerError").response()
