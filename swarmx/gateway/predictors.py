"""The REST endpoint of the predictors: heads in force, how forecasts did of late, drift and retraining."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from swarmx.gateway.context import Context
from swarmx.gateway.rest import Caller


def router(context: Context) -> APIRouter:
    """The route under /api/v1."""
    routes = APIRouter(prefix="/api/v1", tags=["operators"])

    @routes.get("/predictor", summary="Heads in force, observed coverage, drift and retraining")
    async def predictor(key: Caller) -> Response:
        key.require("read_all")
        return Response(msgspec.json.encode(context.forecasts.status()), media_type="application/json")

    return routes
