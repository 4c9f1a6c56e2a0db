"""Errors as clients expect them: problem+json (RFC 9457) on the REST API, OpenAI's shape under /v1."""

from __future__ import annotations

import logging
import math
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from swarmx.core.errors import (
    ConfigError,
    Forbidden,
    KeyReused,
    NotFound,
    Outdated,
    Refused,
    StoreError,
    SwarmXError,
    Unauthorized,
    Unavailable,
    WorkflowError,
)
from swarmx.runtime.call_ends import CallRefused
from swarmx.runtime.requests import BadRequest

log = logging.getLogger(__name__)

_COMES_BACK = frozenset({"no_replica", "budget", "overload", "deadline"})
_RETRY_AFTER_S = 5  # where the router cannot tell
_TIME_HEALS = frozenset({"in_flight", "cooldown", "rate", "change_budget", "pending"})  # rules of refusals

_STATUS: dict[type[SwarmXError], int] = {
    ConfigError: 400,
    WorkflowError: 422,
    NotFound: 404,
    Unauthorized: 401,
    Forbidden: 403,
    Refused: 409,
    Outdated: 412,
    KeyReused: 422,
    StoreError: 503,
    Unavailable: 503,
}


def install(app: FastAPI) -> None:
    """Answer every error of the tree, and every unexpected one, in the shape that fits the path."""

    async def known(request: Request, error: Exception) -> Response:
        extra = {}
        if isinstance(error, WorkflowError) and error.where:
            extra = {"where": error.where}
        elif isinstance(error, Refused):
            extra = {"rule": error.rule}
        response = problem(request, status_of(error), str(error), **extra)
        response.headers.update(_advice(error))
        return response

    async def bad_request(request: Request, error: Exception) -> Response:
        assert isinstance(error, BadRequest)
        return problem(request, 400, str(error), param=error.param)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return problem(request, 422, f"{where}: {first['msg']}.", where=where)

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        detail = str(error.detail)
        if error.status_code == 404:
            detail = f"nothing is at {request.url.path}; the API is described at /openapi.json."
        elif error.status_code == 405:
            detail = f"{request.method} is not allowed on {request.url.path}."
        return problem(request, error.status_code, detail)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, CallRefused)
        return refusal(error)

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # the client hung up while it was sending; nobody reads this

    async def unexpected(request: Request, error: Exception) -> Response:
        log.error("unexpected error on %s %s", request.method, request.url.path, exc_info=error)
        response = problem(request, 500, "an unexpected error, which is in the server's log.")
        response.headers["connection"] = "close"  # the ASGI server hears of it too, and hangs up
        return response

    app.add_exception_handler(SwarmXError, known)
    app.add_exception_handler(BadRequest, bad_request)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(CallRefused, refused)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(Exception, unexpected)


def _advice(error: Exception) -> dict[str, str]:
    """Whether to try again, for clients that by themselves would, as those of OpenAI's make do after a 409 or a 503."""
    if isinstance(error, Refused):
        if error.rule == "in_flight":
            return {"retry-after": "1"}
        return {} if error.rule in _TIME_HEALS else {"x-should-retry": "false"}
    if isinstance(error, Unavailable | StoreError):
        return {"retry-after": str(_RETRY_AFTER_S)}
    return {}


def status_of(error: Exception) -> int:
    """The HTTP status of an error of the tree."""
    return next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 500)


def problem(request: Request, status: int, detail: str, **extra: Any) -> Response:
    """One error in the shape of the path."""
    headers = {"www-authenticate": "Bearer"} if status == 401 else None
    if request.url.path.startswith("/v1/"):
        return openai_error(status, detail, param=extra.get("param"), code=extra.get("code"), headers=headers)
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail, **extra}
    body = {key: value for key, value in body.items() if value is not None}
    return JSONResponse(body, status, headers, media_type="application/problem+json")


def openai_error(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    """`{"error": {"message", "type", "param", "code"}}`, which OpenAI's clients turn into their exceptions."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    error = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": error}, status, headers)


def refusal(error: CallRefused) -> Response:
    """A call that no replica answered; what the replica itself said about the request goes through unchanged."""
    headers = {"x-swarmx-call-id": error.call_id, "x-swarmx-attempts": str(error.attempts)}
    if 400 <= error.status < 500 and _is_openai_error(error.body):
        return Response(error.body, error.status, headers, media_type="application/json")
    if error.reason in _COMES_BACK:
        # Whole seconds; clients of OpenAI's own make heed both.
        headers["retry-after"] = str(_RETRY_AFTER_S if error.retry_after_s is None else _whole(error.retry_after_s))
        if error.reason == "deadline" and error.retry_after_s is None:
            headers["x-should-retry"] = "false"
    return openai_error(error.status, str(error), code=error.reason, headers=headers)


def _whole(seconds: float) -> int:
    return max(1, math.ceil(seconds))


def _is_openai_error(body: bytes) -> bool:
    try:
        return isinstance(msgspec.json.decode(body, type=dict).get("error"), dict | str)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
