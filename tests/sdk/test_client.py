"""The Python client: what it asks, asks again, and makes of the answers; first of a scripted server, then of ours."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

import swarmx
from swarmx.core.errors import ConfigError
from swarmx.sdk import (
    AsyncClient,
    Client,
    Conflict,
    NotFound,
    Problem,
    ServerFailed,
    Unauthorized,
    Unavailable,
    Unprocessable,
    Unreachable,
    WorkflowEnded,
)
from tests.e2e.fleet import Http, Server

ONE = """
name: one
inputs: {question: null}
nodes: {ask: {kind: llm, model: qwen3-8b, prompt: "{{ inputs.question }}", max_tokens: 12}}
outputs: {said: "{{ ask.text }}"}
"""
INSTANT = {"name": "instant", "nodes": {"a": {"kind": "tool", "function": "upper", "args": {"text": "x"}}}}
DRAW = {"kind": "image", "model": "sdxl", "prompt": "A bee"}
SLOW = {"name": "slow", "nodes": {"draw": {**DRAW, "steps": 200, "width": 2048, "height": 2048, "n": 3}}}
ACCEPTED = {"workflow_id": "wf-1", "state": "running"}
FINISHED = {"workflow_id": "wf-1", "state": "finished", "name": "n", "kind": "k", "created_at_s": 1.0, "outputs": 7}


@dataclass(slots=True)
class Script:
    """A server that answers one request after the other as it is told, and remembers them."""

    answers: list[Callable[[web.Request], web.StreamResponse] | Callable[[web.Request], Any]]
    seen: list[web.Request] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    url: str = ""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.seen.append(request)
        self.bodies.append(await request.read())
        made = self.answers.pop(0)(request)
        return made if isinstance(made, web.StreamResponse) else await made

    def keys(self) -> list[str | None]:
        return [request.headers.get("idempotency-key") for request in self.seen]


def says(body: Any, status: int = 200, **headers: str) -> Callable[[web.Request], web.StreamResponse]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda _: web.json_response(body, status=status, headers=named)


async def hangs_up(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.close()
    await asyncio.Event().wait()
    raise AssertionError


def streams(*numbers: int, last: int | None = None) -> Callable[[web.Request], Any]:
    """Events of these numbers; `last` is the number of the final one, else the connection ends early."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"retry: 1000\n\n: nothing new\n\n")
        for number in numbers:
            name = "Finished" if number == last else "NodeStarted"
            row = f'{{"seq": {number}, "at_s": 1.5, "type": "{name}", "path": "a"}}'
            await response.write(f"event: {name}\nid: {number}\ndata: {row}\n\n".encode())
        return response

    return answer


@pytest.fixture
async def script() -> AsyncIterator[Script]:
    found = Script([])
    app = web.Application()
    app.router.add_route("*", "/{any:.*}", found.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    found.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield found
    await runner.cleanup()


@pytest.fixture
async def client(script: Script) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(f"{script.url}/", "swx-1", patience_s=10.0) as found:
        yield found


async def test_a_submission_that_is_not_answered_is_sent_again_with_the_same_key(
    script: Script, client: AsyncClient
) -> None:
    unavailable = says({"detail": "it stops"}, 503, retry_after="0")
    script.answers = [hangs_up, unavailable, says({"detail": "at work", "rule": "in_flight"}, 409), says(ACCEPTED, 202)]
    assert await client.submit(INSTANT, {"a": 1}) == "wf-1"
    assert len(set(script.keys())) == 1
    assert script.keys()[0] is not None
    assert len(set(script.bodies)) == 1
    assert script.seen[0].headers["authorization"] == "Bearer swx-1"


async def test_every_submission_has_a_key_of_its_own_unless_it_is_given_one(
    script: Script, client: AsyncClient
) -> None:
    script.answers = [says(ACCEPTED, 202)] * 4
    for key in (None, None, "mine", "mine"):
        await client.submit(ONE, key=key)
    first, second, *given = script.keys()
    assert first != second
    assert given == ["mine", "mine"]


async def test_a_file_is_submitted_as_its_text(script: Script, client: AsyncClient, tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(ONE)
    script.answers = [says(ACCEPTED, 202)] * 2
    await client.submit(tmp_path / "one.yaml")
    await client.submit(ONE)
    assert script.bodies[0] == script.bodies[1]
    with pytest.raises(ConfigError, match=r"two\.yaml cannot be read"):
        await client.submit(tmp_path / "two.yaml")


async def test_what_the_server_says_about_when_to_come_back_is_heeded(script: Script, client: AsyncClient) -> None:
    loop = asyncio.get_running_loop()
    script.answers = [says({"detail": "later"}, 429, retry_after="1"), says(FINISHED)]
    begun_s = loop.time()
    await client.get("wf-1")
    assert loop.time() - begun_s >= 0.99
    date = "Fri, 31 Dec 1999 23:59:59 GMT"
    script.answers = [says({"detail": "later"}, 503, retry_after=date), says(FINISHED)]
    await client.get("wf-1")


async def test_patience_has_an_end_and_then_the_server_is_quoted(script: Script) -> None:
    async with AsyncClient(script.url, "x", patience_s=0.0) as client:
        script.answers = [says({"detail": "the disk is full"}, 503)]
        with pytest.raises(Unavailable, match=r"^the disk is full$") as caught:
            await client.get("wf-1")
        assert caught.value.status == 503
        script.answers = [hangs_up] * 2  # aiohttp asks twice where a kept connection was dropped
        with pytest.raises(Unreachable, match=rf"no answer from {script.url} within 0 s .*`swarmx up`"):
            await client.get("wf-1")


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, Unauthorized), (404, NotFound), (409, Conflict), (422, Unprocessable), (500, ServerFailed)],
)
async def test_a_refusal_is_an_exception_with_what_the_server_said(
    script: Script, client: AsyncClient, status: int, kind: type[Problem]
) -> None:
    script.answers = [says({"detail": "so it is", "where": "a.prompt", "rule": "state"}, status)]
    with pytest.raises(kind, match=r"^so it is$") as caught:
        await client.kill("wf-1")
    assert (caught.value.status, caught.value.where, caught.value.rule) == (status, "a.prompt", "state")
    assert len(script.seen) == 1


