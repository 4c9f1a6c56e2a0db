"""Calls against real servers on loopback: what is relayed, what is retried, what is cancelled, what is recorded."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import numpy as np
import pytest
from aiohttp import web

from swarmx.agents.router import RouterAgent
from swarmx.agents.router_settings import RouterSettings, TenantSettings
from swarmx.core.actions import Cancel, Dispatch, Refuse
from swarmx.core.forecast import Forecast, point
from swarmx.core.messages import (
    AlertRaised,
    CallReady,
    DecisionMade,
    FirstToken,
    ForecastRefined,
    ForecastScored,
    Message,
    SignalReported,
    TimerFired,
    TokensProgressed,
    WorkflowEnded,
)
from swarmx.core.nouns import Call, Decision, ReplicaState
from swarmx.core.ports import Forecaster
from swarmx.core.prompts import Encoding, PromptText, cut
from swarmx.core.records import CallRecord, ModelRequest
from swarmx.neural.empirical import EmpiricalForecaster
from swarmx.runtime.call_ends import CallRefused
from swarmx.runtime.calls import CallService
from swarmx.runtime.clock import WallClock
from swarmx.runtime.fleet_book import FleetBook
from swarmx.runtime.journal import MemoryJournal
from swarmx.runtime.live import LiveShell
from swarmx.runtime.switchboard import Switchboard
from swarmx.runtime.upstream import Upstream
from tests.agents.worlds import PROMPT, UNREAD, a_call, changed

ANSWER = b'{"choices":[{"message":{"content":"42"}}],  "usage":{"prompt_tokens":11,"completion_tokens":5}}'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":11,"completion_tokens":3}}\n\n'
EVENTS = [b'data: {"choices":[{"delta":{"content":"%d"}}]}\n\n' % i for i in range(3)]
STREAM = [*EVENTS, USAGE, b"data: [DONE]\n\n"]
OLD_RECORD = b"""{"call_id":"c","tenant":"t","workflow_id":"w","workflow_kind":"k","node":"n","role":"r","kind":"llm",
"model":"m","state":"finished","attempts":1,"replica_id":"a","device":"cpu","prompt_key":"00","prompt_bytes":9,
"prompt_tokens":3,"work_done":5.0,"forecast_p50":4.0,"forecast_p90":8.0,"forecast_source":"prior","ready_at_s":1.0,
"dispatched_at_s":1.5,"first_token_at_s":null,"ended_at_s":2.0,"error":null,"schema_version":1}"""

Serve = Callable[[web.Request], Awaitable[web.StreamResponse]]


class InterruptedUpstream(Upstream):
    """Does something between the last byte of an answer and the moment in which the call hears of it."""

    then: Callable[[], None] | None = None

    async def read(self, response: Any) -> Any:
        found = await super().read(response)
        if self.then is not None:
            self.then()
        return found


class Scene:
    """A router, its live shell and a call service before servers that do what the test says."""

    def __init__(self, stack: AsyncExitStack, settings: RouterSettings, forecaster: Forecaster, **more: Any) -> None:
        self.records: list[CallRecord] = []
        self.heard: list[Message] = []
        self.router = RouterAgent(settings)
        self._stack = stack
        self._urls: dict[str, str] = {}
        clock = WallClock()
        self.book = FleetBook(clock)
        self.switchboard = Switchboard([self.router], epoch=1, journal=MemoryJournal(limit=0))
        self.forecaster = forecaster
        self.upstream = InterruptedUpstream(connect_timeout_s=1.0)
        self.calls = CallService(
            post=lambda message: self.shell.post(message),
            clock=clock,
            forecaster=self.forecaster,
            upstream=self.upstream,
            book=self.book,
            on_record=self.records.append,
            **more,
        )
        self.shell = LiveShell(
            self.switchboard,
            clock,
            {
                Dispatch: self.calls.perform_dispatch,
                Cancel: self.calls.perform_cancel,
                Refuse: self.calls.perform_refuse,
            },
        )
        self.switchboard.observers += [
            self.book.observe,
            self.calls.observe,
            lambda message, now_s: self.heard.append(message),
        ]

    def announce(self) -> None:
        """A replica of the model is starting, so calls wait for it."""
        self.shell.post(changed("later", "starting"))

    async def serve(self, name: str, *serve: Serve) -> None:
        """A replica that answers its first calls by the functions, and all later ones by the last."""
        left = list(serve)

        async def handle(request: web.Request) -> web.StreamResponse:
            await request.read()
            return await (left.pop(0) if len(left) > 1 else left[0])(request)

        app = web.Application()
        app.router.add_post("/v1/chat/completions", handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.add(name, runner.addresses[0][1])

    def add(self, name: str, port: int) -> None:
        self._urls[name] = f"http://127.0.0.1:{port}"
        self.change(name, "ready")

    def change(self, name: str, state: ReplicaState) -> None:
        self.shell.post(changed(name, state, url=self._urls[name]))

    async def ask(self, prompt: PromptText = PROMPT) -> bytes:
        return (await self.calls.answer(a_call("c"), prompt, b"{}")).body

    async def ask_stream(self) -> list[bytes]:
        return [chunk async for chunk in self.calls.stream(a_call("c", stream=True), PROMPT, b"{}")]

    def run_out_of_patience(self) -> None:
        """The router's timer for the answer, sooner than its time."""
        self.shell.post(TimerFired(key="answer:c"), to="router")

    def decisions(self, call_id: str = "c") -> list[Decision]:
        made = [message.decision for message in self.heard if isinstance(message, DecisionMade)]
        return [decision for decision in made if decision.call.call_id == call_id]

    async def occupy(self, name: str, stack: AsyncExitStack) -> None:
        """Another call is at the replica, and stays there until the stack is closed."""
        others = [other for other in self._urls if other != name]
        for other in others:
            self.change(other, "cordoned")
        task = asyncio.create_task(self.calls.answer(a_call(f"at {name}"), PROMPT, b"{}"))
        while not self.router.in_flight(name):
            await asyncio.sleep(0)
        for other in others:
            self.change(other, "ready")

        async def leave() -> None:
            task.cancel()
            await asyncio.wait({task})

        stack.push_async_callback(leave)

    def attempts_in_flight(self) -> int:
        return sum(self.router.in_flight(name) for name in self._urls)

    def check_settled(self, state: str) -> CallRecord:
        """Exactly one record, and nothing left anywhere."""
        (record,) = self.records
        assert record.state == state
        assert self.attempts_in_flight() == self.calls.in_flight == self.switchboard.faults == 0
        assert not any(status.in_flight for status in self.book.statuses())
        self.router.validate()
        return record


