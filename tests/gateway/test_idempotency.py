"""Idempotency-Key over a whole SwarmX: once, however often it is asked; and never for something else."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.gateway.workflow_world import (
    API,
    ASK,
    CODER,
    HANGS,
    INSTANT,
    WAITS,
    World,
    asked,
    ended,
    refused,
    submitted,
    world_in,
)

pytestmark = pytest.mark.process

KEY = {"idempotency-key": "order-1"}


async def count(client: httpx.AsyncClient) -> int:
    return len((await client.get(API)).json()["workflows"])


async def types(client: httpx.AsyncClient, workflow_id: str) -> list[str]:
    page = await client.get(f"{API}/{workflow_id}/events", headers={"accept": "application/json"})
    return [event["type"] for event in page.json()["events"]]


async def test_the_same_key_brings_one_workflow_and_the_same_answer(world: World) -> None:
    async with world.whole.client("client") as client:
        first = await client.post(API, json=INSTANT, headers=KEY)
        assert "idempotency-replayed" not in first.headers
        await ended(client, first.json()["workflow_id"])
        for _ in range(2):
            again = await client.post(API, json=INSTANT, headers=KEY)
            assert again.headers["idempotency-replayed"] == "true"
            assert (again.status_code, again.json()) == (first.status_code, first.json())
            assert again.headers["location"] == first.headers["location"]
        assert await count(client) == 1


async def test_the_layout_of_the_body_does_not_count_and_quotes_are_no_part_of_the_key(world: World) -> None:
    async with world.whole.client("client") as client:
        first = await client.post(API, content=b'{"workflow": {"name": "n", "nodes": %b}}' % NODES, headers=KEY)
        same = b'{ "workflow":\n {"nodes": %b, "name": "n"} }' % NODES
        again = await client.post(API, content=same, headers={"idempotency-key": '"order-1"'})
        assert (again.status_code, again.json()) == (202, first.json())


NODES = b'{"a": {"kind": "tool", "function": "upper", "args": {"text": "x"}}}'


async def test_a_key_that_comes_with_something_else_is_refused(world: World) -> None:
    async with world.whole.client("client") as client:
        first = (await client.post(API, json=INSTANT, headers=KEY)).json()["workflow_id"]
        for path, body in (("", ASK), (f"/{first}/cancel", None), (f"/{first}/fork", {"from_node": "a"})):
            detail = refused(await client.post(f"{API}{path}", json=body, headers=KEY), 422)["detail"]
            assert first in detail
            assert "another request" in detail
        assert await count(client) == 1


async def test_of_two_at_once_one_is_told_to_come_again(world: World) -> None:
    async with world.whole.client("client") as client:
        replies = await asyncio.gather(*(client.post(API, json=INSTANT, headers=KEY) for _ in range(5)))
        first, *others = sorted(replies, key=lambda reply: reply.status_code)
        assert first.status_code == 202
        for reply in others:
            assert refused(reply, 409)["rule"] == "in_flight"
            assert reply.headers["retry-after"] == "1"
            assert "x-should-retry" not in reply.headers
        assert (await client.post(API, json=INSTANT, headers=KEY)).json() == first.json()
        assert await count(client) == 1


async def test_a_key_belongs_to_a_tenant(world: World) -> None:
    stranger = {"authorization": f"Bearer {world.whole.context.keys.add('stranger', 'client', 'elsewhere')}"}
    async with world.whole.client("client") as client:
        first = await client.post(API, json=INSTANT, headers=KEY)
        other = await client.post(API, json=ASK, headers={**KEY, **stranger})
        assert other.status_code == 202
        assert other.json() != first.json()


async def test_a_refused_request_does_not_use_up_its_key(world: World) -> None:
    async with world.whole.client("client") as client:
        refused(await client.post(API, json={"name": "x", "nodes": {}}, headers=KEY), 422)
        assert (await client.post(API, json=INSTANT, headers=KEY)).status_code == 202


@pytest.mark.parametrize("text", ["", '""', "x" * 256, "Grüße", "a\tb"])
async def test_what_is_no_key_is_refused(world: World, text: str) -> None:
    async with world.whole.client("client") as client:
        header = (b"idempotency-key", text.encode("latin-1"))
        reply = await client.post(API, json=INSTANT, headers=httpx.Headers([header]))
        assert "1 to 255 printable" in refused(reply, 400)["detail"]
        assert await count(client) == 0


async def test_two_keys_are_none(world: World) -> None:
    async with world.whole.client("client") as client:
        headers = httpx.Headers([("idempotency-key", "a"), ("idempotency-key", "b")])
        refused(await client.post(API, json=INSTANT, headers=headers), 400)


async def test_a_restart_forgets_no_key(tmp_path: Path) -> None:
    replies: list[dict[str, Any]] = []
    token = ""
    for _ in range(2):
        async with world_in(tmp_path / "state") as world:
            token = token or world.whole.token("client")
            async with world.whole.client() as client:
                reply = await client.post(API, json=INSTANT, headers={**KEY, "authorization": f"Bearer {token}"})
                replies.append(reply.json())
    assert replies[0] == replies[1]


@pytest.mark.parametrize("path", ["cancel", "kill"])
async def test_ending_with_a_key_is_answered_alike(world: World, path: str) -> None:
    async with world.whole.client("client") as client:
        workflow_id = await submitted(client, HANGS)
        await asked(world.hangs)
        first = await client.post(f"{API}/{workflow_id}/{path}", headers=KEY)
        assert (await ended(client, workflow_id))["state"] == "cancelled"
        again = await client.post(f"{API}/{workflow_id}/{path}", headers=KEY)
        assert again.headers["idempotency-replayed"] == "true"
        assert (again.status_code, again.headers["location"]) == (202, first.headers["location"])
        assert (await types(client, workflow_id)).count("Cancelled") == 1
        refused(await client.post(f"{API}/{await submitted(client, HANGS)}/{path}", headers=KEY), 422)


async def test_a_retry_and_a_fork_with_a_key_begin_one_workflow(world: World) -> None:
    async with world.whole.client("client") as client:
        world.answers.mood = "reject"
        old = (await ended(client, await submitted(client, ASK)))["workflow_id"]
        for path, body in (("retry", None), ("fork", {"from_node": "a"})):
            headers = {"idempotency-key": path}
            first, again = [await client.post(f"{API}/{old}/{path}", json=body, headers=headers) for _ in range(2)]
            assert (again.status_code, again.json()) == (202, first.json())
            assert again.headers["idempotency-replayed"] == "true"
        assert await count(client) == 3


async def test_the_keys_of_an_operator_are_not_those_of_the_tenant_whose_workflow_it_is(world: World) -> None:
    async with world.whole.client("client", tenant="red") as red, world.whole.client("operator", tenant="ops") as ops:
        world.answers.mood = "reject"
        old = (await ended(red, await submitted(red, ASK)))["workflow_id"]
        for path, body in (("retry", None), ("fork", {"from_node": "a"})):
            headers = {"idempotency-key": path}
            first, again = [await ops.post(f"{API}/{old}/{path}", json=body, headers=headers) for _ in range(2)]
            assert (again.json(), again.headers["idempotency-replayed"]) == (first.json(), "true")
            own = await red.post(f"{API}/{old}/{path}", json=body, headers=headers)
            assert (own.status_code, "idempotency-replayed" in own.headers) == (202, False)
            assert own.json()["workflow_id"] != first.json()["workflow_id"]
            assert (await red.get(first.headers["location"])).json()["tenant"] == "red"


async def test_another_signal_of_the_same_name_is_a_conflict(world: World) -> None:
    async with world.whole.client("client") as client:
        workflow_id = await submitted(client, HANGS | {"signals": {"approve": {}}})
        path = f"{API}/{workflow_id}/signals/approve"
        assert (await client.post(path, json={"who": "ann"})).status_code == 202
        second = refused(await client.post(path, json={"who": "bob"}), 409)
        assert (second["rule"], '{"who":"ann"}' in second["detail"]) == ("signal", True)


async def test_a_signal_with_a_key_counts_once_also_after_its_workflow_has_ended(world: World) -> None:
    async with world.whole.client("client") as client:
        workflow_id = await submitted(client, WAITS)
        path = f"{API}/{workflow_id}/signals/approve"
        first = await client.post(path, json={"who": "ann"}, headers=KEY)
        assert (first.status_code, first.json()["repeated"]) == (202, False)
        assert first.headers["location"] == f"{API}/{workflow_id}"
        assert (await ended(client, workflow_id))["outputs"] == {"a": "ANN"}
        again = await client.post(path, json={"who": "ann"}, headers=KEY)
        assert (again.status_code, again.json()["repeated"]) == (202, True)
        assert again.headers["idempotency-replayed"] == "true"
        refused(await client.post(path, json={"who": "bob"}, headers=KEY), 422)
        assert "SignalReceived" in await types(client, workflow_id)


async def test_a_signal_that_cannot_be_is_refused(world: World) -> None:
    async with world.whole.client("client") as client:
        workflow_id = await submitted(client, WAITS)
        assert "approve" in refused(await client.post(f"{API}/{workflow_id}/signals/aprove", json=1), 422)["detail"]
        path = f"{API}/{workflow_id}/signals/approve"
        assert "is JSON" in refused(await client.post(path, content=b"{"), 400)["detail"]
        assert "is JSON" in refused(await client.post(path, content=b'"\xff"'), 400)["detail"]
        assert (await client.post(path, json={"who": "x"})).status_code == 202
        await ended(client, workflow_id)
        assert "ended" in refused(await client.post(path, json={"who": "x"}), 422)["detail"]


async def test_a_key_and_a_wish_to_wait_go_together(world: World) -> None:
    async with world.whole.client("client") as client:
        headers = {**KEY, "prefer": "wait=30"}
        first, again = [await client.post(API, json=ASK, headers=headers) for _ in range(2)]
        assert (first.status_code, again.status_code) == (200, 200)
        assert again.json()["outputs"] == first.json()["outputs"]
        assert world.answers.calls == 1, CODER
