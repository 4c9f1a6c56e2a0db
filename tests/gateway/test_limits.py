"""The limit on bodies, as an ASGI server sees it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from swarmx.gateway.limits import BodyLimit

LIMIT = 100


class Client:
    """One request whose body comes in these parts; keeps what it is sent."""

    def __init__(self, parts: Sequence[bytes], *, length: str | None = None, path: str = "/api/v1/workflows") -> None:
        headers = [] if length is None else [(b"content-length", length.encode())]
        self.scope: Scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
        self.parts = list(parts)
        self.sent: list[Message] = []

    async def receive(self) -> Message:
        if not self.parts:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": self.parts.pop(0), "more_body": bool(self.parts)}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        found: int = self.sent[0]["status"]
        return found

    @property
    def body(self) -> Any:
        return json.loads(b"".join(message.get("body", b"") for message in self.sent[1:]))


class App:
    """Reads a whole body and says how long it was; may hide what went wrong, or answer before it reads."""

    def __init__(self, *, hides: bool = False, early: bool = False) -> None:
        self.hides, self.early = hides, early
        self.called = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.called = True
        if self.early:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        size, more, status = 0, True, 200
        try:
            while more:
                message = await receive()
                size += len(message["body"])
                more = message["more_body"]
        except Exception:
            if not self.hides:
                raise
            status = 400
        if not self.early:
            await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": str(size).encode()})


async def ask(app: App, client: Client) -> None:
    await BodyLimit(app, max_bytes=LIMIT)(client.scope, client.receive, client.send)


@pytest.mark.parametrize("parts", [[b"x" * 100], [b"x" * 50, b"x" * 50], [b""], [b"", b"x", b""]])
async def test_a_body_within_the_limit_goes_through(parts: list[bytes]) -> None:
    client = Client(parts, length=str(sum(map(len, parts))))
    await ask(App(), client)
    assert client.status == 200
    assert client.sent[1]["body"] == str(sum(map(len, parts))).encode()


async def test_a_body_that_says_it_is_too_large_never_reaches_the_app() -> None:
    app, client = App(), Client([b"x" * 101], length="101")
    await ask(app, client)
    assert client.status == 413
    assert not app.called
    assert client.body["detail"].startswith("the body is larger than 100 bytes")
    assert (b"connection", b"close") in client.sent[0]["headers"]


@pytest.mark.parametrize("hides", [False, True])
@pytest.mark.parametrize("length", [None, "5", "nonsense"])
async def test_a_body_that_turns_out_too_large_is_refused(hides: bool, length: str | None) -> None:
    client = Client([b"x" * 60] * 5, length=length)
    await ask(App(hides=hides), client)
    assert [message["type"] for message in client.sent] == ["http.response.start", "http.response.body"]
    assert client.status == 413


async def test_the_rest_of_a_refused_body_is_read_so_that_its_client_hears_the_answer() -> None:
    client = Client([b"x" * 60] * 5, length="300")
    await ask(App(), client)
    assert client.parts == []


async def test_a_client_that_is_gone_is_not_waited_for() -> None:
    client = Client([], length="300")
    await ask(App(), client)
    assert client.status == 413


async def test_an_answer_that_has_begun_is_not_begun_again() -> None:
    client = Client([b"x" * 60] * 5)
    await ask(App(early=True), client)
    assert [m["type"] for m in client.sent] == ["http.response.start"]
    assert client.status == 200


async def test_under_v1_the_refusal_has_openais_shape() -> None:
    client = Client([b"x" * 101], length="101", path="/v1/chat/completions")
    await ask(App(), client)
    assert client.body["error"]["type"] == "invalid_request_error"


async def test_what_is_not_http_goes_through() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    client = Client([])
    await BodyLimit(app, max_bytes=LIMIT)({"type": "lifespan"}, client.receive, client.send)
    assert seen == ["lifespan"]


async def test_what_the_app_raises_is_not_swallowed() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise LookupError("own")

    client = Client([b""])
    with pytest.raises(LookupError, match="own"):
        await BodyLimit(app, max_bytes=LIMIT)(client.scope, client.receive, client.send)
