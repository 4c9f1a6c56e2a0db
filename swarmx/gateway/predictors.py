"""The REST endpoint of the predictors: heads in force, how forecasts did of late, drift and retraining."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from swarmx.gateway.context import Context
from swarmx.gateway.openapi import answers
from swarmx.gateway.rest import Caller, json_answer
from swarmx.runtime.forecast_book import PredictorStatus


def router(context: Context) -> APIRouter:
    """The route under /api/v1."""
    routes = APIRouter(prefix="/api/v1", tags=["operators"], default_response_class=Response)

    @routes.get(
        "/predictor",
        summary="Heads in force, observed coverage, drift and retraining",
        responses=answers(PredictorStatus, "As it is now."),
    )
    async def predictor(key: Caller) -> Response:
        key.require("read_all")
        return json_answer(context.forecasts.status())

    return routes
