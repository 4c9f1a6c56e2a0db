"""The API is as /openapi.json describes it: requests of every kind, good and bad, made up from the description."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar, cast

import httpx
import pytest
import requests
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from swarmx.gateway.app import create_app
from tests.gateway.workflow_world import ASK, World, ended, submitted, world_in

pytestmark = pytest.mark.process

T = TypeVar("T")
EXAMPLES = 10
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
OPEN = {"/healthz", "/readyz"}
ELASTIC = {"model": "qwen3-32b", "device": "h100", "min": 0, "max": 2, "limit": 4}  # not one of the examples' models


@schemathesis.serializer("application/x-ndjson")
def lines(ctx: schemathesis.SerializationContext, value: Any) -> bytes:
    """Made-up bodies of this type are sent as they are, or as one line of JSON."""
    data = getattr(value, "data", value)
    return data if isinstance(data, bytes) else json.dumps(data).encode()


@cache
def described() -> dict[str, Any]:
    # Building routes reads nothing of the context; only a request does.
    app: FastAPI = create_app(cast(Any, None), max_body_bytes=1)
    return app.openapi()


OPERATIONS = [(method.upper(), path) for path, methods in described()["paths"].items() for method in methods]


@dataclass(slots=True, kw_only=True)
class Served:
    """A world whose loop runs in a thread of its own, and what is known to be in it, by the name of its parameter."""

    loop: asyncio.AbstractEventLoop
    client: httpx.AsyncClient
    known: dict[str, list[str]] = field(default_factory=dict)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30.0)

    def send(self, request: requests.PreparedRequest) -> httpx.Response:
        assert request.url is not None
        body = request.body or b""
        assert isinstance(body, bytes | str)
        headers = [
            (name.encode(), value if isinstance(value, bytes) else value.encode("latin-1"))
            for name, value in request.headers.items()
        ]
        sent = httpx.Request(request.method or "", request.url, headers=headers, content=body)
        return self.run(self.client.send(sent))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("described")
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, loop).result(60.0)

    async def furnished(stack: AsyncExitStack) -> Served:
        world = await stack.enter_async_context(world_in(folder / "state", elastic=[ELASTIC]))
        client = await stack.enter_async_context(world.whole.client("admin"))
        return await _furnished(Served(loop=loop, client=client), world)

    stack = AsyncExitStack()
    try:
        yield run(furnished(stack))
    finally:
        run(stack.aclose())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _furnished(served: Served, world: World) -> Served:
    client = served.client
    world.answers.mood = "reject"
    failed = await ended(client, await submitted(client, ASK))
    world.answers.mood = "fine"
    finished = await ended(client, await submitted(client, ASK))
    proposal = await client.post("/api/v1/console", json={"text": f"set bounds of {ELASTIC['model']} to 0..3"})
    served.known = {
        "workflow_id": [failed["workflow_id"], finished["workflow_id"]],
        "call_id": [finished["calls"][0]["call_id"]],
        "replica_id": ["coder-0"],
        "proposal_id": re.findall(r"pr-[0-9a-f]{12}", proposal.text)[:1],
        "name": ["replica_status", "set_replica_bounds", "drain_replica", "approve"],
    }
    assert served.known["proposal_id"]
    return served


def checked(served: Served, method: str, path: str, mode: schemathesis.GenerationMode) -> Callable[[], None]:
    """Sends requests that were made up from the description, and holds the answers against it."""
    schema = schemathesis.openapi.from_dict(described())
    operation = schema[path][method]

    @settings(
        max_examples=EXAMPLES, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(case=operation.as_strategy(generation_mode=mode), known=st.data())
    def check(case: schemathesis.Case[Any], known: st.DataObject) -> None:
        for name, values in served.known.items():
            if case.path_parameters and name in case.path_parameters and known.draw(st.booleans()):
                case.path_parameters[name] = known.draw(st.sampled_from(values))
        headers = {} if path in OPEN else {"authorization": served.client.headers["authorization"]}
        wanted = case.as_transport_kwargs(base_url="http://swarmx.test", headers=headers)
        try:
            request = requests.Request(**wanted).prepare()
            response = served.send(request)
        except (requests.exceptions.InvalidHeader, UnicodeEncodeError):
            return  # no client could send this
        case.validate_response(response, checks=CHECKS)

    return cast(Callable[[], None], check)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_what_is_asked_as_described_is_answered_as_described(served: Served, method: str, path: str) -> None:
    checked(served, method, path, schemathesis.GenerationMode.POSITIVE)()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        (method, path)
        for method, path in OPERATIONS
        if described()["paths"][path][method.lower()].keys() & {"parameters", "requestBody"}
    ],
)
def test_what_is_asked_otherwise_is_refused_as_described(served: Served, method: str, path: str) -> None:
    checked(served, method, path, schemathesis.GenerationMode.NEGATIVE)()
