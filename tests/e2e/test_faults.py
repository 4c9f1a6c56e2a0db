"""What goes wrong goes wrong for real: replicas that hang, lie or die, and a server that is killed in the middle."""

from __future__ import annotations

import asyncio
import json
import signal
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio

from swarmx.runtime.journal import replay
from swarmx.workflows.events import Cancelled, Failed, Finished, decode_event
from tests.e2e.fleet import (
    Http,
    Mood,
    Peer,
    Server,
    alive,
    all_ready,
    children,
    peers,
    serving,
    signal_replica,
    static,
    until,
    up,
)

pytestmark = [pytest.mark.process, pytest.mark.asyncio(loop_scope="module")]

HELLO: Any = [{"role": "user", "content": "Hello?"}]
PATIENT: dict[str, Any] = {  # short enough to wait for, long enough for a busy machine
    "router": {
        "policy": "round_robin",
        "max_attempts": 2,
        "call_timeout_s": 4.0,
        "first_token_timeout_s": 4.0,
        "queue_timeout_s": 1.0,
        "breaker_failures": 1000,
    },
    "watch": {"every_s": 0.1, "timeout_s": 20.0, "failures": 2},
    "server": {"drain_s": 1},
}
MOODS: tuple[Mood, ...] = ("hang", "garbage", "not_an_answer", "unavailable", "hang_up", "break_off")


class Fleet:
    """One server; for every mood a model with one such replica and one that is fine, and a model that only has such."""

    def __init__(self, http: Http, found: dict[str, Peer]) -> None:
        self.http, self.peers = http, found
        self.client = openai.AsyncOpenAI(base_url=f"{http.url}/v1", api_key=http.token, max_retries=0)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    moods: dict[str, Mood] = {"fine": "fine", "reject": "reject", **{mood: mood for mood in MOODS}}
    async with peers(**moods) as found:
        replicas = [static("reject", "reject", found["reject"])]
        for mood in MOODS:
            replicas.append(static(f"{mood}-bad", f"mixed-{mood}", found[mood]))
            replicas.append(static(f"{mood}-good", f"mixed-{mood}", found["fine"]))
            replicas.append(static(f"{mood}-only", f"only-{mood}", found[mood]))
        replicas.append({"id": "down", "model": "mixed-down", "url": "http://127.0.0.1:9"})
        replicas.append(static("down-good", "mixed-down", found["fine"]))
        replicas.append({"id": "down-only", "model": "only-down", "url": "http://127.0.0.1:9"})
        settings = {**PATIENT, "replicas": replicas}
        with serving(settings, tmp_path_factory.mktemp("faults")) as server:
            async with server.http() as http:
                await all_ready(http, [str(r["id"]) for r in replicas if not str(r["id"]).startswith("down")])
                fleet = Fleet(http, found)
                async with fleet.client:
                    yield fleet


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("mood", [mood for mood in MOODS if mood != "break_off"])
async def test_a_call_moves_on_from_a_replica_that_fails(fleet: Fleet, mood: Mood, stream: bool) -> None:
    before = fleet.peers[mood].calls
    for _ in range(2):  # the policy takes turns, so that one of the two begins at the bad one
        if stream:
            chunks = await fleet.client.chat.completions.create(model=f"mixed-{mood}", messages=HELLO, stream=True)
            said = "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])
        else:
            answer = await fleet.client.chat.completions.create(model=f"mixed-{mood}", messages=HELLO)
            said = answer.choices[0].message.content or ""
        assert said == "Hello from a peer."
    assert fleet.peers[mood].calls > before


async def test_an_answer_that_breaks_off_is_asked_for_elsewhere(fleet: Fleet) -> None:
    attempts = []
    for _ in range(2):
        raw = await fleet.client.chat.completions.with_raw_response.create(model="mixed-break_off", messages=HELLO)
        assert raw.parse().choices[0].message.content == "Hello from a peer."
        attempts.append(raw.headers["x-swarmx-attempts"])
    assert "2" in attempts


async def test_a_stream_that_breaks_off_after_its_first_token_ends_with_an_error(fleet: Fleet) -> None:
    chunks = await fleet.client.chat.completions.create(model="only-break_off", messages=HELLO, stream=True)
    assert (await anext(chunks)).choices[0].delta.content == "Hello"
    with pytest.raises(openai.APIError, match="The replica failed while it answered") as caught:
        await anext(chunks)
    assert caught.value.code == "connection_lost"