Make = Callable[..., Scene]


@pytest.fixture
async def scene() -> AsyncIterator[Make]:
    async with AsyncExitStack() as stack:

        def make(
            *,
            forecaster: Forecaster | None = None,
            refiner: Any = None,
            path_of: Any = None,
            on_prompt: Any = None,
            on_answer: Any = None,
            keep: Any = None,
            **patience: Any,
        ) -> Scene:
            settings = RouterSettings(**{"policy": "round_robin", **patience})
            plain_or = forecaster or EmpiricalForecaster()
            made = Scene(
                stack,
                settings,
                plain_or,
                refiner=refiner,
                path_of=path_of,
                on_prompt=on_prompt,
                on_answer=on_answer,
                keep=keep,
            )
            stack.push_async_callback(made.upstream.close)
            stack.callback(made.shell.close)
            return made

        yield make


async def plain(request: web.Request) -> web.StreamResponse:
    return web.Response(body=ANSWER, content_type="application/json")


def with_status(status: int, body: bytes = b"{}") -> Serve:
    async def serve(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, body=body)

    return serve


def saying(body: bytes) -> Serve:
    async def serve(request: web.Request) -> web.StreamResponse:
        return web.Response(body=body)

    return serve


def streaming(*chunks: bytes, breaks: bool = False) -> Serve:
    async def serve(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for chunk in chunks:
            await response.write(chunk)
            await asyncio.sleep(0)
        if breaks:
            _transport(request).close()
        return response

    return serve


async def closing(request: web.Request) -> web.StreamResponse:
    _transport(request).close()
    return web.Response()


class Hanging:
    """Starts to answer with `chunks` and then says nothing more; knows when its client has left."""

    def __init__(self, *chunks: bytes, status: int = 200) -> None:
        self.entered = asyncio.Event()
        self.left = asyncio.Event()
        self._chunks = chunks
        self._status = status

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        try:
            response = web.StreamResponse(status=self._status)
            if self._chunks:
                await response.prepare(request)
            for chunk in self._chunks:
                await response.write(chunk)
            self.entered.set()
            await asyncio.Event().wait()
        finally:
            self.left.set()
        return response


def _transport(request: web.Request) -> asyncio.Transport:
    assert isinstance(request.transport, asyncio.Transport)
    return request.transport


async def test_an_answer_is_relayed_byte_by_byte_and_recorded_once(scene: Make) -> None:
    s = scene()
    await s.serve("a", plain)
    assert await s.ask() == ANSWER
    record = s.check_settled("finished")
    assert (record.attempts, record.replica_id, record.work_done, record.prompt_tokens) == (1, "a", 5.0, 11)


async def test_a_workflow_gets_the_answer_as_a_value(scene: Make) -> None:
    s = scene()
    await s.serve("a", plain)
    body = {"messages": [{"role": "user", "content": "?"}]}
    result = await s.calls.complete(
        ModelRequest(
            tenant="t", workflow_id="w", workflow_kind="k", node="n", role="r", kind="llm", model="m", body=body
        )
    )
    assert result.answer == msgspec.json.decode(ANSWER)
    assert (result.replica_id, result.attempts, result.failure) == ("a", 1, None)


@pytest.mark.parametrize(
    "chunks",
    [
        STREAM,
        [b"".join(STREAM)],
        [bytes([byte]) for byte in b"".join(STREAM)],
        [*STREAM[:-1], b"data: [DONE]", b"\n\n"],
        [b": hello\n\n", *STREAM],
    ],
    ids=["events", "at once", "bytes", "a late blank line", "a comment first"],
)
async def test_a_stream_is_relayed_byte_by_byte(scene: Make, chunks: list[bytes]) -> None:
    s = scene()
    await s.serve("a", streaming(*chunks))
    assert b"".join(await s.ask_stream()) == b"".join(chunks)
    record = s.check_settled("finished")
    assert (record.work_done, record.prompt_tokens) == (3.0, 11)
    assert record.first_token_at_s is not None
    assert sum(isinstance(message, FirstToken) for message in s.heard) == 1


async def test_a_stream_that_does_not_say_its_usage_is_counted_by_its_events(scene: Make) -> None:
    s = scene()
    await s.serve("a", streaming(b"data: {}\n\n", *EVENTS, b"data: [DONE]\n\n"))
    await s.ask_stream()
    assert s.check_settled("finished").work_done == 3.0


async def test_the_router_hears_how_far_a_stream_has_come(scene: Make) -> None:
    s = scene()
    hanging = Hanging(*EVENTS)
    await s.serve("a", hanging)
    stream = s.calls.stream(a_call("c", stream=True), PROMPT, b"{}")
    await anext(stream)
    assert any(isinstance(message, TokensProgressed) for message in s.heard)
    await stream.aclose()
    s.check_settled("cancelled")


FAILURES: dict[str, Serve] = {
    "503": with_status(503),
    "429": with_status(429),
    "a token of ours that it does not take": with_status(401),
    "a redirect": with_status(307),
    "nested too deeply": saying(b"[" * 100_000),
    "no text": saying(b'{"a": "\xff"}'),
    "no JSON": saying(b"<html>"),
    "other JSON": saying(b'{"hello": 1}'),
    "a number": saying(b"42"),
    "closed before the first byte": closing,
}


@pytest.mark.parametrize("name", FAILURES)
async def test_a_replica_that_fails_is_replaced_by_another(scene: Make, name: str) -> None:
    s = scene()
    await s.serve("a", FAILURES[name])
    await s.serve("b", plain)
    assert await s.ask() == ANSWER
    record = s.check_settled("finished")
    assert (record.attempts, record.replica_id) == (2, "b")


@pytest.mark.parametrize("name", FAILURES)
async def test_a_replica_that_fails_before_the_first_token_of_a_stream_is_replaced(scene: Make, name: str) -> None:
    s = scene()
    await s.serve("a", FAILURES[name])
    await s.serve("b", streaming(*STREAM))
    assert b"".join(await s.ask_stream()) == b"".join(STREAM)
    assert s.check_settled("finished").attempts == 2


async def test_a_replica_that_refuses_connections_is_replaced_by_another(scene: Make) -> None:
    s = scene()
    s.add("a", 1)
    await s.serve("b", plain)
    assert await s.ask() == ANSWER
    assert s.check_settled("finished").attempts == 2


async def test_a_request_that_the_replica_rejects_is_not_retried_and_keeps_its_answer(scene: Make) -> None:
    s = scene()
    await s.serve("a", with_status(400, b'{"error":"too long"}'))
    await s.serve("b", plain)
    with pytest.raises(CallRefused) as refused:
        await s.ask()
    assert (refused.value.status, refused.value.body, refused.value.attempts) == (400, b'{"error":"too long"}', 1)
    assert s.check_settled("refused").error == "failed: rejected"


async def test_replicas_that_are_busy_are_not_taken_for_broken(scene: Make) -> None:
    s = scene(max_attempts=2, breaker_failures=1)
    await s.serve("a", with_status(429))
    with pytest.raises(CallRefused) as refused:
        await s.ask()
    assert refused.value.status == 429
    assert not any(isinstance(message, AlertRaised) for message in s.heard)


async def test_a_call_that_every_replica_fails_is_refused_with_the_last_reason(scene: Make) -> None:
    s = scene(max_attempts=2)
    await s.serve("a", with_status(503))
    with pytest.raises(CallRefused, match="retries_exhausted: status 503") as refused:
        await s.ask()
    assert refused.value.status == 502
    assert s.check_settled("refused").attempts == 2


async def test_a_call_that_no_replica_takes_in_time_is_refused(scene: Make) -> None:
    s = scene(queue_timeout_s=0.05)
    s.announce()
    with pytest.raises(CallRefused) as refused:
        await s.ask()
    assert (refused.value.status, refused.value.reason) == (503, "no_replica")
    assert s.check_settled("refused").replica_id is None


class Sure(EmpiricalForecaster):
    """Expects every answer to have so many tokens."""

    def __init__(self, tokens: float) -> None:
        super().__init__()
        self._tokens = tokens

    def forecast(self, call: Call, encoding: Encoding) -> Forecast:
        return point(self._tokens, unit="tokens")


POOR = {"t": TenantSettings(tokens_per_minute=60_000.0)}  # a thousand tokens a second


def a_request(**more: Any) -> ModelRequest:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1000}
    return ModelRequest(
        tenant="t", workflow_id="w", workflow_kind="k", node="n", role="r", kind="llm", model="m", body=body, **more
    )


