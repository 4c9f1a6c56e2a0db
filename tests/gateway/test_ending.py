"""Requests that the end of the server cuts off, as an ASGI server sees them."""

from __future__ import annotations

import asyncio
import json

import pytest
from starlette.types import Message, Receive, Scope, Send

from swarmx.gateway.ending import CutOff


async def cut_off(path: str, *, begun: bool) -> list[Message]:
    """What is sent to a request whose task is cancelled, as uvicorn does when its patience ends."""
    reached, sent = asyncio.Event(), list[Message]()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        reached.set()
        await asyncio.Event().wait()

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {"type": "http", "method": "GET", "path": path, "headers": [], "query_string": b""}
    request = asyncio.ensure_future(CutOff(app)(scope, receive, send))
    await reached.wait()
    request.cancel()
    await request
    return sent


@pytest.mark.parametrize("path", ["/api/v1/workflows/wf-1", "/v1/chat/completions"])
async def test_a_request_without_an_answer_is_told_to_come_again(path: str) -> None:
    start, body = await cut_off(path, begun=False)
    assert start["status"] == 503
    assert (b"retry-after", b"1") in start["headers"]
    told = json.loads(body["body"])
    assert "the server is stopping" in (told["detail"] if "detail" in told else told["error"]["message"])


async def test_an_answer_that_has_begun_breaks_off() -> None:
    (start,) = await cut_off("/v1/chat/completions", begun=True)
    assert start["status"] == 200
