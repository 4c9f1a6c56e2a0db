"""Who may do and see what by the REST API of a real server: tokens, roles and tenants."""

from __future__ import annotations

import pytest

from swarmx.core.control import Role
from swarmx.gateway.keys import Keyring
from tests.e2e.fleet import Http, Server, a_key, honoured, refused, until

pytestmark = pytest.mark.process

ONE_CALL = {
    "name": "one",
    "nodes": {"ask": {"kind": "llm", "model": "qwen3-8b", "prompt": "Secret?", "max_tokens": 12}},
}

PATHS = [
    ("POST", "/api/v1/workflows"),
    ("GET", "/api/v1/workflows"),
    ("GET", "/api/v1/workflows/x"),
    ("GET", "/api/v1/workflows/x/events"),
    ("POST", "/api/v1/workflows/x/cancel"),
    ("POST", "/api/v1/workflows/x/kill"),
    ("POST", "/api/v1/workflows/x/retry"),
    ("POST", "/api/v1/workflows/x/fork"),
    ("POST", "/api/v1/workflows/x/signals/y"),
    ("GET", "/api/v1/calls/x"),
    ("GET", "/api/v1/calls/x/why"),
    ("GET", "/api/v1/replicas"),
    ("GET", "/api/v1/policies"),
    ("PUT", "/api/v1/policies/routing"),
    ("GET", "/api/v1/blobs/x"),
    ("GET", "/metrics"),
]


@pytest.mark.parametrize(("method", "path"), PATHS)
@pytest.mark.parametrize("header", [None, "Bearer swx-wrong", "Basic abc", "Bearer "])
async def test_every_path_wants_a_token(http: Http, method: str, path: str, header: str | None) -> None:
    headers = {"authorization": header} if header else {}
    reply = await http.ask(method, path, token="", headers=headers)
    refused(reply, 401)
    assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("role", "method", "path", "status"),
    [
        ("client", "GET", "/api/v1/replicas", 403),
        ("client", "PUT", "/api/v1/policies/routing", 403),
        ("viewer", "PUT", "/api/v1/policies/routing", 403),
        ("viewer", "POST", "/api/v1/workflows", 403),
        ("viewer", "POST", "/api/v1/workflows/x/cancel", 403),
        ("viewer", "GET", "/api/v1/replicas", 200),
        ("operator", "PUT", "/api/v1/policies/routing", 200),
    ],
)
async def test_a_role_may_do_what_it_says_and_no_more(
    server: Server, http: Http, role: Role, method: str, path: str, status: int
) -> None:
    active = (await http.get("/api/v1/policies")).body["active"]
    with a_key(server, role) as token:
        await honoured(http, token)
        reply = await http.ask(method, path, token=token, json=active if method == "PUT" else None)
    if status == 403:
        assert f"has the role '{role}'" in refused(reply, 403)["detail"]
    else:
        assert reply.status == status


async def test_things_of_another_tenant_do_not_exist(server: Server, http: Http) -> None:
    workflow_id = await http.submitted(ONE_CALL)
    await http.ended(workflow_id)
    shown = await until(lambda: http.get(f"/api/v1/workflows/{workflow_id}"), lambda reply: reply.body["calls"])
    call_id = shown.body["calls"][0]["call_id"]
    with a_key(server, "client", "rest-stranger") as stranger, a_key(server, "client") as friend:
        await honoured(http, stranger)
        await honoured(http, friend)
        for method, path in [
            ("GET", f"/api/v1/workflows/{workflow_id}"),
            ("POST", f"/api/v1/workflows/{workflow_id}/cancel"),
            ("GET", f"/api/v1/calls/{call_id}"),
            ("GET", f"/api/v1/calls/{call_id}/why"),
        ]:
            refused(await http.ask(method, path, token=stranger), 404)
            assert (await http.ask(method, path, token=friend)).status < 300, path
        assert (await http.get("/api/v1/workflows", token=stranger)).body["workflows"] == []


async def test_health_is_open_and_metrics_are_for_those_who_may_read_all(server: Server, http: Http) -> None:
    assert (await http.get("/healthz", token="")).body == {"status": "ok"}
    ready = await http.get("/readyz", token="")
    assert (ready.status, ready.body) == (200, {"ready_replicas": 4})
    refused(await http.get("/metrics", token=""), 401)
    await http.ended(await http.submitted(ONE_CALL))
    counted = b'swarmx_calls_total{model="qwen3-8b",state="finished"}'
    reply = await until(lambda: http.get("/metrics"), lambda reply: counted in reply.body)
    text = reply.body.decode()
    assert 'swarmx_replicas{model="qwen3-8b",state="ready"} 3.0' in text
    assert "swarmx_records_lost_total 0.0" in text
    with a_key(server, "client") as token:
        await honoured(http, token)
        refused(await http.get("/metrics", token=token), 403)


async def test_a_revoked_key_is_refused_soon(server: Server, http: Http) -> None:
    token = server.key("soon-gone", "client")
    await honoured(http, token)
    Keyring(server.state_dir / "keys.json").revoke("soon-gone")
    await until(lambda: http.get("/v1/models", token=token), lambda reply: reply.status == 401)