async def test_the_engine_is_told_whose_call_it_is_and_no_two_attempts_have_the_same_name(scene: Make) -> None:
    seen: list[tuple[str | None, str | None]] = []

    def noting(serve: Serve) -> Serve:
        async def handle(request: web.Request) -> web.StreamResponse:
            seen.append((request.headers.get("x-request-id"), request.headers.get("idempotency-key")))
            return await serve(request)

        return handle

    s = scene()
    await s.serve("a", noting(with_status(503)), noting(plain))
    await s.calls.complete(a_request(request_id="wf/n/1", idempotency_key="wf/n"))
    assert seen == [("wf/n/1", "wf/n"), ("wf/n/1.2", "wf/n")]
    await s.ask()
    assert seen[-1] == (s.records[-1].call_id, None), "a call without a workflow goes by its own id"


async def test_the_record_of_an_owned_call_comes_with_its_result_and_is_nobody_elses(scene: Make) -> None:
    kept: list[CallRecord] = []
    s = scene(keep=kept.append)
    await s.serve("a", plain, with_status(400), plain)
    answered = await s.calls.complete(a_request(owned=True))
    rejected = await s.calls.complete(a_request(owned=True))
    assert [answered.record, rejected.record] == s.records
    assert rejected.failure is not None
    assert rejected.failure.cause == "rejected"
    assert kept == []
    result = await s.calls.complete(a_request())
    assert result.record is None
    assert kept == s.records[2:]