@pytest.mark.parametrize(
    ("mood", "status", "said"),
    [
        ("hang", 504, "took too long"),
        ("garbage", 502, "not JSON"),
        ("not_an_answer", 502, "neither choices nor data"),
        ("unavailable", 502, "status 503"),
        ("hang_up", 502, "no answer"),
        ("down", 503, "none became ready in 1 s"),
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_call_that_no_replica_answers_is_an_openai_error_with_its_attempts(
    fleet: Fleet, mood: str, status: int, said: str, stream: bool
) -> None:
    if stream and mood in ("garbage", "not_an_answer"):
        said = "not an event stream"
    with pytest.raises(openai.InternalServerError, match=said) as caught:
        await fleet.client.chat.completions.create(model=f"only-{mood}", messages=HELLO, stream=stream)
    assert caught.value.status_code == status
    headers = caught.value.response.headers
    assert headers["x-swarmx-attempts"] == ("0" if mood == "down" else "2")
    assert headers.get("retry-after") == ("5" if mood == "down" else None)
    assert set(caught.value.response.json()["error"]) == {"message", "type", "param", "code"}
    record = await fleet.http.call(headers["x-swarmx-call-id"])
    assert record["state"] == "refused"
    assert record["error"]


async def test_what_a_replica_refuses_is_not_tried_elsewhere(fleet: Fleet) -> None:
    before = fleet.peers["reject"].calls
    with pytest.raises(openai.BadRequestError, match="no such thing") as caught:
        await fleet.client.chat.completions.create(model="reject", messages=HELLO)
    assert caught.value.param == "x"
    assert fleet.peers["reject"].calls == before + 1


async def test_a_replica_that_is_down_at_the_start_only_waits_for_its_turn(fleet: Fleet) -> None:
    rows = await fleet.http.replicas()
    assert rows["down"]["state"] == "starting"
    answer = await fleet.client.chat.completions.create(model="mixed-down", messages=HELLO)
    assert answer.choices[0].message.content == "Hello from a peer."


async def test_a_hanging_replica_is_let_go(fleet: Fleet) -> None:
    async def running() -> int:
        return fleet.peers["hang"].running

    await until(running, lambda count: count == 0)
    await until(fleet.http.replicas, lambda rows: all(row["in_flight"] == 0 for row in rows.values()))


async def test_a_replica_that_goes_down_is_gone_and_comes_back(tmp_path: Path) -> None:
    async with peers(a="fine", b="fine") as found:
        settings = {**PATIENT, "replicas": [static("a", "m", found["a"]), static("b", "m", found["b"])]}
        with serving(settings, tmp_path) as server:
            async with server.http() as http:
                await all_ready(http)
                await found["a"].stop()
                await until(http.replicas, lambda rows: rows["a"]["state"] == "gone")
                for _ in range(4):
                    reply = await http.post("/v1/chat/completions", json={"model": "m", "messages": HELLO})
                    assert (reply.status, reply.headers["x-swarmx-replica"]) == (200, "b")
                await found["b"].stop()
                await until(http.replicas, lambda rows: rows["b"]["state"] == "gone")
                assert (await http.get("/readyz")).status == 503
                reply = await http.post("/v1/chat/completions", json={"model": "m", "messages": HELLO})
                assert (reply.status, reply.body["error"]["code"]) == (503, "no_replica")
                await found["a"].start()
                await until(http.replicas, lambda rows: rows["a"]["state"] == "ready")
                reply = await http.post("/v1/chat/completions", json={"model": "m", "messages": HELLO})
                assert (reply.status, reply.headers["x-swarmx-replica"]) == (200, "a")


async def test_a_call_that_waits_is_answered_by_the_replica_that_comes_back(tmp_path: Path) -> None:
    async with peers(a="fine") as found:
        patient = {**PATIENT, "router": {**PATIENT["router"], "queue_timeout_s": 60.0}}
        replica = static("a", "m", found["a"])
        await found["a"].stop()
        with serving({**patient, "replicas": [replica]}, tmp_path) as server:
            async with server.http() as http:
                task = asyncio.create_task(http.post("/v1/chat/completions", json={"model": "m", "messages": HELLO}))
                await asyncio.sleep(0.3)  # most likely long enough for the call to be waiting
                assert not task.done()
                await found["a"].start()
                assert (await task).status == 200


FLEET = {
    "emulation": {"time_scale": 10.0},
    "watch": {"every_s": 0.1, "timeout_s": 20.0, "failures": 2},
    "server": {"drain_s": 1},
    "emulated": [
        {"model": "qwen3-8b", "device": "l40s"},
        {"model": "qwen3-8b", "device": "a100"},
        {"model": "sdxl", "device": "l40s", "kind": "image"},
    ],
}
LLM = {"kind": "llm", "model": "qwen3-8b", "max_tokens": 300}
STEPS = {
    "name": "steps",
    "inputs": {"topic": None},
    "nodes": {
        "parts": {"kind": "tool", "function": "split_lines", "args": {"text": "a\nb\nc"}},
        "each": {
            "kind": "map",
            "over": "parts",
            "do": {"ask": {**LLM, "prompt": "{{ inputs.topic }} {{ item }}"}},
            "result": "{{ ask.text }}",
        },
        "write": {**LLM, "prompt": '{{ each | join(" ") }}'},
        "draw": {"kind": "image", "model": "sdxl", "prompt": "{{ write.text }}", "steps": 2, "width": 64, "height": 64},
    },
    "outputs": {"text": "{{ write.text }}"},
}


async def test_workflows_survive_the_death_of_a_replica(tmp_path: Path) -> None:
    with serving(FLEET, tmp_path) as server:
        async with server.http() as http:
            await all_ready(http)
            ids = [await http.submitted(STEPS, topic=f"Topic {number}") for number in range(6)]
            signal_replica(server, signal.SIGSTOP, model="qwen3-8b", device="a100")  # what it has now, it keeps
            await until(http.replicas, lambda rows: rows["qwen3-8b-a100-0"]["in_flight"] > 0)
            signal_replica(server, signal.SIGKILL, model="qwen3-8b", device="a100")
            await until(http.replicas, lambda rows: rows["qwen3-8b-a100-0"]["state"] == "gone")
            rows = await asyncio.gather(*(http.ended(workflow_id) for workflow_id in ids))
            assert {row["state"] for row in rows} == {"finished"}, rows
            rows = [(await http.get(f"/api/v1/workflows/{workflow_id}")).body for workflow_id in ids]
            calls = [call for row in rows for call in row["calls"]]
            assert any(call["attempts"] > 1 for call in calls)
            assert all(call["replica_id"] != "qwen3-8b-a100-0" for call in calls if call["attempts"] > 1)
        assert server.stop() == 0
    check_journals(server)


def endings(server: Server) -> dict[str, tuple[str, int]]:
    """State and number of terminal events of every workflow, from the database itself."""
    with closing(sqlite3.connect(f"file:{server.state_dir / 'swarmx.db'}?mode=ro", uri=True)) as database:
        states = dict(database.execute("SELECT workflow_id, state FROM workflows"))
        found = dict.fromkeys(states, 0)
        for workflow_id, body in database.execute("SELECT workflow_id, body FROM events"):
            found[workflow_id] += isinstance(decode_event(body), Finished | Failed | Cancelled)
    return {workflow_id: (state, found[workflow_id]) for workflow_id, state in states.items()}


def check_journals(server: Server, *, lives: int = 1) -> None:
    """The journals of all lives reproduce their decisions."""
    journals = sorted((server.state_dir / "journals").glob("*.jsonl"))
    assert len(journals) == lives
    for journal in journals:
        result = replay(journal)
        assert result.divergence is None
        assert result.decisions > 0


async def test_a_killed_server_takes_all_its_workflows_up_again_and_ends_each_once(tmp_path: Path) -> None:
    server = up(FLEET, tmp_path)
    try:
        async with server.http() as http:
            await all_ready(http)
            ids = [await http.submitted(STEPS, topic=f"Topic {number}") for number in range(12)]
            await http.ended(ids[0])
            ids += [await http.submitted(STEPS, topic=f"Late {number}") for number in range(4)]
            replicas = list(children(server.process.pid))
    finally:
        server.kill()
    assert len(replicas) == 3

    async def left() -> list[int]:
        return [pid for pid in replicas if alive(pid)]

    await until(left, lambda pids: not pids)
    before = endings(server)
    assert set(before) == set(ids)
    assert any(state == "running" for state, _ in before.values())

    with serving(FLEET, tmp_path) as server:
        async with server.http() as http:
            rows = await asyncio.gather(*(http.ended(workflow_id) for workflow_id in ids))
            assert {row["state"] for row in rows} == {"finished"}, rows
            for row in rows:
                assert row["outputs"]["text"]
                assert all(node["state"] == "finished" for node in row["nodes"])
        assert server.stop() == 0
    after = endings(server)
    assert after == dict.fromkeys(ids, ("finished", 1))
    for workflow_id, (state, _) in before.items():
        assert state in ("running", "finished"), workflow_id
    check_journals(server, lives=2)


async def test_a_server_that_is_stopped_in_the_middle_continues_where_it_was(tmp_path: Path) -> None:
    with serving(FLEET, tmp_path) as server:
        async with server.http() as http:
            await all_ready(http)
            ids = [await http.submitted(STEPS, topic=f"Topic {number}") for number in range(4)]
            await until(http.replicas, lambda rows: any(row["in_flight"] for row in rows.values()))
        assert server.stop() == 0
    assert all(state in ("running", "finished") for state, _ in endings(server).values())
    assert "Traceback" not in server.log
    with serving(FLEET, tmp_path) as server:
        async with server.http() as http:
            rows = await asyncio.gather(*(http.ended(workflow_id) for workflow_id in ids))
            assert {row["state"] for row in rows} == {"finished"}
    assert endings(server) == dict.fromkeys(ids, ("finished", 1))
    check_journals(server, lives=2)


async def test_a_replica_that_is_stopped_still_counts_as_gone_and_its_calls_move_on(tmp_path: Path) -> None:
    settings: dict[str, Any] = {**FLEET, "watch": {"every_s": 0.1, "timeout_s": 3.0, "failures": 2}}
    with serving(settings, tmp_path) as server:
        async with server.http() as http:
            await all_ready(http)
            ids = [await http.submitted(STEPS, topic=f"Topic {number}") for number in range(4)]
            await until(http.replicas, lambda rows: rows["qwen3-8b-a100-0"]["in_flight"] > 0)
            signal_replica(server, signal.SIGSTOP, model="qwen3-8b", device="a100")
            await until(http.replicas, lambda rows: rows["qwen3-8b-a100-0"]["state"] == "gone")
            rows = await asyncio.gather(*(http.ended(workflow_id) for workflow_id in ids))
            assert {row["state"] for row in rows} == {"finished"}
            signal_replica(server, signal.SIGCONT, model="qwen3-8b", device="a100")
            await until(http.replicas, lambda rows: rows["qwen3-8b-a100-0"]["state"] == "ready")


async def test_a_transparent_workflow_that_was_open_in_a_crash_is_finished_by_silence(tmp_path: Path) -> None:
    async with peers(a="fine") as found:
        settings = {**PATIENT, "replicas": [static("a", "m", found["a"])], "workflows": {"transparent_idle_s": 0.5}}
        server = up({**settings, "workflows": {"transparent_idle_s": 300.0}}, tmp_path)
        try:
            async with server.http() as http:
                await all_ready(http)
                headers = {"x-swarmx-workflow-id": "open"}
                for _ in range(2):
                    body = {"model": "m", "messages": HELLO}
                    reply = await http.post("/v1/chat/completions", json=body, headers=headers)
                    assert reply.status == 200
                    await http.call(reply.headers["x-swarmx-call-id"])
        finally:
            server.kill()
        with serving(settings, tmp_path) as server:
            async with server.http() as http:
                row = await http.ended("default:open")
                assert (row["state"], row["outputs"]) == ("finished", {"calls": 2, "ended_by": "silence"})


async def test_a_journal_is_json_lines_with_a_header(tmp_path: Path) -> None:
    async with peers(a="fine") as found:
        with serving({**PATIENT, "replicas": [static("a", "m", found["a"])]}, tmp_path) as server:
            async with server.http() as http:
                await all_ready(http)
                await http.post("/v1/chat/completions", json={"model": "m", "messages": HELLO})
            assert server.stop() == 0
        (path,) = (server.state_dir / "journals").glob("*.jsonl")
        header, *lines = path.read_text().splitlines()
        assert json.loads(header)["format"] == "swarmx-journal"
        assert "Hello?" not in path.read_text()  # no prompt is kept
        kinds = [json.loads(line)["heard"]["message"]["type"] for line in lines]
        assert kinds.index("CallReady") < kinds.index("CallFinished")  # written to its end
        check_journals(server)
