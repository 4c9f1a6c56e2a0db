"""The small REST client: what it makes of answers, refusals and servers that are none."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from swarmx.client import Api, ApiError, token_for
from swarmx.core.errors import ConfigError
from tests.e2e.fleet import Http, Server


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    """A client of a server that is none of ours."""

    async def echo(request: web.Request) -> web.Response:
        text = await request.text()
        auth = request.headers["authorization"]
        return web.json_response({"query": dict(request.query), "body": text, "auth": auth, "method": request.method})

    async def problem(request: web.Request) -> web.Response:
        body = {"status": 409, "detail": "it is so"}
        return web.json_response(body, status=409, content_type="application/problem+json")

    async def other(request: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "in another shape"}}, status=503)

    async def html(request: web.Request) -> web.Response:
        return web.Response(text="<html>", content_type="text/html", status=int(request.query["status"]))

    async def cut(request: web.Request) -> web.Response:
        return web.Response(text="{", content_type="application/json")

    async def hang_up(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.close()
        await asyncio.Event().wait()
        raise AssertionError

    app = web.Application()
    for path, handler in {
        "/echo": echo, "/problem": problem, "/other": other, "/html": html, "/cut": cut, "/hang_up": hang_up,
    }.items():  # fmt: skip
        app.router.add_route("*", path, handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with Api(f"http://127.0.0.1:{runner.addresses[0][1]}/", "swx-1") as found:
        yield found
    await runner.cleanup()


async def test_an_answer_is_decoded_and_the_token_goes_along(api: Api) -> None:
    seen = await api.get("/echo", a=1, b=None, c="x")
    assert seen == {"query": {"a": "1", "c": "x"}, "body": "", "auth": "Bearer swx-1", "method": "GET"}


async def test_bodies_are_sent_as_bytes_or_as_json(api: Api) -> None:
    assert (await api.post("/echo", data=b"raw"))["body"] == "raw"
    assert (await api.post("/echo", json={"a": 1}))["body"] == '{"a": 1}'
    seen = await api.put("/echo", json=[1])
    assert (seen["method"], seen["body"]) == ("PUT", "[1]")


async def test_a_refusal_is_an_error_in_the_servers_own_words(api: Api) -> None:
    with pytest.raises(ApiError, match=r"^it is so$") as caught:
        await api.get("/problem")
    assert caught.value.status == 409


async def test_a_refusal_in_another_shape_is_an_error_too(api: Api) -> None:
    with pytest.raises(ApiError, match=r"status 503.*in another shape") as caught:
        await api.get("/other")
    assert caught.value.status == 503


async def test_text_is_returned_or_quoted(api: Api) -> None:
    assert await api.get("/html", status=200) == "<html>"
    with pytest.raises(ApiError, match="status 500: <html>"):
        await api.get("/html", status=500)


@pytest.mark.parametrize("path", ["/cut", "/hang_up"])
async def test_a_server_that_speaks_otherwise_is_said_to(api: Api, path: str) -> None:
    with pytest.raises(ConfigError, match="Is it a SwarmX server"):
        await api.get(path)


async def test_no_server_is_said_with_what_to_do() -> None:
    with socket.socket() as taken:  # bound, not listening: nobody else gets the port
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        async with Api(url, "x") as api:
            with pytest.raises(ConfigError, match=rf"nobody answers at {url}\. Start a server with `swarmx up`"):
                await api.get("/x")


@pytest.mark.parametrize("url", ["nonsense", "http://", "ftp://127.0.0.1"])
async def test_an_address_that_is_none_is_said_to_be(url: str) -> None:
    async with Api(url, "x") as api:
        with pytest.raises(ConfigError, match="is not an address"):
            await api.get("/x")


def test_the_token_is_that_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "admin.token").write_text("of-the-file\n")
    monkeypatch.setenv("SWARMX_TOKEN", " of-the-environment\n")
    assert token_for(tmp_path) == "of-the-environment"


def test_else_the_token_is_that_which_the_server_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SWARMX_TOKEN", raising=False)
    (tmp_path / "admin.token").write_text("of-the-file\n")
    assert token_for(tmp_path) == "of-the-file"


def test_without_a_token_both_ways_to_one_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SWARMX_TOKEN", raising=False)
    with pytest.raises(ConfigError, match=r"\$SWARMX_TOKEN is not set and .*admin\.token.*swarmx keys add"):
        token_for(tmp_path)


@pytest.mark.process
async def test_it_speaks_to_a_real_server(server: Server, http: Http) -> None:
    async with Api(server.url, server.token) as api:
        assert await api.get("/healthz") == {"status": "ok"}
        assert "swarmx_replicas" in await api.get("/metrics")
        with pytest.raises(ApiError, match="no workflow 'x'") as caught:
            await api.get("/api/v1/workflows/x")
        assert caught.value.status == 404