async def test_an_owned_call_that_is_cancelled_leaves_its_record_to_the_server(scene: Make) -> None:
    kept: list[CallRecord] = []
    s = scene(keep=kept.append)
    begun = asyncio.Event()

    async def hangs(request: web.Request) -> web.StreamResponse:
        begun.set()
        await asyncio.Event().wait()
        raise AssertionError

    await s.serve("a", hangs)
    task = asyncio.create_task(s.calls.complete(a_request(owned=True)))
    await begun.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert [record.state for record in kept] == ["cancelled"]


def spend(s: Scene, tokens: int) -> None:
    """Another call of the tenant has taken so many tokens; nobody waits for it."""
    s.shell.post(CallReady(call=a_call("other", prompt_tokens=tokens), forecast=point(0.0, unit="tokens")))


async def test_a_client_over_its_budget_is_refused_with_the_time_to_come_back(scene: Make) -> None:
    s = scene(tenants=POOR, forecaster=Sure(300.0))
    await s.serve("a", plain)
    spend(s, 60_000)
    with pytest.raises(CallRefused, match="budget: this tenant may use 60000 tokens a minute") as refused:
        await s.ask()
    assert (refused.value.status, refused.value.reason) == (429, "budget")
    assert refused.value.retry_after_s == pytest.approx(0.4, abs=0.2)
    assert s.records[0].state == "refused"


async def test_a_call_of_a_workflow_over_its_budget_waits_for_it(scene: Make) -> None:
    s = scene(tenants=POOR, forecaster=Sure(300.0))
    await s.serve("a", plain)
    spend(s, 60_000)
    result = await s.calls.complete(a_request())
    assert result.answer is not None
    assert [record.state for record in s.records] == ["finished"]


async def test_a_call_of_a_workflow_does_not_wait_past_its_deadline(scene: Make) -> None:
    s = scene(tenants=POOR, forecaster=Sure(300.0))
    await s.serve("a", plain)
    spend(s, 120_000)
    result = await s.calls.complete(a_request(deadline_at_s=WallClock().now_s() + 30.0))
    assert result.answer is None
    assert result.failure is not None
    assert result.failure.cause == "refused"
    assert "refused after 0 attempts: budget" in result.failure.error
    assert s.records[0].state == "refused"