async def test_what_should_not_be_retried_is_not(script: Script, client: AsyncClient) -> None:
    script.answers = [says({"detail": "no"}, 503, x_should_retry="false")]
    with pytest.raises(Unavailable):
        await client.get("wf-1")


async def test_an_answer_of_another_server_is_said_to_be_one(script: Script, client: AsyncClient) -> None:
    script.answers = [says({"hello": "world"})]
    with pytest.raises(Problem, match="otherwise than a SwarmX server"):
        await client.get("wf-1")
    script.answers = [lambda _: web.Response(status=500, text="<html>")]
    with pytest.raises(ServerFailed, match="status 500: b'<html>'"):
        await client.get("wf-1")


async def test_a_stream_goes_on_behind_the_last_event_when_its_connection_breaks(
    script: Script, client: AsyncClient
) -> None:
    running = says({**FINISHED, "state": "running"})
    script.answers = [streams(1, 2), hangs_up, streams(3), streams(), running, streams(4, 5, last=5)]
    events = [event async for event in client.events("wf-1")]
    assert [(event.seq, event.type) for event in events] == [(n, "NodeStarted") for n in range(1, 5)] + [
        (5, "Finished")
    ]
    assert events[0].data == {"path": "a"}
    resumed = [request.headers.get("last-event-id") for request in script.seen if request.path.endswith("/events")]
    assert resumed == [None, "2", "2", "3", "3"]


async def test_a_stream_behind_the_end_is_empty(script: Script, client: AsyncClient) -> None:
    script.answers = [streams(), says(FINISHED), says({"events": []})]
    assert [event async for event in client.events("wf-1", after=5)] == []
    assert script.seen[0].headers["last-event-id"] == "5"


async def test_a_stream_that_a_server_ended_because_it_stopped_is_read_to_its_end_from_the_next(
    script: Script, client: AsyncClient
) -> None:
    script.answers = [streams(1), streams(), says(FINISHED), says({"events": [{"seq": 2}]}), streams(2, last=2)]
    assert [event.seq async for event in client.events("wf-1")] == [1, 2]


async def test_a_stream_of_nothing_that_there_is_is_an_error(script: Script, client: AsyncClient) -> None:
    script.answers = [says({"detail": "there is none"}, 404)]
    with pytest.raises(NotFound, match="there is none"):
        _ = [event async for event in client.events("wf-1")]


async def test_a_wait_asks_until_the_workflow_has_ended_or_time_is_up(script: Script, client: AsyncClient) -> None:
    running = says({**FINISHED, "state": "running"})
    script.answers = [running, running, says(FINISHED)]
    assert (await client.wait("wf-1")).outputs == 7
    assert [request.headers["prefer"] for request in script.seen] == ["wait=30"] * 3
    script.answers = [running] * 9
    with pytest.raises(TimeoutError, match=r"wf-1 has not ended within 0\.3 s"):
        await client.wait("wf-1", timeout_s=0.3)


async def test_a_run_without_outputs_is_an_error_with_the_workflow_in_it(script: Script, client: AsyncClient) -> None:
    failed = {**FINISHED, "state": "failed", "error": "too long", "error_node": "ask", "outputs": None}
    script.answers = [says(ACCEPTED, 202), says(failed)]
    with pytest.raises(WorkflowEnded, match=r"^the workflow wf-1 is failed at ask: too long$") as caught:
        await client.run(ONE)
    assert caught.value.workflow.state == "failed"


async def test_names_are_quoted_in_paths(script: Script, client: AsyncClient) -> None:
    script.answers = [says({}), says(FINISHED)]
    await client.signal("a/b", "x?y", {"ok": True})
    await client.get("default:open#2")
    assert [request.raw_path for request in script.seen] == [
        "/api/v1/workflows/a%2Fb/signals/x%3Fy",
        "/api/v1/workflows/default:open%232",
    ]
    assert script.bodies[0] == b'{"ok":true}'


