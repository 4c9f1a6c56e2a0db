"""The operators' REST API over a whole SwarmX: console, tools, proposals, audit, scaling, episodes, rights."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from swarmx.core.audit import Report
from swarmx.memory.audit import verify_files
from tests.gateway.whole import ELASTIC, MODEL, Whole, whole

pytestmark = pytest.mark.process

BOUNDS = {"model": ELASTIC, "min_replicas": 0, "max_replicas": 3}


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[Whole]:
    async with whole(tmp_path / "state") as found:
        yield found


def events(text: str) -> list[tuple[str, Any]]:
    """The server-sent events, each with its name and data; their ids count from 1."""
    found = []
    for number, block in enumerate(text.strip().split("\n\n"), start=1):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        assert fields["id"] == str(number)
        found.append((fields["event"], json.loads(fields["data"])))
    return found


async def test_the_console_streams_an_answer_and_ends_it(world: Whole) -> None:
    async with world.client("viewer") as client:
        reply = await client.post("/api/v1/console", json={"text": "how is the cluster?"})
    assert reply.headers["content-type"].startswith("text/event-stream")
    found = events(reply.text)
    assert found[0][0] == "text"
    assert "2 replicas of 2 models are ready" in found[0][1]["text"]
    assert "evidence" in [name for name, _ in found]
    assert found[-1][0] == "done"


async def test_the_console_answers_in_one_json_where_that_is_wanted(world: Whole) -> None:
    async with world.client("operator") as client:
        accept = {"accept": "application/json"}
        reply = await client.post("/api/v1/console", json={"text": f"set bounds of {ELASTIC} to 0..3"}, headers=accept)
        answer = reply.json()
        assert answer["error"] is None
        assert answer["proposal"]["state"] == "open"
        assert answer["proposal"]["via"] == "console"
        refused = await client.post("/api/v1/console", json={"text": f"scale {ELASTIC} to 99"}, headers=accept)
        assert refused.json()["error"]["rule"]
        assert refused.json()["proposal"] is None


@pytest.mark.parametrize("body", [{}, {"text": ""}, {"text": "x" * 2001}, {"text": "status", "more": 1}, {"text": 3}])
async def test_a_bad_sentence_is_unprocessable(world: Whole, body: Any) -> None:
    async with world.client("operator") as client:
        assert (await client.post("/api/v1/console", json=body)).status_code == 422


async def test_tools_are_listed_with_their_schema(world: Whole) -> None:
    async with world.client("viewer") as client:
        rows = {row["name"]: row for row in (await client.get("/api/v1/tools")).json()["tools"]}
    assert rows["set_replica_bounds"]["role"] == "operator"
    assert set(rows["set_replica_bounds"]["arguments"]["properties"]) == set(BOUNDS)
    assert rows["inspect_model"]["effect"] == "read"
    assert rows["scale_model"]["schema"]["function"]["strict"] is True


async def test_a_reading_tool_reads(world: Whole) -> None:
    async with world.client("viewer") as client:
        reply = await client.post("/api/v1/tools/inspect_model", json={"arguments": {"model": MODEL}})
        assert reply.json()["result"]["model"]["ready"] == 2
        unknown = await client.post("/api/v1/tools/inspect_model", json={"arguments": {"model": "nobody"}})
    assert unknown.status_code == 404


async def test_a_tool_is_tried_dry_unless_told_otherwise(world: Whole) -> None:
    async with world.client("operator") as client:
        reply = await client.post("/api/v1/tools/set_replica_bounds", json={"arguments": BOUNDS})
        assert reply.json()["verdict"]["allowed"] is True
        assert [(c["what"], c["before"], c["after"]) for c in reply.json()["diff"]["changes"]] == [
            ("max_replicas", 2, 3)
        ]
        assert (await client.get("/api/v1/audit")).json()["records"] == []
        assert (await client.get("/api/v1/proposals")).json()["proposals"] == []


async def test_an_order_is_applied_at_once_and_audited(world: Whole) -> None:
    async with world.client("operator") as client:
        body = {"arguments": BOUNDS, "reason": "more to come", "dry_run": False}
        reply = await client.post("/api/v1/tools/set_replica_bounds", json=body)
        assert reply.status_code == 200
        proposal = reply.json()
        assert (proposal["state"], proposal["via"], proposal["reason"]) == ("applied", "rest", "more to come")
        rows = {row["model"]: row for row in (await client.get("/api/v1/scaling")).json()["models"]}
        assert (rows[ELASTIC]["min_replicas"], rows[ELASTIC]["max_replicas"], rows[ELASTIC]["limit"]) == (0, 3, 4)
        assert set((await client.get("/api/v1/scaling")).json()) == {"active", "models", "plans", "alerts"}
        records = (await client.get("/api/v1/audit")).json()["records"]
        assert [r["entry"]["kind"] for r in records] == ["intent", "outcome"]
        assert all(r["entry"]["proposal_id"] == proposal["proposal_id"] for r in records)
        verdict = (await client.get("/api/v1/audit/verify")).json()
        assert verdict["sound"] is True
        assert verdict["report"]["records"] == 2


async def test_the_command_line_is_named_in_the_audit_log(world: Whole) -> None:
    async with world.client("operator") as client:
        body = {"arguments": BOUNDS, "dry_run": False}
        for said, via in (("cli", "cli"), ("coordinator", "rest")):
            body["arguments"] = {**BOUNDS, "max_replicas": 3 if said == "cli" else 1}
            reply = await client.post("/api/v1/tools/set_replica_bounds", json=body, headers={"x-swarmx-via": said})
            assert reply.json()["via"] == via


async def test_a_refusal_is_a_conflict_that_names_its_rule(world: Whole) -> None:
    async with world.client("operator") as client:
        body = {"arguments": {**BOUNDS, "max_replicas": 2}, "dry_run": False}
        reply = await client.post("/api/v1/tools/set_replica_bounds", json=body)
        assert reply.status_code == 409
        assert reply.headers["content-type"] == "application/problem+json"
        assert reply.json()["rule"] == "no_effect"
        dry = await client.post("/api/v1/tools/set_replica_bounds", json={"arguments": body["arguments"]})
        assert dry.json()["verdict"] == {**dry.json()["verdict"], "allowed": False, "rule": "no_effect"}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("nothing", {}),
        ("set_replica_bounds", {}),
        ("set_replica_bounds", {**BOUNDS, "more": 1}),
        ("set_replica_bounds", {**BOUNDS, "max_replicas": "3"}),
        ("set_replica_bounds", {**BOUNDS, "min_replicas": 5}),
    ],
)
async def test_arguments_that_do_not_fit_are_a_bad_request(world: Whole, name: str, arguments: Any) -> None:
    async with world.client("operator") as client:
        for dry_run in (True, False):
            body = {"arguments": arguments, "dry_run": dry_run}
            assert (await client.post(f"/api/v1/tools/{name}", json=body)).status_code == 400


async def proposed(client: Any) -> str:
    accept = {"accept": "application/json"}
    body = {"text": f"set bounds of {ELASTIC} to 0..3"}
    name: str = (await client.post("/api/v1/console", json=body, headers=accept)).json()["proposal"]["proposal_id"]
    return name


async def test_a_proposal_is_approved_once(world: Whole) -> None:
    async with world.client("operator") as client:
        name = await proposed(client)
        open_now = (await client.get("/api/v1/proposals", params={"state": "open"})).json()["proposals"]
        assert [p["proposal_id"] for p in open_now] == [name]
        reply = await client.post(f"/api/v1/proposals/{name}/approve")
        assert reply.json()["state"] == "applied"
        assert (await client.get(f"/api/v1/proposals/{name}")).json()["decided_by"]["name"] == "operator"
        assert (await client.post(f"/api/v1/proposals/{name}/approve")).status_code == 409
        assert (await client.get("/api/v1/proposals", params={"state": "open"})).json()["proposals"] == []


async def test_a_proposal_is_denied_with_a_reason_or_without(world: Whole) -> None:
    async with world.client("operator") as client:
        name = await proposed(client)
        reply = await client.post(f"/api/v1/proposals/{name}/deny", json={"reason": "not now"})
        assert reply.json()["state"] == "denied"
        assert "not now" in reply.json()["detail"]
        other = await proposed(client)
        assert (await client.post(f"/api/v1/proposals/{other}/deny")).json()["state"] == "denied"


async def test_what_does_not_exist_is_not_found(world: Whole) -> None:
    async with world.client("operator") as client:
        for method, path in (("GET", ""), ("POST", "/approve"), ("POST", "/deny")):
            assert (await client.request(method, f"/api/v1/proposals/pr-0{path}")).status_code == 404


async def test_the_audit_log_is_paged_backwards(world: Whole) -> None:
    async with world.client("operator") as client:
        for most in (3, 1, 4):
            body = {"arguments": {**BOUNDS, "max_replicas": most}, "dry_run": False}
            assert (await client.post("/api/v1/tools/set_replica_bounds", json=body)).status_code == 200
        last = (await client.get("/api/v1/audit", params={"limit": 2})).json()["records"]
        assert [r["seq"] for r in last] == [5, 6]
        before = (await client.get("/api/v1/audit", params={"limit": 2, "before": 5})).json()["records"]
        assert [r["seq"] for r in before] == [3, 4]


async def test_a_tampered_audit_log_is_not_sound(world: Whole) -> None:
    async with world.client("operator") as client:
        body = {"arguments": BOUNDS, "dry_run": False}
        await client.post("/api/v1/tools/set_replica_bounds", json=body)
        path = world.folder / "audit.jsonl"
        path.write_bytes(path.read_bytes().replace(b'"after":3', b'"after":4'))
        verdict = (await client.get("/api/v1/audit/verify")).json()
    assert verdict["sound"] is False
    assert verdict["report"]["findings"][0]["verdict"] == "altered"


async def test_episodes_are_listed(world: Whole) -> None:
    async with world.client("viewer") as client:
        assert (await client.get("/api/v1/episodes")).json() == {"episodes": [], "has_more": False, "next_cursor": None}


READS = [
    ("GET", "/tools"), ("GET", "/proposals"), ("GET", "/proposals/pr-0"), ("GET", "/audit"), ("GET", "/audit/verify"),
    ("GET", "/scaling"), ("GET", "/episodes"), ("POST", "/console"), ("POST", "/tools/inspect_cluster"),
]  # fmt: skip
CHANGES = ["/tools/set_replica_bounds", "/proposals/pr-0/approve", "/proposals/pr-0/deny"]


async def test_only_those_who_may_see_all_can_look_and_only_operators_can_change(world: Whole) -> None:
    async with world.client() as nobody, world.client("client") as application, world.client("viewer") as viewer:
        for method, path in READS:
            body = {"text": "status"} if path == "/console" else {}
            ask = {"json": body} if method == "POST" else {}
            assert (await nobody.request(method, f"/api/v1{path}", **ask)).status_code == 401, path
            assert (await application.request(method, f"/api/v1{path}", **ask)).status_code == 403, path
            assert (await viewer.request(method, f"/api/v1{path}", **ask)).status_code in (200, 404), path
        for path in CHANGES:
            body = {"arguments": BOUNDS, "dry_run": False} if "tools" in path else {}
            assert (await nobody.post(f"/api/v1{path}", json=body)).status_code == 401, path
            assert (await application.post(f"/api/v1{path}", json=body)).status_code == 403, path
            status = 404 if "pr-0" in path else 403  # a viewer may know that there is no such proposal
            assert (await viewer.post(f"/api/v1{path}", json=body)).status_code == status, path
        dry = await viewer.post("/api/v1/tools/set_replica_bounds", json={"arguments": BOUNDS})
        assert dry.json()["verdict"]["rule"] == "role"


async def test_who_lacks_the_role_is_in_the_audit_log(world: Whole) -> None:
    async with world.client("operator") as operator, world.client("viewer") as viewer:
        name = await proposed(operator)
        before = len((await operator.get("/api/v1/audit")).json()["records"])
        tries = [
            await viewer.post("/api/v1/tools/set_replica_bounds", json={"arguments": BOUNDS, "dry_run": False}),
            await viewer.post(f"/api/v1/proposals/{name}/approve"),
            await viewer.post(f"/api/v1/proposals/{name}/deny"),
            await viewer.put("/api/v1/policies/routing", json={"policy": "round_robin"}),
        ]
        assert [reply.status_code for reply in tries] == [403] * 4
        notes = (await operator.get("/api/v1/audit")).json()["records"][before:]
    tools = ["set_replica_bounds", "set_replica_bounds", "set_replica_bounds", "set_routing_policy"]
    assert [record["entry"]["tool"] for record in notes] == tools
    assert {record["entry"]["verdict"]["rule"] for record in notes} == {"role"}
    assert {record["entry"]["actor"]["name"] for record in notes} == {"viewer"}


async def test_the_coordinator_tells_what_it_may_do(world: Whole) -> None:
    async with world.client("viewer") as client:
        status = (await client.get("/api/v1/coordinator")).json()
    assert status == {
        "engine": "off", "model": None, "is_up": False, "mode": "review", "modes": {}, "observes_until_s": None,
    }  # fmt: skip


async def test_the_api_describes_itself_without_a_page_that_runs_scripts_from_elsewhere(world: Whole) -> None:
    async with world.client() as client:
        missing = await client.get("/docs")
        assert missing.status_code == 404
        assert missing.json()["detail"] == "nothing is at /docs; the API is described at /openapi.json."
        assert "/api/v1/tools/{name}" in (await client.get("/openapi.json")).json()["paths"]


async def test_the_audit_log_is_checked_by_one_at_a_time(world: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = most = 0

    def counted(folder: Path) -> Report:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        time.sleep(0.02)
        at_once -= 1
        return verify_files(folder)

    monkeypatch.setattr("swarmx.wiring.verify_files", counted)
    reports = await asyncio.gather(*(world.context.check_audit() for _ in range(4)))
    assert all(report.sound for report in reports)
    assert most == 1


async def test_a_policy_is_set_only_over_the_one_that_was_seen(world: Whole) -> None:
    async with world.client("operator") as client:
        seen = (await client.get("/api/v1/policies")).headers["etag"]
        assert (await client.get("/api/v1/policies", headers={"if-none-match": seen})).status_code == 304
        first = await client.put("/api/v1/policies/routing", json={"policy": "round_robin"}, headers={"if-match": seen})
        assert first.status_code == 200
        late = await client.put("/api/v1/policies/routing", json={"policy": "power_of_two"}, headers={"if-match": seen})
        assert late.status_code == 412
        assert "not as you saw it" in late.json()["detail"]
        assert (await client.get("/api/v1/policies")).json()["active"]["policy"] == "round_robin"
        headers = {"if-match": first.headers["etag"]}
        assert (
            await client.put("/api/v1/policies/routing", json={"policy": "power_of_two"}, headers=headers)
        ).is_success
        again = await client.put("/api/v1/policies/routing", json={"policy": "power_of_two"}, headers={"if-match": "*"})
        assert again.status_code == 200, "it is in force already"


async def test_a_change_is_made_only_if_it_changes_what_its_dry_run_said(world: Whole) -> None:
    path, other = "/api/v1/tools/set_replica_bounds", {**BOUNDS, "max_replicas": 1}
    async with world.client("operator") as client:
        tried = await client.post(path, json={"arguments": BOUNDS})
        assert (await client.post(path, json={"arguments": other, "dry_run": False})).status_code == 200
        headers = {"if-match": tried.headers["etag"]}
        late = await client.post(path, json={"arguments": BOUNDS, "dry_run": False}, headers=headers)
        assert late.status_code == 412
        tried = await client.post(path, json={"arguments": BOUNDS})
        headers = {"if-match": tried.headers["etag"]}
        assert (await client.post(path, json={"arguments": BOUNDS, "dry_run": False}, headers=headers)).is_success


async def test_proposals_are_walked_page_by_page(world: Whole) -> None:
    async with world.client("operator") as client:
        for most in (1, 3, 4):
            text = f"set bounds of {ELASTIC} to 0..{most}"
            await client.post("/api/v1/console", json={"text": text}, headers={"accept": "application/json"})
        whole_list = (await client.get("/api/v1/proposals")).json()
        assert not whole_list["has_more"]
        seen, params, more = [], {"limit": "1"}, True
        while more:
            page = (await client.get("/api/v1/proposals", params=params)).json()
            seen += page["proposals"]
            more, params = page["has_more"], {"limit": "1", "cursor": page["next_cursor"] or ""}
        assert seen == whole_list["proposals"]
        assert len(seen) == 3
        for cursor in ("nonsense", "W10=", "ü"):
            assert (await client.get("/api/v1/proposals", params={"cursor": cursor})).status_code == 404