async def test_a_call_that_is_cancelled_while_it_waits_for_its_budget_leaves_nothing(scene: Make) -> None:
    s = scene(tenants=POOR, forecaster=Sure(300.0))
    await s.serve("a", plain)
    spend(s, 120_000)
    task = asyncio.create_task(s.calls.complete(a_request()))
    while not s.calls.in_flight:
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.wait({task})
    assert [record.state for record in s.records] == ["cancelled"]
    assert s.calls.in_flight == 0


@pytest.mark.parametrize("breaks", [True, False], ids=["connection lost", "no end"])
async def test_a_stream_that_breaks_ends_with_an_error_event_and_is_not_retried(scene: Make, breaks: bool) -> None:
    s = scene()
    await s.serve("a", streaming(*EVENTS, breaks=breaks))
    await s.serve("b", streaming(*STREAM))
    chunks = await s.ask_stream()
    assert b"".join(chunks[:-1]) == b"".join(EVENTS)
    error = msgspec.json.decode(chunks[-1].removeprefix(b"data: "))["error"]
    assert error["code"] == "connection_lost"
    record = s.check_settled("failed")
    assert (record.attempts, record.replica_id) == (1, "a")


async def test_a_replica_that_hangs_is_left_and_another_answers(scene: Make) -> None:
    s = scene()
    hanging = Hanging()
    await s.serve("a", hanging)
    await s.serve("b", plain)
    task = asyncio.create_task(s.ask())
    await hanging.entered.wait()
    s.run_out_of_patience()
    assert await task == ANSWER
    await asyncio.wait_for(hanging.left.wait(), 60.0)
    assert s.check_settled("finished").attempts == 2


async def test_a_replica_that_hangs_within_its_refusal_is_left_as_well(scene: Make) -> None:
    s = scene()
    hanging = Hanging(b"wait", status=503)
    await s.serve("a", hanging)
    await s.serve("b", plain)
    task = asyncio.create_task(s.ask())
    await hanging.entered.wait()
    s.run_out_of_patience()
    assert await task == ANSWER
    await asyncio.wait_for(hanging.left.wait(), 60.0)
    s.check_settled("finished")


async def test_a_stream_that_hangs_in_the_middle_is_given_up(scene: Make) -> None:
    s = scene()
    hanging = Hanging(*EVENTS)
    await s.serve("a", hanging)
    stream = s.calls.stream(a_call("c", stream=True), PROMPT, b"{}")
    chunks = [await anext(stream)]
    s.run_out_of_patience()
    chunks += [chunk async for chunk in stream]
    assert b'"code":"timeout"' in chunks[-1]
    await asyncio.wait_for(hanging.left.wait(), 60.0)
    s.check_settled("failed")


async def test_a_client_that_leaves_is_followed_down_to_the_server(scene: Make) -> None:
    s = scene()
    hanging = Hanging()
    await s.serve("a", hanging)
    task = asyncio.create_task(s.ask())
    await hanging.entered.wait()
    assert s.attempts_in_flight() == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(hanging.left.wait(), 60.0)
    s.check_settled("cancelled")


async def test_a_client_that_leaves_a_stream_is_followed_down_to_the_server(scene: Make) -> None:
    s = scene()
    hanging = Hanging(*EVENTS)
    await s.serve("a", hanging)
    stream = s.calls.stream(a_call("c", stream=True), PROMPT, b"{}")
    await anext(stream)
    await stream.aclose()
    await asyncio.wait_for(hanging.left.wait(), 60.0)
    s.check_settled("cancelled")


async def test_a_client_that_leaves_the_queue_is_forgotten(scene: Make) -> None:
    s = scene()
    s.announce()
    task = asyncio.create_task(s.ask())
    await asyncio.sleep(0)
    assert s.calls.in_flight == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    s.check_settled("cancelled")


async def test_the_calls_of_a_replica_that_is_gone_go_to_another(scene: Make) -> None:
    s = scene()
    hanging = Hanging()
    await s.serve("a", hanging)
    task = asyncio.create_task(s.ask())
    await hanging.entered.wait()
    await s.serve("b", plain)
    s.change("a", "gone")
    assert await task == ANSWER
    await asyncio.wait_for(hanging.left.wait(), 60.0)
    assert s.check_settled("finished").replica_id == "b"