def test_without_a_token_it_says_where_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SWARMX_TOKEN", raising=False)
    with pytest.raises(ConfigError, match=r"no token.*\$SWARMX_TOKEN.*swarmx keys add"):
        Client()


def test_an_address_that_is_none_is_said_to_be() -> None:
    with Client("ftp://127.0.0.1", "x") as client, pytest.raises(ConfigError, match="is not an address"):
        client.get("wf-1")


def test_the_clients_are_there_and_importing_swarmx_brings_no_http_library() -> None:
    assert swarmx.Client is Client
    assert swarmx.AsyncClient is AsyncClient
    with pytest.raises(AttributeError, match="no attribute 'Server'"):
        _ = swarmx.Server  # type: ignore[attr-defined]
    check = "import swarmx, sys; assert not {'aiohttp', 'asyncio', 'numpy'} & set(sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", check], check=True, env=env)


def test_a_closed_client_says_so_and_closing_twice_is_fine() -> None:
    client = Client("http://127.0.0.1:9", "x")
    client.close()
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.get("wf-1")


@pytest.fixture
async def real(server: Server, http: Http) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.url, server.token) as found:
        yield found


@pytest.mark.process
async def test_a_workflow_is_submitted_followed_and_explained(real: AsyncClient) -> None:
    workflow_id = await real.submit(ONE, {"question": "Why?"})
    events = [event async for event in real.events(workflow_id)]
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert [event.type for event in events] == ["Submitted", "NodeStarted", "NodeFinished", "Finished"]
    workflow = await real.wait(workflow_id)
    assert (workflow.state, workflow.ended) == ("finished", True)
    assert workflow.outputs["said"]
    (node,) = workflow.nodes
    assert (node.path, node.state) == ("ask", "finished")
    call = await real.call(workflow.calls[0].call_id)
    assert (call.node, call.work_done > 0.0) == ("ask", True)
    why = await real.why(call.call_id, policy="round_robin")
    assert why.decisions[0].explanation
    assert why.decisions[0].instead is not None
    assert workflow_id in [found.workflow_id async for found in real.list(state="finished")]
    page = await real.page(limit=1)
    assert len(page.workflows) == 1


@pytest.mark.process
async def test_a_key_gives_the_same_workflow_again(real: AsyncClient) -> None:
    first = await real.submit(INSTANT, key="sdk-same")
    assert await real.submit(INSTANT, key="sdk-same") == first
    with pytest.raises(Unprocessable, match="came with another request"):
        await real.submit(ONE, {"question": "?"}, key="sdk-same")


@pytest.mark.process
async def test_workflows_are_cancelled_killed_forked_and_retried(real: AsyncClient) -> None:
    first, second = await real.submit(SLOW), await real.submit(SLOW)
    assert (await real.cancel(first)).state in ("cancelling", "cancelled")
    assert (await real.kill(second)).state == "cancelled"
    assert (await real.wait(first)).state == "cancelled"
    with pytest.raises(Conflict, match=r"can be retried") as caught:
        await real.retry(first)
    assert caught.value.rule == "state"
    done = await real.submit(INSTANT)
    await real.wait(done)
    fork = await real.fork(done, "a")
    assert (await real.wait(fork)).forked_from == done
    with pytest.raises(Unprocessable, match="no node 'nope'"):
        await real.fork(done, "nope")


@pytest.mark.process
async def test_an_image_is_fetched_by_its_hash(real: AsyncClient) -> None:
    picture = {"name": "p", "nodes": {"draw": {**DRAW, "steps": 2, "width": 128, "height": 128}}}
    picture["outputs"] = {"sha256": "{{ draw.images | pick('sha256') | first }}"}
    outputs = await real.run(picture)
    assert (await real.blob(outputs["sha256"])).startswith(b"\x89PNG")


@pytest.mark.process
async def test_leaving_a_stream_early_closes_it(real: AsyncClient) -> None:
    workflow_id = await real.submit(SLOW)
    async with aclosing(real.events(workflow_id)) as events:
        async for event in events:
            assert event.type == "Submitted"
            break
    await real.kill(workflow_id)


@pytest.mark.process
async def test_the_blocking_client_works_inside_a_running_loop(server: Server, http: Http) -> None:
    with Client(server.url, server.token) as client:  # this very function runs in a loop
        assert client.run(ONE, {"question": "Why?"})["said"]
        workflow_id = client.submit(SLOW)
        events = client.events(workflow_id)
        assert next(events).type == "Submitted"
        events.close()
        client.kill(workflow_id)
        assert client.wait(workflow_id).state == "cancelled"
        assert any(found.workflow_id == workflow_id for found in client.list())
        assert client.get(workflow_id).nodes
        with pytest.raises(NotFound, match="no workflow 'x'"):
            client.get("x")
