"""What may happen to a workflow from outside: cancel, kill, fork, retry, waiting for it, tags, and who may do so."""

from __future__ import annotations

from typing import Any

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
)

pytestmark = pytest.mark.process

CHAIN = {
    "name": "chain",
    "inputs": {"word": "bee"},
    "nodes": {
        "shout": {"kind": "tool", "function": "upper", "args": {"text": "{{ inputs.word }}"}},
        "ask": {"kind": "llm", "model": CODER, "prompt": "{{ shout }}"},
        "after": {"kind": "tool", "function": "upper", "args": {"text": "{{ inputs.word }} {{ ask.text | length }}"}},
    },
    "outputs": {"shout": "{{ shout }}", "after": "{{ after }}"},
}


async def test_cancelling_is_answered_at_once_and_says_that_it_is_asked_for(world: World) -> None:
    async with world.whole.client("client") as client:
        workflow_id = await submitted(client, HANGS)
        await asked(world.hangs)
        reply = await client.post(f"{API}/{workflow_id}/cancel")
        assert reply.status_code == 202
        assert reply.headers["location"] == f"{API}/{workflow_id}"
        assert reply.json()["state"] in ("cancelling", "cancelled")
        assert (await ended(client, workflow_id))["state"] == "cancelled"
        await asked(world.hangs, calls=0)
        again = await client.post(f"{API}/{workflow_id}/cancel")
        assert (again.status_code, again.json()["state"]) == (202, "cancelled")


async def test_who_prefers_to_wait_learns_that_it_is_cancelled(world: World) -> None:
    async with world.whole.client("client") as client:
        workflow_id = await submitted(client, HANGS)
        reply = await client.post(f"{API}/{workflow_id}/cancel", headers={"prefer": "wait=30"})
        assert (reply.status_code, reply.json()["state"]) == (202, "cancelled")
        assert reply.headers["preference-applied"] == "wait=30"


async def test_a_kill_ends_it_at_once(world: World) -> None:
    async with world.whole.client("client") as client:
        workflow_id = await submitted(client, HANGS)
        await asked(world.hangs)
        reply = await client.post(f"{API}/{workflow_id}/kill")
        assert (reply.status_code, reply.json()["state"]) == (202, "cancelled")
        await asked(world.hangs, calls=0)
        page = (await client.get(f"{API}/{workflow_id}/events", headers={"accept": "application/json"})).json()
        assert page["events"][-1] == {
            "seq": page["next_after"],
            **page["events"][-1],
            "type": "Cancelled",
            "killed": True,
        }
        assert (await client.post(f"{API}/{workflow_id}/kill")).json()["ended_at_s"] == reply.json()["ended_at_s"]


async def test_a_retry_does_again_what_failed_and_keeps_the_rest(world: World) -> None:
    async with world.whole.client("client") as client:
        world.answers.mood = "reject"
        old = await ended(client, await submitted(client, CHAIN))
        assert (old["state"], old["error_node"]) == ("failed", "ask")
        world.answers.mood = "fine"
        reply = await client.post(f"{API}/{old['workflow_id']}/retry", headers={"prefer": "wait=30"})
        assert reply.status_code == 200
        row = reply.json()
        assert reply.headers["location"] == f"{API}/{row['workflow_id']}"
        assert (row["state"], row["forked_from"]) == ("finished", old["workflow_id"])
        assert row["outputs"]["shout"] == "BEE"
        shout = next(node for node in row["nodes"] if node["path"] == "shout")
        assert shout["state"] == "finished"
        assert (await ended(client, old["workflow_id"]))["state"] == "failed", "what has ended stays as it is"


async def test_only_a_failed_workflow_can_be_retried(world: World) -> None:
    async with world.whole.client("client") as client:
        for workflow, state in ((INSTANT, "finished"), (HANGS, "running")):
            workflow_id = await submitted(client, workflow)
            if state == "finished":
                await ended(client, workflow_id)
            reply = await client.post(f"{API}/{workflow_id}/retry")
            body = refused(reply, 409)
            assert body["rule"] == "state"
            assert f"is {state}" in body["detail"]
            assert reply.headers["x-should-retry"] == "false"
        late = await submitted(client, {**WAITS, "deadline_s": 0.2})
        assert (await ended(client, late))["error"] == "deadline"
        assert "failed at no node (deadline)" in refused(await client.post(f"{API}/{late}/retry"), 409)["detail"]


async def test_a_fork_takes_over_the_beginning_and_may_have_other_inputs(world: World) -> None:
    async with world.whole.client("client") as client:
        old = await ended(client, await submitted(client, CHAIN))
        wanted = {"from_node": "after", "inputs": {"word": "wasp"}}
        reply = await client.post(f"{API}/{old['workflow_id']}/fork", json=wanted, headers={"prefer": "wait=30"})
        row = reply.json()
        assert row["inputs"] == {"word": "wasp"}
        assert row["outputs"] == {"shout": "BEE", "after": old["outputs"]["after"].replace("BEE", "WASP")}
        assert world.answers.calls == 1, "what had been answered before is kept"


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"from_node": "nope"}, "no node 'nope'"),
        ({"from_node": "ask", "inputs": {"wrod": "x"}}, "word"),
        ({"from_node": "ask", "inputs": {"word": None}}, "must be given"),
        ({"from_node": "ask", "inputs": [1]}, "inputs"),
        ({}, "from_node"),
        ({"from_node": "ask", "node": "b"}, "node"),
    ],
)
async def test_a_fork_that_makes_no_sense_is_refused(world: World, wanted: dict[str, Any], said: str) -> None:
    async with world.whole.client("client") as client:
        old = await ended(client, await submitted(client, CHAIN))
        assert said in refused(await client.post(f"{API}/{old['workflow_id']}/fork", json=wanted), 422)["detail"]