async def test_an_attempt_that_is_cancelled_before_it_began_is_not_begun(scene: Make) -> None:
    s = scene()
    hanging = Hanging()
    await s.serve("a", hanging)
    await s.serve("b", plain)
    s.change("a", "cordoned")
    s.change("b", "cordoned")
    task = asyncio.create_task(s.ask())
    await asyncio.sleep(0)
    s.change("a", "ready")
    s.run_out_of_patience()
    s.change("b", "ready")
    s.run_out_of_patience()
    assert await task == ANSWER
    assert not hanging.entered.is_set()
    s.check_settled("finished")


async def test_an_answer_that_comes_as_its_attempt_is_given_up_leaves_nothing_behind(scene: Make) -> None:
    s = scene()
    await s.serve("a", plain)
    await s.serve("b", plain)
    s.upstream.then = lambda: s.change("a", "gone")  # nothing is awaited any more that this could interrupt
    assert await s.ask() == ANSWER
    s.check_settled("finished")


async def test_many_calls_over_good_and_bad_replicas_are_all_recorded_once(scene: Make) -> None:
    s = scene(max_attempts=5, breaker_open_s=0.05)
    await s.serve("a", plain)
    await s.serve("b", with_status(500), plain, closing, saying(b"?"), plain)
    await s.serve("c", streaming(*STREAM), plain)
    outcomes = await asyncio.gather(
        *(s.calls.answer(a_call(f"c{i}"), PROMPT, b"{}") for i in range(60)), return_exceptions=True
    )
    assert [outcome for outcome in outcomes if isinstance(outcome, BaseException)] == []
    assert sorted(record.call_id for record in s.records) == sorted(f"c{i}" for i in range(60))
    assert s.attempts_in_flight() == s.calls.in_flight == 0


@pytest.mark.parametrize("usage", [b'{"completion_tokens":-5}', b'{"completion_tokens":true}', b"[1]", b'"lots"'])
async def test_a_usage_that_is_nonsense_says_nothing(scene: Make, usage: bytes) -> None:
    s = scene()
    await s.serve("a", saying(b'{"choices":[],"usage":%s}' % usage))
    await s.ask()
    assert s.check_settled("finished").work_done == 0.0
    assert s.forecaster.forecast(a_call("c"), UNREAD).source == "prior"


async def test_what_calls_come_to_is_learned(scene: Make) -> None:
    s = scene()
    await s.serve("a", plain)
    for number in range(8):
        await s.calls.answer(a_call(f"c{number}"), PROMPT, b"{}")
    assert s.forecaster.forecast(a_call("c"), UNREAD).mean == pytest.approx(5.0)


async def test_connections_are_kept_after_answers_and_after_streams(
    scene: Make, caplog: pytest.LogCaptureFixture
) -> None:
    ports = set()

    async def noting(request: web.Request) -> web.StreamResponse:
        ports.add(_transport(request).get_extra_info("peername"))
        return await (streaming(*STREAM) if len(s.records) % 2 else plain)(request)

    s = scene()
    await s.serve("a", noting)
    with caplog.at_level(logging.ERROR):
        for number in range(6):
            if number % 2:
                assert [c async for c in s.calls.stream(a_call(f"c{number}", stream=True), PROMPT, b"{}")]
            else:
                await s.calls.answer(a_call(f"c{number}"), PROMPT, b"{}")
    assert len(ports) == 1
    assert caplog.records == []


async def test_a_record_tells_what_was_known_where_the_call_was_sent(scene: Make) -> None:
    s = scene(policy="least_work")
    await s.serve("a", Hanging(), plain)
    async with AsyncExitStack() as stack:
        await s.occupy("a", stack)
        s.shell.post(SignalReported(replica_id="a", running=1, waiting=0, kv_usage=0.25, measured_at_s=1e12))
        await s.ask()
    (decision,) = s.decisions()
    assert decision.candidates.cost_s is not None
    record = next(record for record in s.records if record.call_id == "c")
    assert (record.policy, record.ahead, record.kv_usage) == ("least_work", 1, 0.25)
    assert record.expected_s == decision.candidates.cost_s[0]
    assert isinstance(record.expected_s, float)


async def test_a_policy_that_weighs_no_costs_expects_nothing(scene: Make) -> None:
    s = scene()
    await s.serve("a", plain)
    await s.ask()
    record = s.check_settled("finished")
    assert (record.policy, record.ahead, record.expected_s, record.kv_usage) == ("round_robin", 0, None, None)


async def test_a_record_tells_of_the_decision_for_its_last_attempt(scene: Make) -> None:
    s = scene()
    await s.serve("a", with_status(503))
    await s.serve("b", Hanging(), plain)
    async with AsyncExitStack() as stack:
        await s.occupy("b", stack)
        await s.ask()
    assert [decision.replica_id for decision in s.decisions()] == ["a", "b"]
    record = next(record for record in s.records if record.call_id == "c")
    assert (record.replica_id, record.ahead) == ("b", 1)


