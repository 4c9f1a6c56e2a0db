"""The REST API of a real server: workflows, the why of calls, replicas, policies and blobs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp
import pytest

from tests.e2e.fleet import Http, Server, a_key, honoured, refused, serving, until

pytestmark = pytest.mark.process

LLM = "qwen3-8b"
ONE = """
name: one
inputs: {question: null, tone: kind}
nodes:
  ask: {kind: llm, model: qwen3-8b, prompt: "{{ inputs.question }} Be {{ inputs.tone }}.", max_tokens: 12}
outputs: {said: "{{ ask.text }}"}
"""
INSTANT = {"name": "instant", "nodes": {"a": {"kind": "tool", "function": "upper", "args": {"text": "x"}}}}
DRAW = {"kind": "image", "model": "sdxl", "prompt": "A bee"}
PICTURE = {
    "name": "picture",
    "nodes": {"draw": {**DRAW, "steps": 2, "width": 128, "height": 128}},
    "outputs": {"sha256": "{{ draw.images | pick('sha256') | first }}"},
}
SLOW = {  # half a minute of drawing at the time scale of the fleet
    "name": "slow",
    "nodes": {
        "draw": {**DRAW, "steps": 200, "width": 2048, "height": 2048, "n": 3},
    },
}


async def test_yaml_is_accepted_and_its_location_shows_it_until_it_is_finished(http: Http) -> None:
    text = ONE.replace("question: null", "question: Why?")
    reply = await http.post("/api/v1/workflows", data=text, headers={"content-type": "application/yaml"})
    assert reply.status == 202
    assert reply.headers["location"] == f"/api/v1/workflows/{reply.body['workflow_id']}"
    assert reply.body["state"] == "running"
    assert (await http.get(reply.headers["location"])).status == 200
    row = await http.ended(reply.body["workflow_id"])
    assert row["state"] == "finished"
    assert row["outputs"]["said"]
    assert row["inputs"] == {"question": "Why?", "tone": "kind"}
    (node,) = row["nodes"]
    assert (node["path"], node["kind"], node["state"], node["model"]) == ("ask", "llm", "finished", LLM)
    assert row["created_at_s"] <= node["ready_at_s"] <= node["started_at_s"] <= node["ended_at_s"] <= row["ended_at_s"]


async def test_json_is_accepted(http: Http) -> None:
    reply = await http.post("/api/v1/workflows", json=INSTANT)
    assert reply.status == 202
    assert (await http.ended(reply.body["workflow_id"]))["outputs"] == {"a": "X"}


@pytest.mark.parametrize("definition", [ONE, json.dumps({"name": "j", "inputs": {"question": None, "tone": "x"},
    "nodes": {"ask": {"kind": "tool", "function": "upper", "args": {"text": "{{ inputs.question }}"}}}})],
    ids=["yaml", "json"])  # fmt: skip
async def test_a_definition_as_text_takes_inputs(http: Http, definition: str) -> None:
    row = await http.ended(await http.submitted(definition, question="How?", tone="brief"))
    assert row["state"] == "finished"
    assert row["inputs"] == {"question": "How?", "tone": "brief"}


async def test_a_definition_as_data_takes_inputs(http: Http) -> None:
    workflow = {
        "name": "echo",
        "inputs": {"text": None},
        "nodes": {"up": {"kind": "tool", "function": "upper", "args": {"text": "{{ inputs.text }}"}}},
    }
    row = await http.ended(await http.submitted(workflow, text="grüß dich"))
    assert row["outputs"] == {"up": "GRÜSS DICH"}


async def test_inputs_may_be_larger_than_a_definition(http: Http) -> None:
    workflow = {
        "name": "long",
        "inputs": {"text": None},
        "nodes": {"n": {"kind": "tool", "function": "length", "args": {"value": "{{ inputs.text }}"}}},
    }
    row = await http.ended(await http.submitted(workflow, text="x" * 600_000))
    assert row["outputs"] == {"n": 600_000}


async def test_an_envelope_may_be_yaml(http: Http) -> None:
    text = "inputs: {text: a}\nworkflow:\n  name: y\n  inputs: {text: null}\n  nodes:\n    " + (
        'u: {kind: tool, function: upper, args: {text: "{{ inputs.text }}"}}\n'
    )
    reply = await http.post("/api/v1/workflows", data=text)
    assert reply.status == 202, reply
    assert (await http.ended(reply.body["workflow_id"]))["outputs"] == {"u": "A"}


CYCLE = {
    "name": "c",
    "nodes": {
        "a": {"kind": "tool", "function": "upper", "args": {"text": "{{ b }}"}},
        "b": {"kind": "tool", "function": "upper", "args": {"text": "{{ a }}"}},
    },
}


def tool(text: str, **more: Any) -> dict[str, Any]:
    return {"name": "t", "nodes": {"a": {"kind": "tool", "function": "upper", "args": {"text": text}, **more}}}


@pytest.mark.parametrize(
    ("workflow", "where", "said"),
    [
        (CYCLE, "nodes.a", ""),
        (tool("{{ nobody }}"), "nodes.a.args", "nobody"),
        (tool("x", needs=["nobody"]), "nodes.a", "nobody"),
        ({"name": "t", "nodes": {"a": {"kind": "lmm", "prompt": "x"}}}, "nodes.a", "did you mean"),
        ({"name": "t", "nodes": {f"n{i}": INSTANT["nodes"]["a"] for i in range(201)}}, "nodes", "200"),  # type: ignore[index]
        (tool("{{ 1 + }}"), "nodes.a.args", ""),
        (tool("{{ inputs.__class__ }}"), "nodes.a.args", ""),
        ({"name": "t"}, "nodes", "missing"),
        (tool("x", colour="red"), "nodes.a.colour", "unknown field"),
    ],
    ids=["cycle", "dangling", "needs", "kind", "too_many", "syntax", "attribute", "no_nodes", "field"],
)
async def test_a_malformed_workflow_is_refused_with_the_place(
    http: Http, workflow: dict[str, Any], where: str, said: str
) -> None:
    body = refused(await http.post("/api/v1/workflows", json=workflow), 422)
    assert body["where"].startswith(where), body
    assert said in body["detail"].lower()


@pytest.mark.parametrize(
    "raw",
    [b"", b"just text", b"[1, 2]", b"a: [", b"\xff\xfe\x00", b"[" * 100_000, b"&a [*a]", b'{"a": 1, "a": 2}'],
    ids=["empty", "text", "list", "cut", "not_utf8", "deep", "alias", "twice"],
)
async def test_a_body_that_is_no_definition_is_refused(http: Http, raw: bytes) -> None:
    refused(await http.post("/api/v1/workflows", data=raw), 422)


@pytest.mark.parametrize(
    ("envelope", "said"),
    [
        ({"workflow": ONE, "inputs": {"question": "a", "tune": 1}}, "tone"),
        ({"workflow": ONE}, "must be given"),
        ({"workflow": ONE, "inputs": [1]}, "a mapping"),
        ({"workflow": ONE, "input": {}}, "not input"),
        ({"workflow": 5}, "mapping"),
        ({"workflow": ONE, "inputs": {"question": "\ud800"}}, "surrogate"),
    ],
    ids=["unknown_input", "missing_input", "list", "typo", "number", "half_surrogate"],
)
async def test_bad_inputs_are_refused(http: Http, envelope: dict[str, Any], said: str) -> None:
    assert said in refused(await http.post("/api/v1/workflows", json=envelope), 422)["detail"]


async def test_a_template_that_fails_at_run_time_fails_the_workflow_at_its_node(http: Http) -> None:
    workflow = {"name": "t", "nodes": {"a": {"kind": "tool", "function": "first", "args": {"value": []}}}}
    row = await http.ended(await http.submitted(workflow))
    assert (row["state"], row["error_node"]) == ("failed", "a")
    assert row["error"]


async def test_a_workflow_with_an_unknown_model_fails_and_says_so(http: Http) -> None:
    workflow = {"name": "t", "nodes": {"a": {"kind": "llm", "model": "gpt-9", "prompt": "x"}}}
    row = await http.ended(await http.submitted(workflow))
    assert (row["state"], row["error_node"]) == ("failed", "a")
    assert "no replica serves the model 'gpt-9'" in row["error"]


async def test_a_list_is_paged_newest_first(http: Http) -> None:
    made = [await http.submitted(INSTANT) for _ in range(6)]
    for workflow_id in made:
        await http.ended(workflow_id)
    seen: list[str] = []
    cursor = None
    while len(seen) < 6:
        params = {"limit": "2", "state": "finished"} | ({"cursor": cursor} if cursor else {})
        page = (await http.get("/api/v1/workflows", params=params)).body
        assert len(page["workflows"]) == 2
        seen += [row["workflow_id"] for row in page["workflows"]]
        cursor = page["next_cursor"]
    assert seen == made[::-1]


async def test_the_last_page_has_no_cursor(server: Server, http: Http) -> None:
    with a_key(server, "client", f"pages-{uuid4().hex[:6]}") as token:
        await honoured(http, token)
        for _ in range(2):
            assert (await http.post("/api/v1/workflows", json=INSTANT, token=token)).status == 202
        page = (await http.get("/api/v1/workflows", params={"limit": "2"}, token=token)).body
        assert (len(page["workflows"]), page["has_more"], page["next_cursor"]) == (2, False, None)


@pytest.mark.parametrize(
    ("params", "status"),
    [({"limit": "0"}, 422), ({"limit": "x"}, 422), ({"state": "done"}, 422), ({"cursor": "nonsense"}, 404)],
)
async def test_a_bad_question_for_the_list_is_refused(http: Http, params: dict[str, str], status: int) -> None:
    refused(await http.get("/api/v1/workflows", params=params), status)


async def test_cancelling_a_workflow_reaches_the_engine(http: Http) -> None:
    await http.idle()
    before = await http.engine("sdxl-l40s-0")
    workflow_id = await http.submitted(SLOW)
    await until(lambda: http.engine("sdxl-l40s-0"), lambda engine: engine["running"] == 1)
    reply = await http.post(f"/api/v1/workflows/{workflow_id}/cancel", headers={"prefer": "wait=30"})
    assert (reply.status, reply.body["state"]) == (202, "cancelled")
    after = await until(lambda: http.engine("sdxl-l40s-0"), lambda engine: engine["running"] == 0)
    assert after["aborted"] == before["aborted"] + 1
    await until(http.replicas, lambda rows: rows["sdxl-l40s-0"]["in_flight"] == 0)
    row = (await until(lambda: http.get(f"/api/v1/workflows/{workflow_id}"), lambda reply: reply.body["calls"])).body
    assert row["state"] == "cancelled"
    assert [call["state"] for call in row["calls"]] == ["cancelled"]
    again = await http.post(f"/api/v1/workflows/{workflow_id}/cancel")
    assert (again.status, again.body["ended_at_s"]) == (202, reply.body["ended_at_s"])


async def test_a_workflow_that_cannot_meet_its_deadline_is_refused_before_any_engine_works(http: Http) -> None:
    await http.idle()
    row = await http.ended(await http.submitted({**SLOW, "deadline_s": 4.0}))
    assert row["state"] == "failed"
    assert "was refused after 0 attempts: deadline" in row["error"]
    assert (await http.engine("sdxl-l40s-0"))["running"] == 0


async def test_a_deadline_ends_the_work_in_the_engine(http: Http) -> None:
    before = {"policy": (await http.get("/api/v1/policies")).body["active"]["policy"]}
    try:  # under a policy that foresees no times, nothing is refused early
        assert (await http.put("/api/v1/policies/routing", json={"policy": "round_robin"})).status == 200
        row = await http.ended(await http.submitted({**SLOW, "deadline_s": 0.5}))
    finally:
        assert (await http.put("/api/v1/policies/routing", json=before)).status == 200
    assert (row["state"], row["error"]) == ("failed", "deadline")
    await until(lambda: http.engine("sdxl-l40s-0"), lambda engine: engine["running"] == 0)


async def test_why_explains_every_call_of_a_workflow(http: Http) -> None:
    workflow_id = await http.submitted(ONE, question="Why?")
    await http.ended(workflow_id)
    row = (await until(lambda: http.get(f"/api/v1/workflows/{workflow_id}"), lambda reply: reply.body["calls"])).body
    (call,) = row["calls"]
    assert call["call_id"] == row["nodes"][0]["call_id"]
    reply = await until(lambda: http.get(f"/api/v1/calls/{call['call_id']}/why"), lambda reply: reply.status == 200)
    (why,) = reply.body["decisions"]
    assert why["decision"]["replica_id"] == call["replica_id"]
    assert why["decision"]["replica_id"] in why["decision"]["candidates"]["replica_ids"]
    assert why["decision"]["call"]["node"] == "ask"
    assert any(call["replica_id"] in sentence for sentence in why["explanation"])
    assert "Why?" not in json.dumps(reply.body)  # no prompt is kept


async def test_replicas_are_listed_with_their_state_and_load(http: Http) -> None:
    rows = await until(http.replicas, lambda rows: all(row["running"] == 0 for row in rows.values()))
    assert sorted(rows) == ["qwen3-8b-h100-0", "qwen3-8b-l40s-0", "qwen3-8b-l40s-1", "sdxl-l40s-0"]
    for row in rows.values():
        assert row["emulated"] is True
        assert row["state"] == "ready"
        assert 0.0 <= row["utilisation"] <= 1.0
        assert row["signal_age_s"] >= 0.0


async def test_a_new_policy_decides_the_next_calls_and_shows_as_active(http: Http) -> None:
    before = (await http.get("/api/v1/policies")).body["active"]
    try:
        reply = await http.put("/api/v1/policies/routing", json={"policy": "round_robin"})
        assert (reply.status, reply.body) == (200, {"policy": "round_robin", "parameters": {}})
        assert (await http.get("/api/v1/policies")).body["active"]["policy"] == "round_robin"
        messages = [{"role": "user", "content": "Hi."}]
        body = {"model": LLM, "messages": messages, "max_tokens": 2}
        replies = [await http.post("/v1/chat/completions", json=body) for _ in range(6)]
        went = [reply.headers["x-swarmx-replica"] for reply in replies]
        assert went[:3] == went[3:]
        assert len(set(went)) == 3
        call_id = replies[-1].headers["x-swarmx-call-id"]
        why = await until(lambda: http.get(f"/api/v1/calls/{call_id}/why"), lambda reply: reply.status == 200)
        assert why.body["decisions"][0]["decision"]["policy"] == "round_robin"
    finally:
        assert (await http.put("/api/v1/policies/routing", json=before)).status == 200


@pytest.mark.parametrize(
    ("raw", "status", "said"),
    [
        (b'{"policy": "round_robbin"}', 400, "Did you mean 'round_robin'?"),
        (b'{"policy": "round_robin", "parameters": {"x": 1}}', 400, "no parameter 'x'"),
        (b'{"policy": "round_robin", "parameters": {"x": NaN}}', 422, "finite"),
        (b'{"policy": "round_robin", "params": {}}', 422, "params"),
        (b'{"policy": 5}', 422, "policy"),
        (b"{", 422, ""),
        (b"", 422, ""),
    ],
)
async def test_a_policy_that_does_not_exist_is_refused(http: Http, raw: bytes, status: int, said: str) -> None:
    headers = {"content-type": "application/json"}
    body = refused(await http.put("/api/v1/policies/routing", data=raw, headers=headers), status)
    assert said in body["detail"]


async def test_the_picture_of_a_workflow_is_in_the_blob_store(server: Server, http: Http) -> None:
    row = await http.ended(await http.submitted(PICTURE))
    assert row["state"] == "finished", row
    sha256 = row["outputs"]["sha256"]
    reply = await http.get(f"/api/v1/blobs/{sha256}")
    assert reply.status == 200
    assert reply.headers["content-type"] == "image/png"
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.body.startswith(b"\x89PNG")
    with a_key(server, "client", "blob-stranger") as token:
        await honoured(http, token)
        refused(await http.get(f"/api/v1/blobs/{sha256}", token=token), 404)


WAITS = {
    "name": "waits",
    "signals": {"approve": {}},
    "nodes": {"a": {"kind": "tool", "function": "upper", "args": {"text": "{{ signals.approve.who }}"}}},
}


async def fed(http: Http, workflow_id: str, *, after: int = 0) -> AsyncIterator[tuple[int, str]]:
    """Number and type of each event, as they come."""
    url, headers = f"{http.url}/api/v1/workflows/{workflow_id}/events", {"authorization": f"Bearer {http.token}"}
    async with (
        aiohttp.ClientSession() as session,
        session.get(url, headers=headers | ({"last-event-id": str(after)} if after else {})) as response,
    ):
        assert response.content_type == "text/event-stream"
        name = ""
        async for line in response.content:
            field, _, value = line.decode().strip().partition(": ")
            if field == "event":
                name = value
            elif field == "id":
                yield int(value), name


async def test_events_are_told_as_they_happen_until_the_end(http: Http) -> None:
    workflow_id = await http.submitted(WAITS)
    seen: list[tuple[int, str]] = []
    async for event in fed(http, workflow_id):
        seen.append(event)
        if event[1] == "SignalAwaited":
            reply = await http.post(f"/api/v1/workflows/{workflow_id}/signals/approve", json={"who": "ann"})
            assert reply.status == 202
    assert [number for number, _ in seen] == list(range(1, len(seen) + 1))
    assert (seen[0][1], seen[-1][1]) == ("Submitted", "Finished")
    assert "SignalReceived" in [name for _, name in seen]


async def test_a_feed_goes_on_after_a_restart_without_a_gap_or_a_repeat(tmp_path: Path) -> None:
    settings = {"emulated": [], "replicas": [{"id": "none", "model": "none", "url": "http://127.0.0.1:9"}]}
    seen: list[tuple[int, str]] = []
    with serving(settings, tmp_path) as server:
        async with server.http() as http:
            workflow_id = await http.submitted(WAITS)
            async for event in fed(http, workflow_id):
                seen.append(event)
                if event[1] == "SignalAwaited":
                    server.process.terminate()  # asked politely: those who wait are let go
            assert server.gone() == 0  # asked twice it may die of it, once it has nothing left to close
    assert seen[-1][1] == "SignalAwaited"
    with serving(settings, tmp_path) as server:
        async with server.http() as http:
            await http.post(f"/api/v1/workflows/{workflow_id}/signals/approve", json={"who": "ann"})
            seen += [event async for event in fed(http, workflow_id, after=seen[-1][0])]
    assert [number for number, _ in seen] == list(range(1, len(seen) + 1))
    assert seen[-1][1] == "Finished"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/api/v1/workflows/wf-unknown", 404),
        ("POST", "/api/v1/workflows/wf-unknown/cancel", 404),
        ("GET", "/api/v1/calls/call_unknown", 404),
        ("GET", "/api/v1/calls/call_unknown/why", 404),
        ("GET", f"/api/v1/blobs/{'0' * 64}", 404),
        ("DELETE", "/api/v1/workflows", 405),
    ],
)
async def test_what_is_not_there_is_a_problem_document(http: Http, method: str, path: str, status: int) -> None:
    refused(await http.ask(method, path), status)


async def test_a_body_that_is_too_large_is_a_problem_document(http: Http) -> None:
    async def parts() -> Any:
        for _ in range(50):
            yield b" " * 50_000

    for method, path in [("POST", "/api/v1/workflows"), ("PUT", "/api/v1/policies/routing")]:
        refused(await http.ask(method, path, data=parts(), headers={"content-type": "application/json"}), 413)


async def test_many_workflows_at_once_all_finish(http: Http) -> None:
    workflow = {
        "name": "fan",
        "nodes": {
            "plan": {"kind": "tool", "function": "split_lines", "args": {"text": "a\nb\nc"}},
            "each": {
                "kind": "map", "over": "plan", "do": {
                    "ask": {"kind": "llm", "model": LLM, "prompt": "{{ item }}", "max_tokens": 20}},
                "result": "{{ ask.text }}",
            },
            "write": {"kind": "llm", "model": LLM, "prompt": '{{ each | join(" ") }}', "max_tokens": 20},
        },
    }  # fmt: skip
    ids = await asyncio.gather(*(http.submitted(workflow) for _ in range(20)))
    rows = await asyncio.gather(*(http.ended(workflow_id) for workflow_id in ids))
    assert {row["state"] for row in rows} == {"finished"}
    for workflow_id in ids:
        reply = await until(
            partial(http.get, f"/api/v1/workflows/{workflow_id}"), lambda reply: len(reply.body["calls"]) == 4
        )
        assert {call["workflow_kind"] for call in reply.body["calls"]} == {"default"}