async def test_a_workflow_of_headers_is_its_clients_own(world: World) -> None:
    async with world.whole.client("client") as client:
        headers = {"x-swarmx-workflow-id": "mine"}
        body = {"model": CODER, "messages": [{"role": "user", "content": "Hi."}]}
        assert (await client.post("/v1/chat/completions", json=body, headers=headers)).status_code == 200
        (row,) = (await client.get(API)).json()["workflows"]
        for path, wanted in (("kill", None), ("fork", {"from_node": "a"})):
            reply = await client.post(f"{API}/{row['workflow_id']}/{path}", json=wanted)
            assert "its client's own" in refused(reply, 422)["detail"]
        page = await client.get(f"{API}/{row['workflow_id']}/events", headers={"accept": "application/json"})
        assert page.json()["events"][0]["type"] == "ProgramStarted"


async def test_whoever_prefers_to_wait_gets_the_whole_workflow(world: World) -> None:
    async with world.whole.client("client") as client:
        reply = await client.post(API, json=ASK, headers={"prefer": "respond-async, wait=30"})
        assert (reply.status_code, reply.json()["state"]) == (200, "finished")
        assert reply.headers["preference-applied"] == "wait=30"
        assert reply.headers["location"] == f"{API}/{reply.json()['workflow_id']}"
        assert len(reply.json()["calls"]) == 1


async def test_patience_ends_and_is_capped(world: World) -> None:
    async with world.whole.client("client") as client:
        reply = await client.post(API, json=HANGS, headers={"prefer": "wait=0"})
        assert (reply.status_code, reply.json()["state"]) == (202, "running")
        shown = await client.get(reply.headers["location"], headers={"prefer": "wait=0"})
        assert (shown.status_code, shown.json()["state"]) == (200, "running")
        quick = await client.post(API, json=INSTANT, headers={"prefer": 'wait="3600"; now'})
        assert quick.headers["preference-applied"] == "wait=60"


@pytest.mark.parametrize("wish", ["wait=soon", "wait", "wait=-1", "wait=1.5", "wait=" + "9" * 20])
async def test_a_wish_that_cannot_be_read_is_refused_before_anything_runs(world: World, wish: str) -> None:
    async with world.whole.client("client") as client:
        assert "whole seconds" in refused(await client.post(API, json=ASK, headers={"prefer": wish}), 400)["detail"]
        assert (await client.get(API)).json()["workflows"] == []


async def test_a_tag_spares_who_has_seen_it_already(world: World) -> None:
    async with world.whole.client("client") as client:
        workflow_id = await submitted(client, HANGS)
        await asked(world.hangs)
        first = await client.get(f"{API}/{workflow_id}")
        tag = first.headers["etag"]
        assert tag.startswith(f'W/"{workflow_id}-')
        for known in (tag, tag.removeprefix("W/"), f'"other", {tag}', "*"):
            reply = await client.get(f"{API}/{workflow_id}", headers={"if-none-match": known})
            assert (reply.status_code, reply.content, reply.headers["etag"]) == (304, b"", tag)
        await client.post(f"{API}/{workflow_id}/cancel", headers={"prefer": "wait=30"})
        after = await client.get(f"{API}/{workflow_id}", headers={"if-none-match": tag})
        assert (after.status_code, after.json()["state"]) == (200, "cancelled")


async def test_pages_say_whether_there_is_more_and_hold_still_while_others_arrive(world: World) -> None:
    async with world.whole.client("client") as client:
        made = [await submitted(client, INSTANT) for _ in range(5)]
        seen: list[str] = []
        params: dict[str, str] = {"limit": "2"}
        while True:
            page = (await client.get(API, params=params)).json()
            seen += [row["workflow_id"] for row in page["workflows"]]
            assert page["has_more"] == (page["next_cursor"] is not None)
            if not page["has_more"]:
                break
            params["cursor"] = page["next_cursor"]
            await submitted(client, INSTANT)
        assert seen == made[::-1]


EACH = [
    ("GET", "", None),
    ("GET", "/events", None),
    ("POST", "/cancel", None),
    ("POST", "/kill", None),
    ("POST", "/retry", None),
    ("POST", "/fork", {"from_node": "a"}),
    ("POST", "/signals/approve", True),
]


async def test_for_another_tenant_it_does_not_exist(world: World) -> None:
    keys = world.whole.context.keys
    stranger = {"authorization": f"Bearer {keys.add('stranger', 'client', 'elsewhere')}"}
    async with world.whole.client("client") as client, world.whole.client() as other:
        workflow_id = await submitted(client, HANGS)
        for method, path, body in EACH:
            for name in (workflow_id, "wf-unknown"):
                reply = await other.request(method, f"{API}/{name}{path}", json=body, headers=stranger)
                detail = refused(reply, 404)["detail"].replace(name, "ID")
                assert detail.startswith("there is no workflow 'ID'")
        assert (await client.get(f"{API}/{workflow_id}")).json()["state"] == "running"


async def test_who_only_looks_changes_nothing(world: World) -> None:
    async with world.whole.client("client") as client, world.whole.client("viewer") as viewer:
        workflow_id = await submitted(client, HANGS)
        for method, path, body in EACH:
            if method == "POST":
                assert "viewer" in refused(await viewer.post(f"{API}/{workflow_id}{path}", json=body), 403)["detail"]
        assert (await viewer.get(f"{API}/{workflow_id}")).json()["state"] == "running"
