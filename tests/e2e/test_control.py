"""The control plane as its operators meet it: one server, real replica processes, real faults."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from swarmx.memory.audit import LOG_NAME, read_log, verify_files
from swarmx.runtime.journal import replay
from tests.e2e.fleet import Http, Peer, children, peers, serving, until, up

pytestmark = pytest.mark.process

GROUP = {"model": "qwen3-8b", "device": "l40s", "slots": 8, "min": 1, "max": 3, "limit": 4, "start_s": 20.0}
ELASTIC: dict[str, Any] = {
    "emulation": {"time_scale": 20.0, "seed": 3},
    "watch": {"every_s": 0.2, "timeout_s": 20.0},
    "server": {"drain_s": 1},
    "scaler": {"policy": "static", "every_s": 0.2, "drain_s": 30.0, "up_cooldown_s": 0.0},
    "guard": {"verify_s": 1.0},
    "elastic": [GROUP],
}


async def used(http: Http, tool: str, *, status: int = 200, **arguments: Any) -> Any:
    """A tool, used for real."""
    reply = await http.post(f"/api/v1/tools/{tool}", json={"arguments": arguments, "dry_run": False, "reason": "test"})
    assert reply.status == status, reply
    return reply.body


async def states(http: Http) -> list[str]:
    return [row["state"] for row in (await http.replicas()).values() if row["state"] != "gone"]


async def scaled_to(http: Http, count: int) -> None:
    """Until exactly so many replicas are there, all of them ready."""
    await until(lambda: states(http), lambda found: found == ["ready"] * count)


async def asked(http: Http, number: int) -> int:
    """One chat completion; its status."""
    body = {
        "model": "qwen3-8b",
        "messages": [{"role": "user", "content": f"Tell me about the number {number}."}],
        "max_tokens": 200,
    }
    return (await http.post("/v1/chat/completions", json=body)).status


async def test_replicas_are_started_and_drained_under_load_and_no_call_is_lost(tmp_path: Path) -> None:
    with serving(ELASTIC, tmp_path) as server:
        async with server.http() as http:
            await scaled_to(http, 1)
            ended: list[int] = []
            stop = asyncio.Event()

            async def client(number: int) -> None:
                while not stop.is_set():
                    ended.append(await asked(http, number + 100 * len(ended)))

            clients = [asyncio.create_task(client(number)) for number in range(16)]
            assert (await used(http, "scale_model", model="qwen3-8b", replicas=3))["state"] == "applied"
            await scaled_to(http, 3)
            calls = {name: row["calls"] for name, row in (await http.replicas()).items()}
            await until(http.replicas, lambda rows: all(rows[name]["calls"] > calls[name] for name in rows))
            await used(http, "scale_model", model="qwen3-8b", replicas=1)
            await scaled_to(http, 1)
            stop.set()
            await asyncio.gather(*clients)
            assert len(ended) > 32
            assert set(ended) == {200}
            assert len(children(server.process.pid)) == 1
    assert verify_files(server.state_dir).sound
    entries = [record.entry for record in read_log(server.state_dir / LOG_NAME)]
    assert [e.tool for e in entries if e.kind == "intent"].count("deploy") == 3
    assert [e.outcome for e in entries if e.kind == "outcome" and e.tool == "drain"] == ["applied", "applied"]
    assert all("no call was left" in e.detail for e in entries if e.kind == "outcome" and e.tool == "drain")


async def test_a_call_for_a_model_without_a_replica_waits_for_the_one_that_it_brings_up(tmp_path: Path) -> None:
    scaler = {**ELASTIC["scaler"], "policy": "target_tracking"}
    idle = {**ELASTIC, "scaler": scaler, "router": {"demand_every_s": 0.2}, "elastic": [{**GROUP, "min": 0}]}
    with serving(idle, tmp_path) as server:
        async with server.http() as http:
            assert await states(http) == []
            assert await asked(http, 1) == 200
            assert await states(http) == ["ready"]


async def test_orders_beyond_role_bounds_and_limit_change_nothing_and_say_why(tmp_path: Path) -> None:
    with serving(ELASTIC, tmp_path) as server:
        viewer = server.key("watcher", "viewer")
        async with server.http() as http, server.http(viewer) as guest:
            await scaled_to(http, 1)
            refused = await used(http, "scale_model", model="qwen3-8b", replicas=4, status=409)
            assert refused["rule"] == "bounds"
            assert "1 to 3" in refused["detail"]
            refused = await used(
                http, "set_replica_bounds", model="qwen3-8b", min_replicas=1, max_replicas=5, status=409
            )
            assert "4" in refused["detail"]
            await used(guest, "scale_model", model="qwen3-8b", replicas=2, status=403)
            refused = await used(http, "drain_replica", replica_id="qwen3-8b-l40s-0", status=409)
            assert "force" in refused["detail"]
            await used(http, "drain_replica", replica_id="nobody", status=409)
            await used(http, "launch_rockets", status=400)
            assert await states(http) == ["ready"]
            tools = [r["entry"]["tool"] for r in (await http.get("/api/v1/audit")).body["records"]]
            assert tools.count("deploy") == 2  # its intent and its outcome: the first replica, at the start
            assert tools.count("scale_model") >= 1  # the refusals


async def test_an_approval_that_no_longer_fits_is_stale(tmp_path: Path) -> None:
    with serving(ELASTIC, tmp_path) as server:
        async with server.http() as http:
            await scaled_to(http, 1)
            said = await http.post(
                "/api/v1/console",
                json={"text": "set bounds of qwen3-8b to 1..2"},
                headers={"accept": "application/json"},
            )
            proposal_id = said.body["proposal"]["proposal_id"]
            await used(http, "set_replica_bounds", model="qwen3-8b", min_replicas=1, max_replicas=4)
            reply = await http.post(f"/api/v1/proposals/{proposal_id}/approve")
            assert (reply.status, reply.body["rule"]) == (409, "stale")
            (model,) = (await http.get("/api/v1/scaling")).body["models"]
            assert model["max_replicas"] == 4


async def test_a_server_that_is_killed_while_a_replica_starts_says_so_after_its_restart(tmp_path: Path) -> None:
    slow = {**ELASTIC, "router": {"queue_timeout_s": 1000.0}, "elastic": [{**GROUP, "start_s": 6000.0}]}
    server = up(slow, tmp_path)
    async with server.http() as http:
        await until(lambda: states(http), lambda found: found == ["starting"])
        (pid,) = children(server.process.pid)
    server.kill()
    with serving(ELASTIC, tmp_path) as again:
        async with again.http() as http:
            await until(lambda: states(http), lambda found: found == ["ready"])
            entries = [r["entry"] for r in (await http.get("/api/v1/audit")).body["records"]]
            assert next(e["outcome"] for e in entries if e["kind"] == "outcome") == "interrupted"
            assert (await http.get("/api/v1/audit/verify")).body["sound"]
        assert pid not in children(again.process.pid)


async def test_a_replica_that_never_becomes_ready_is_given_up_and_tried_again_later(tmp_path: Path) -> None:
    scaler = {**ELASTIC["scaler"], "start_floor_s": 0.2, "start_patience": 1.001, "backoff_most_s": 1.0}
    # It is given up after the time that starts took so far, and none was seen: the first guess, cut short here.
    stuck = {**ELASTIC, "emulation": {"time_scale": 1000.0}, "scaler": scaler, "elastic": [{**GROUP, "start_s": 900.0}]}
    with serving(stuck, tmp_path) as server:
        async with server.http() as http:

            async def failed() -> int:
                alerts = (await http.get("/api/v1/scaling")).body["alerts"]
                return sum(alert["kind"] == "replica_failed" for alert in alerts)

            await until(failed, lambda count: count >= 2)
            assert (await http.get("/healthz")).status == 200
    entries = [record.entry for record in read_log(server.state_dir / LOG_NAME)]
    assert [e.arguments["replica_id"] for e in entries if e.kind == "intent" and e.tool == "drain"][:2] == [
        "qwen3-8b-l40s-0",
        "qwen3-8b-l40s-1",
    ]


async def test_calls_are_served_while_the_coordinators_model_hangs_and_the_rules_stand_in(tmp_path: Path) -> None:
    async with peers(model="hang") as found:
        settings = with_model(found["model"])
        with serving(settings, tmp_path) as server:
            async with server.http() as http:
                await scaled_to(http, 1)
                episodes = await until(lambda: http.get("/api/v1/episodes"), lambda r: len(r.body["episodes"]) >= 2)
                assert {e["source"] for e in episodes.body["episodes"]} == {"rules"}
                assert await asked(http, 1) == 200
                assert found["model"].calls >= 1
                found["model"].release.set()


@pytest.mark.parametrize("mood", ["garbage", "not_an_answer", "unavailable", "hang_up", "reject"])
async def test_whatever_the_model_server_does_the_rules_stand_in(tmp_path: Path, mood: Any) -> None:
    async with peers(model=mood) as found:
        with serving(with_model(found["model"]), tmp_path) as server:
            async with server.http() as http:
                reply = await until(lambda: http.get("/api/v1/episodes"), lambda r: len(r.body["episodes"]) >= 1)
                assert {e["source"] for e in reply.body["episodes"]} == {"rules"}
                assert found["model"].calls >= 1


async def test_without_a_place_for_vectors_the_coordinator_goes_on_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "vectors").write_text("somebody else's file")
    settings = {**ELASTIC, "coordinator": {"engine": "rules", "every_s": 0.5, "gap_s": 0.1}}
    with serving(settings, tmp_path) as server:
        async with server.http() as http:
            await until(lambda: http.get("/api/v1/episodes"), lambda r: len(r.body["episodes"]) >= 2)
            assert await asked(http, 1) == 200
        assert "vector memory only until this process ends" in server.log


def with_model(peer: Peer) -> dict[str, Any]:
    coordinator = {"engine": "openai", "url": peer.url, "every_s": 0.3, "gap_s": 0.1, "deadline_s": 1.0}
    return {**ELASTIC, "coordinator": coordinator}


async def test_a_journal_of_all_agents_replays(tmp_path: Path) -> None:
    with serving(ELASTIC, tmp_path) as server:
        async with server.http() as http:
            await scaled_to(http, 1)
            assert [await asked(http, number) for number in range(5)] == [200] * 5
            await used(http, "scale_model", model="qwen3-8b", replicas=2)
            await scaled_to(http, 2)
    (journal,) = (server.state_dir / "journals").iterdir()
    header = json.loads(journal.read_text().splitlines()[0])
    assert set(header["agents"]) == {"router", "scaler", "learner"}
    result = replay(journal)
    assert result.divergence is None
    assert result.steps > 10
