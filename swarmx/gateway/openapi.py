"""The description of the API at /openapi.json: what each operation answers with, and how it refuses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from swarmx.core.control import CoordinatorStatus, PolicyStatus, Proposal
from swarmx.gateway import shown
from swarmx.runtime.forecast_book import PredictorStatus
from swarmx.workflows.nodes import WorkflowSpec

REF = "#/components/schemas/{name}"
SERVER_EVENT = {
    "type": "object",
    "description": "One of the server-sent events.",
    "properties": {"event": {"type": "string"}, "id": {"type": "string"}, "data": {"type": "string"}},
}
Described = dict[int | str, dict[str, Any]]

_OPEN = ("/healthz", "/readyz")
_BEARER = {
    "type": "http",
    "scheme": "bearer",
    "description": "A token of `swarmx keys add`, or the one that `swarmx up` leaves in its state folder.",
}
_MEANING = {
    400: "A header or a body that cannot be read",
    401: "No token, or an unknown one",
    403: "The role of the token may not do this",
    404: "Not there, or another tenant's",
    409: "The guard, or the state of things, does not allow it; `rule` says which",
    412: "What was looked at has changed since",
    413: "The body is too large",
    422: "The request, or a field of it, is of the wrong form",
    429: "The tenant has used up its budget, or the fleet is overloaded",
    500: "A defect, which is in the server's log",
    502: "The replicas failed, or answered what nobody can read",
    503: "Not now: nothing answers, the store cannot write, or the server stops",
    504: "The answer would have come too late",
}
_ALWAYS = (401, 403, 500, 503)


def answers(
    kind: type | None,
    description: str,
    *,
    status: int = 200,
    example: Any = None,
    headers: Mapping[str, str] | None = None,
    media_type: str = "application/json",
) -> Described:
    """What a route answers with: JSON of that type, or for None whatever the media type says."""
    content: dict[str, Any] = {"schema": ref(kind) if kind is not None else _schema_of(media_type)}
    if example is not None:
        content["example"] = example
    described: dict[str, Any] = {"description": description, "content": {media_type: content}}
    if headers:
        described["headers"] = {
            name: {"description": meaning, "schema": {"type": "string"}} for name, meaning in headers.items()
        }
    return {status: described}


def refuses(*statuses: int) -> Described:
    """How a route refuses, beside what every route does."""
    return {status: {"description": _MEANING[status]} for status in statuses}


def header(name: str, description: str, **schema: Any) -> dict[str, Any]:
    """A header that the route reads by itself."""
    return {
        "name": name,
        "in": "header",
        "required": False,
        "description": description,
        "schema": {"type": "string", **schema},
    }


def ref(kind: type) -> dict[str, str]:
    return {"$ref": REF.format(name=kind.__name__)}


def describe(app: FastAPI) -> None:
    """Have the application describe itself in full."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _described(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way


def _described(app: FastAPI) -> dict[str, Any]:
    schema = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
    components = schema.setdefault("components", {})
    components["schemas"] = _schemas(components.get("schemas", {}))
    components["securitySchemes"] = {"token": _BEARER}
    schema["security"] = [{"token": []}]
    for path, operation in _operations(schema):
        statuses = operation["responses"]
        if "HTTPValidationError" in str(statuses.get("422")):
            del statuses["422"]  # FastAPI's own form of error, which nobody gets here
        if path in _OPEN:
            operation["security"] = []
        refused = [] if path in _OPEN else [*_ALWAYS, *([400, 413, 422] if "requestBody" in operation else [])]
        if operation.get("parameters"):
            refused += [400, 422]
        if "{" in path:
            refused.append(404)
        for status in refused:
            statuses.setdefault(str(status), {"description": _MEANING[status]})
        for status, response in statuses.items():
            if status >= "400" and "content" not in response:
                response["content"] = _problem(path)
    return schema


def _problem(path: str) -> dict[str, Any]:
    if path.startswith("/v1/"):
        return {"application/json": {"schema": ref(shown.OpenAIError)}}
    return {"application/problem+json": {"schema": ref(shown.Problem)}}


def _operations(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            yield path, operation


def _schemas(fastapi: dict[str, Any]) -> dict[str, Any]:
    """Those of our types, of the form of workflows, and what FastAPI found of the bodies."""
    _, ours = msgspec.json.schema_components(_kinds(), ref_template=REF)
    form = WorkflowSpec.model_json_schema(ref_template=REF.replace("{name}", "{model}"))
    nested = form.pop("$defs", {})
    bodies = {name: body for name, body in fastapi.items() if name not in ("HTTPValidationError", "ValidationError")}
    return dict(sorted({**nested, WorkflowSpec.__name__: form, **bodies, **ours}.items()))


def _kinds() -> list[type]:
    found = [
        kind
        for name, kind in vars(shown).items()
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind.__module__ == shown.__name__
        if not name.startswith("_")
    ]
    return [*found, CoordinatorStatus, PolicyStatus, PredictorStatus, Proposal]


def _schema_of(media_type: str) -> dict[str, Any]:
    return {"type": "string"} if media_type.startswith("text/") else {"type": "string", "format": "binary"}