async def test_a_decision_that_came_too_late_for_its_call_is_not_in_the_record(scene: Make) -> None:
    s = scene()
    await s.serve("a", plain)
    await s.serve("b", Hanging(), plain)
    async with AsyncExitStack() as stack:
        await s.occupy("b", stack)
        s.upstream.then = lambda: s.change("a", "gone")
        await s.ask()
    assert [decision.replica_id for decision in s.decisions()] == ["a", "b"]
    record = next(record for record in s.records if record.call_id == "c")
    assert (record.replica_id, record.ahead) == ("a", 0)


async def test_a_call_that_was_never_sent_has_no_decision_in_its_record(scene: Make) -> None:
    s = scene()
    with pytest.raises(CallRefused):
        await s.ask()
    record = s.check_settled("refused")
    assert (record.policy, record.ahead, record.expected_s, record.kv_usage) == ("", None, None, None)


async def test_a_replica_that_comes_back_has_yet_to_say_how_full_it_is(scene: Make) -> None:
    s = scene()
    await s.serve("a", plain)
    for state in ("gone", "ready"):
        s.shell.post(SignalReported(replica_id="a", running=0, waiting=0, kv_usage=0.5, measured_at_s=1e12))
        s.change("a", state)
    await s.ask()
    assert s.check_settled("finished").kv_usage is None


async def test_the_calls_of_a_workflow_are_numbered_until_it_ends(scene: Make) -> None:
    s = scene()
    await s.serve("a", plain)

    async def ask(workflow_id: str) -> int:
        call = msgspec.structs.replace(a_call(f"c{len(s.records)}"), workflow_id=workflow_id)
        await s.calls.answer(call, PROMPT, b"{}")
        return s.records[-1].position

    assert [await ask(workflow_id) for workflow_id in ("w", "v", "w", "", "w", "")] == [1, 1, 2, 0, 3, 0]
    s.shell.post(WorkflowEnded(workflow_id="w", state="finished"))
    assert [await ask(workflow_id) for workflow_id in ("w", "v")] == [1, 2]


class Reading:
    """A forecaster that reads: the vector is the size of the prompt, the forecast is the vector."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.read: list[bytes] = []
        self.learned: list[tuple[str, float]] = []

    def encode(self, call: Call, prompt: PromptText) -> Encoding:
        self.read.append(prompt.text)
        return Encoding(encoder=f"encoder-{self.version}", vector=np.array([len(prompt.text), 1e9], dtype=np.float32))

    def forecast(self, call: Call, encoding: Encoding) -> Forecast:
        known = point(float(encoding.vector[0]), unit="tokens", source="neural")
        return msgspec.structs.replace(known, version=self.version)

    def observe(self, call: Call, encoding: Encoding, work_done: float) -> None:
        self.learned.append((encoding.encoder, work_done))


class AtOnce(Reading):
    """A refiner that answers when the test says so."""

    def __init__(self) -> None:
        super().__init__("slow")
        self.asked: dict[str, PromptText] = {}

    def ask(self, call: Call, prompt: PromptText) -> None:
        self.asked[call.call_id] = prompt

    def forget(self, call_id: str) -> None:
        self.asked.pop(call_id)

    def answer(self, s: Scene, call_id: str = "c") -> None:
        call = a_call(call_id)
        encoding = self.encode(call, cut(b"x" * 77))
        s.calls.refined(call_id, encoding, self.forecast(call, encoding))


def scores(s: Scene) -> list[ForecastScored]:
    return [message for message in s.heard if isinstance(message, ForecastScored)]


async def test_a_prompt_is_read_once_even_when_its_call_is_retried(scene: Make) -> None:
    forecaster = Reading("fast")
    s = scene(forecaster=forecaster)
    await s.serve("a", with_status(503))
    await s.serve("b", plain)
    await s.ask(cut(b"Why?"))
    assert [decision.forecast.mean for decision in s.decisions()] == [4.0, 4.0]
    assert forecaster.read == [b"Why?"]
    assert forecaster.learned == [("encoder-fast", 5.0)]


async def test_a_record_keeps_the_encoding_and_never_the_prompt(scene: Make) -> None:
    s = scene(forecaster=Reading("fast"))
    await s.serve("a", plain)
    await s.ask(cut(b"the secret"))
    record = s.check_settled("finished")
    assert (record.encoder, record.forecast_version, record.forecast_source) == ("encoder-fast", "fast", "neural")
    assert np.frombuffer(record.encoding, dtype="<f2").tolist() == [10.0, 65504.0]
    assert b"secret" not in msgspec.json.encode(record)


async def test_a_forecast_is_scored_when_the_outcome_is_known(scene: Make) -> None:
    s = scene(forecaster=Reading("fast"))
    await s.serve("a", plain)
    await s.ask(cut(b"Why?"))
    (score,) = scores(s)
    assert (score.head, score.version, score.prompt_class, score.covered) == ("length", "fast", "report/writer", False)


async def test_a_forecast_by_plain_statistics_has_no_weights_that_could_be_scored(scene: Make) -> None:
    s = scene()
    await s.serve("a", plain)
    await s.ask()
    assert scores(s) == []


async def test_a_forecast_of_a_call_without_an_outcome_is_not_scored(scene: Make) -> None:
    s = scene(forecaster=Reading("fast"))
    await s.serve("a", with_status(400))
    with pytest.raises(CallRefused):
        await s.ask()
    assert scores(s) == []


async def test_a_refined_forecast_is_in_force_and_the_first_is_scored_and_trained_on(scene: Make) -> None:
    forecaster, refiner = Reading("fast"), AtOnce()
    s = scene(forecaster=forecaster, refiner=refiner)
    s.upstream.then = lambda: refiner.answer(s)
    await s.serve("a", plain)
    await s.ask(cut(b"Why?"))
    (refined,) = [message for message in s.heard if isinstance(message, ForecastRefined)]
    assert (refined.call_id, refined.forecast.mean) == ("c", 77.0)
    record = s.check_settled("finished")
    assert (record.forecast_p50, record.forecast_version, record.encoder) == (77.0, "slow", "encoder-fast")
    assert [score.version for score in scores(s)] == ["fast"]
    assert forecaster.learned == [("encoder-fast", 5.0)]
    assert refiner.learned == [("encoder-slow", 5.0)]


async def test_the_prompt_of_a_workflows_call_is_shown_once_and_after_the_router_had_it(scene: Make) -> None:
    shown: list[tuple[str, bytes, bool]] = []

    def show(call: Call, prompt: PromptText) -> None:
        shown.append((call.call_id, prompt.text, bool(s.decisions(call.call_id))))

    s = scene(on_prompt=show)
    await s.serve("a", plain)
    await s.ask(cut(b"Why?"))
    await s.calls.answer(msgspec.structs.replace(a_call("alone"), workflow_id=""), PROMPT, b"{}")
    assert shown == [("c", b"Why?", True)]


async def test_the_tools_that_a_workflow_s_answer_asks_for_are_told_once_it_is_whole(scene: Make) -> None:
    told: list[tuple[str, tuple[str, ...]]] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        if not (await request.json()).get("stream"):
            return web.json_response({"choices": [{"message": {"tool_calls": [{"function": {"name": "grep"}}]}}]})
        asked = b'data: {"choices":[{"delta":{"tool_calls":[{"function":{"name":"read"}}]}}]}\n\n'
        return web.Response(body=asked + b"data: [DONE]\n\n", content_type="text/event-stream")

    s = scene(on_answer=lambda call, tools: told.append((call.call_id, tools)))
    await s.serve("a", answer)
    await s.ask()
    async for _ in s.calls.stream(a_call("streamed"), PROMPT, b'{"stream":true}'):
        assert len(told) == 2
    await s.calls.answer(msgspec.structs.replace(a_call("alone"), workflow_id=""), PROMPT, b"{}")
    assert told == [("c", ("grep",)), ("streamed", ("read",))]


async def test_the_router_hears_how_long_the_workflow_of_a_call_still_takes(scene: Make) -> None:
    known = {"w": point(12.5, unit="s")}
    s = scene(path_of=lambda call: known.get(call.workflow_id))
    await s.serve("a", plain)
    await s.ask()
    await s.calls.answer(msgspec.structs.replace(a_call("alone"), workflow_id=""), PROMPT, b"{}")
    assert [message.path for message in s.heard if isinstance(message, CallReady)] == [known["w"], None]
    (decision,) = s.decisions("c")
    assert decision.workflow is not None
    assert decision.workflow.remaining_s == 12.5


async def test_a_call_that_has_ended_is_neither_refined_nor_waited_for(scene: Make) -> None:
    refiner = AtOnce()
    s = scene(refiner=refiner)
    await s.serve("a", plain)
    await s.ask()
    assert refiner.asked == {}
    refiner.answer(s)
    assert not any(isinstance(message, ForecastRefined) for message in s.heard)


def test_a_record_that_an_older_version_stored_can_be_read() -> None:
    record = msgspec.json.decode(OLD_RECORD, type=CallRecord)
    assert (record.policy, record.ahead, record.expected_s, record.kv_usage, record.position) == (
        "",
        None,
        None,
        None,
        0,
    )
    assert (record.encoder, record.encoding, record.cached_tokens, record.forecast_version) == ("", b"", 0, "")
