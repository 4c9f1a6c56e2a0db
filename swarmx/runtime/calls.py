"""The data plane: asks the router where each call goes, carries it there, relays the answer, reports what happened."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import TypeVar

import aiohttp
import msgspec

from swarmx.core.actions import Cancel, Dispatch, Refuse
from swarmx.core.forecast import Forecast
from swarmx.core.messages import (
    CallCancelled,
    CallFailed,
    CallFinished,
    CallReady,
    DecisionMade,
    FirstToken,
    ForecastRefined,
    Message,
    ReplicaChanged,
    SignalReported,
    TokensProgressed,
    WorkflowEnded,
)
from swarmx.core.nouns import Call, Replica
from swarmx.core.ports import Forecaster
from swarmx.core.prompts import Encoding, PromptText
from swarmx.core.records import CallRecord, CallState, ModelRequest, ModelResult
from swarmx.runtime.call_ends import Answer, CallRefused
from swarmx.runtime.clock import Clock
from swarmx.runtime.event_stream import ToolsAsked, begins_events, error_event, rest_of, tools_of, usage_in
from swarmx.runtime.experience import Positions
from swarmx.runtime.fleet_book import FleetBook
from swarmx.runtime.pending import PendingCall, names_of
from swarmx.runtime.priorities import prioritised
from swarmx.runtime.refining import Refiner
from swarmx.runtime.requests import ENDPOINTS, call_of
from swarmx.runtime.scoring import LENGTH_HEAD, PromptClasses, scored
from swarmx.runtime.tool_calls import tool_call_of
from swarmx.runtime.upstream import AttemptFailed, Upstream, Usage, hang_up

log = logging.getLogger(__name__)

_PROGRESS_EVERY_S = 0.25

_T = TypeVar("_T")


class CallService:
    """Implements `core.ports.Caller`; also answers the OpenAI front, streamed or not.

    `post` hands messages to the shell; the shell calls `perform_dispatch`, `perform_cancel` and `perform_refuse`.
    `on_record` is given the record of every call, exactly once, when it has ended; `keep` those that nobody else puts
    into the store: that of a workflow's call travels with its answer into the workflow's own commit. `refiner` is asked
    for a second forecast of every call, and answers to `refined`. `path_of` says how long the workflow of a call still
    takes, where it can. `on_prompt` is shown the prompt of a call of a workflow, after the call was handed to the
    router; `on_answer` is told which tools the whole answer asks for. `token_of` says what a replica wants to be shown.
    """

    def __init__(
        self,
        *,
        post: Callable[[Message], None],
        clock: Clock,
        forecaster: Forecaster,
        upstream: Upstream,
        book: FleetBook,
        on_record: Callable[[CallRecord], None],
        keep: Callable[[CallRecord], None] | None = None,
        refiner: Refiner | None = None,
        path_of: Callable[[Call], Forecast | None] | None = None,
        on_prompt: Callable[[Call, PromptText], None] | None = None,
        on_answer: Callable[[Call, tuple[str, ...]], None] | None = None,
        token_of: Callable[[str], str | None] = lambda replica_id: None,
    ) -> None:
        self._post = post
        self._clock = clock
        self._forecaster = forecaster
        self._upstream = upstream
        self._book = book
        self._on_record = on_record
        self._keep = keep
        self._refiner = refiner
        self._path_of = path_of
        self._on_prompt, self._on_answer = on_prompt, on_answer
        self._token_of = token_of
        self._pending: dict[str, PendingCall] = {}
        self._replicas: dict[str, Replica] = {}
        self._kv_usage: dict[str, float] = {}
        self._positions = Positions()
        self._classes = PromptClasses()

    @property
    def in_flight(self) -> int:
        """Calls accepted and not yet ended."""
        return len(self._pending)

    def observe(self, message: Message, now_s: float) -> None:
        """Keep where the replicas are, and what the records will tell; register as an observer of the switchboard."""
        if isinstance(message, DecisionMade):
            pending = self._pending.get(message.decision.call.call_id)
            if pending is not None:
                pending.decisions[message.decision.attempt] = message.decision
        elif isinstance(message, SignalReported):
            if message.replica_id in self._replicas:
                self._kv_usage[message.replica_id] = message.kv_usage
        elif isinstance(message, WorkflowEnded):
            self._positions.forget(message.workflow_id)
        elif isinstance(message, ReplicaChanged):
            replica_id = message.replica.replica_id
            if message.state == "gone":
                self._replicas.pop(replica_id, None)
                self._kv_usage.pop(replica_id, None)
            else:
                self._replicas[replica_id] = message.replica

    def perform_dispatch(self, action: Dispatch) -> None:
        self._verdict(action)

    def perform_refuse(self, action: Refuse) -> None:
        self._verdict(action)

    def perform_cancel(self, action: Cancel) -> None:
        pending = self._pending.get(action.call_id)
        if pending is None:
            return
        for verdict in pending.verdicts:
            if isinstance(verdict, Dispatch) and verdict.attempt == action.attempt:
                pending.verdicts.remove(verdict)  # it was not even begun
                return
        if pending.attempt == action.attempt != pending.aborted:
            pending.aborted = action.attempt
            if pending.scope is not None:
                pending.scope.reschedule(asyncio.get_running_loop().time())

    def refined(self, call_id: str, encoding: Encoding, forecast: Forecast) -> None:
        """A slower predictor's word; of a call that has ended, nobody needs it."""
        pending = self._pending.get(call_id)
        if pending is not None and not pending.done:
            pending.refine(encoding, forecast)
            self._post(ForecastRefined(call_id=call_id, forecast=forecast))

    async def complete(self, request: ModelRequest) -> ModelResult:
        """Have a workflow's call answered; cancelling the awaiting task cancels the call down to the engine.

        A call that is over its tenant's budget, or too many, is offered again when it was told to come back.
        """
        call, prompt = tool_call_of(request) if request.kind == "tool" else call_of(request)
        try:
            return (await self._answer(call, prompt, msgspec.json.encode(request.body), request=request)).result
        except CallRefused as refused:
            return refused.result

    async def answer(self, call: Call, prompt: PromptText, body: bytes) -> Answer:
        """The whole answer to a call. Raises CallRefused."""
        return await self._answer(call, prompt, body)

    async def _answer(
        self, call: Call, prompt: PromptText, body: bytes, *, request: ModelRequest | None = None
    ) -> Answer:
        pending = self._accept(call, prompt, body, request=request)
        try:
            while True:
                replica = await self._assignment(pending)
                self._book.attempt_started(replica.replica_id)
                try:
                    response = await self._open(pending, replica)
                    read = self._upstream.read_result if call.kind == "tool" else self._upstream.read
                    raw, decoded, usage = await self._guard(pending, read(response))
                except AttemptFailed as failure:
                    self._attempt_failed(pending, failure)
                    continue
                finally:
                    self._book.attempt_ended(replica.replica_id)
                self._finish(pending, usage, work_done=usage.work_done, tools=tools_of(decoded))
                return Answer(
                    body=raw,
                    decoded=decoded,
                    call_id=call.call_id,
                    replica_id=replica.replica_id,
                    attempts=pending.attempt,
                    record=pending.kept,
                )
        finally:
            self._leave(pending)

    async def stream(self, call: Call, prompt: PromptText, body: bytes) -> AsyncGenerator[bytes, None]:
        """The answer as the replica's own server-sent events.

        Nothing is yielded before a replica began to answer, so CallRefused comes out of the first step or not at all
        for a failure that another replica could mend. A stream that breaks later ends with an error event.
        """
        pending = self._accept(call, prompt, body)
        try:
            while True:
                replica = await self._assignment(pending)
                self._book.attempt_started(replica.replica_id)
                try:
                    response = await self._open(pending, replica)
                    async with aclosing(self._relay(pending, response)) as chunks:
                        async for chunk in chunks:
                            yield chunk
                    return
                except AttemptFailed as failure:
                    started = pending.first_token_at_s is not None
                    self._attempt_failed(pending, failure)
                    if started:
                        yield error_event(failure)
                        return
                finally:
                    self._book.attempt_ended(replica.replica_id)
        finally:
            self._leave(pending)

    async def _relay(self, pending: PendingCall, response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
        """Pass the events on, count them, and close the books at [DONE]."""
        call_id, attempt = pending.call.call_id, pending.attempt
        events, reported_at_s, tail, asked = 0, 0.0, b"", ToolsAsked()
        try:
            async with aclosing(self._upstream.chunks(response)) as chunks:
                while chunk := await self._guard(pending, anext(chunks, b"")):
                    if pending.first_token_at_s is None:
                        self._begin_stream(pending, chunk)
                    events += chunk.count(b"data:")
                    asked.read(chunk)
                    tail = (tail + chunk)[-4096:]
                    now_s = self._clock.now_s()
                    if b"[DONE]" in tail:
                        usage = usage_in(tail)
                        work_done = usage.work_done if usage.work_done is not None else max(0.0, events - 2.0)
                        self._finish(pending, usage, work_done=work_done, tools=asked.names)
                        yield chunk
                        async for blank in rest_of(chunks):
                            yield blank
                        return
                    if now_s - reported_at_s >= _PROGRESS_EVERY_S:
                        reported_at_s = now_s
                        self._post(TokensProgressed(call_id=call_id, attempt=attempt, work_done=float(events)))
                    yield chunk
            raise AttemptFailed("connection_lost", "the stream ended without [DONE]", retryable=True)
        finally:
            hang_up(response)

    def _begin_stream(self, pending: PendingCall, head: bytes) -> None:
        """From the first bytes on the call is bound to this replica. Raises AttemptFailed while it is not."""
        if pending.aborted == pending.attempt:
            raise AttemptFailed("timeout", "the replica answered too late", retryable=True, status=504)
        if not begins_events(head):
            raise AttemptFailed("bad_answer", "the answer is not an event stream", retryable=True)
        pending.first_token_at_s = self._clock.now_s()
        self._post(FirstToken(call_id=pending.call.call_id, attempt=pending.attempt))

    def _accept(
        self, call: Call, prompt: PromptText, body: bytes, *, request: ModelRequest | None = None
    ) -> PendingCall:
        """The prompt is read once, here; only its encoding is kept. A workflow's `request` has time to wait."""
        encoding = self._forecaster.encode(call, prompt)
        forecast = self._forecaster.forecast(call, encoding)
        pending = PendingCall(
            call=call,
            first_encoding=encoding,
            first_forecast=forecast,
            encoding=encoding,
            forecast=forecast,
            body=body,
            ready_at_s=self._clock.now_s(),
            position=self._positions.next(call.workflow_id),
            patient=request is not None,
            owned=request is not None and request.owned,
            names=names_of(request) if request is not None else {},
        )
        self._pending[call.call_id] = pending
        self._offer(pending)
        if self._refiner is not None and call.kind == "llm":
            self._refiner.ask(call, prompt)
        if self._on_prompt is not None and call.workflow_id and call.kind != "tool":
            asyncio.get_running_loop().call_soon(self._on_prompt, call, prompt)
        return pending

    def _offer(self, pending: PendingCall) -> None:
        """Ask the router for a replica."""
        path = None if self._path_of is None else self._path_of(pending.call)
        self._post(CallReady(call=pending.call, forecast=pending.forecast, path=path))

    async def _assignment(self, pending: PendingCall) -> Replica:
        """Wait for the router's word. Raises CallRefused."""
        while True:
            while not pending.verdicts:
                pending.wake.clear()
                await pending.wake.wait()
            verdict = pending.verdicts.popleft()
            if isinstance(verdict, Refuse):
                if (wait_s := pending.comes_back_after_s(verdict, self._clock.now_s())) is not None:
                    await asyncio.sleep(wait_s)
                    self._offer(pending)
                    continue
                self._record(pending, "refused", error=f"{verdict.reason}: {verdict.detail}")
                raise CallRefused(verdict, pending.failure, pending.kept, begun=pending.begun)
            pending.attempt, pending.urgency = verdict.attempt, verdict.urgency
            pending.dispatched_at_s = self._clock.now_s()
            pending.kv_usage = self._kv_usage.get(verdict.replica_id)
            pending.replica = self._replicas.get(verdict.replica_id)
            if pending.replica is not None:
                return pending.replica
            gone = AttemptFailed("replica_gone", "the replica is gone", retryable=True, begun=False)
            self._attempt_failed(pending, gone)

    async def _open(self, pending: PendingCall, replica: Replica) -> aiohttp.ClientResponse:
        url = replica.url + ENDPOINTS[pending.call.kind]
        body = prioritised(pending.body, pending.urgency, replica.priorities)
        headers = pending.headers()
        if (token := self._token_of(replica.replica_id)) is not None:
            headers["authorization"] = f"Bearer {token}"
        return await self._guard(pending, self._upstream.open(url, body, headers))

    async def _guard(self, pending: PendingCall, step: Awaitable[_T]) -> _T:
        """Await one step of the attempt so that the router's Cancel can interrupt it."""
        try:
            async with asyncio.timeout(None) as scope:
                pending.scope = scope
                if pending.aborted == pending.attempt:
                    scope.reschedule(asyncio.get_running_loop().time())
                return await step
        except TimeoutError:
            raise AttemptFailed("timeout", "the replica took too long", retryable=True, status=504) from None
        finally:
            pending.scope = None

    def _attempt_failed(self, pending: PendingCall, failure: AttemptFailed) -> None:
        pending.failure, pending.begun = failure, pending.begun or failure.begun
        if pending.first_token_at_s is not None:
            self._record(pending, "failed", error=f"{failure.reason}: {failure.detail}")
        if pending.aborted == pending.attempt:
            return  # the router gave this attempt up itself
        self._post(
            CallFailed(
                call_id=pending.call.call_id,
                attempt=pending.attempt,
                reason=failure.reason,
                retryable=failure.retryable
                and pending.first_token_at_s is None
                and not (pending.begun and pending.call.once),
            )
        )

    def _finish(self, pending: PendingCall, usage: Usage, *, work_done: float | None, tools: tuple[str, ...]) -> None:
        call = pending.call
        if call.kind == "image":
            work_done = call.work_limit
        self._post(
            CallFinished(
                call_id=call.call_id,
                attempt=pending.attempt,
                prompt_tokens=usage.prompt_tokens,
                cached_tokens=usage.cached_tokens,
                work_done=work_done or 0.0,
            )
        )
        if self._on_answer is not None and call.workflow_id and call.kind == "llm":
            self._on_answer(call, tools)
        if work_done is not None:
            self._learn(pending, work_done)
        self._record(pending, "finished", usage=usage, work_done=work_done or 0.0)

    def _learn(self, pending: PendingCall, work_done: float) -> None:
        call = pending.call
        self._forecaster.observe(call, pending.first_encoding, work_done)
        if pending.refined and self._refiner is not None:
            self._refiner.observe(call, pending.encoding, work_done)
        # The first forecast also where a slower one replaced it: it is the head behind it that can be trained again.
        if pending.first_forecast.source == "neural" and call.kind == "llm":
            prompt_class = self._classes.of(call)
            self._post(scored(pending.first_forecast, work_done, head=LENGTH_HEAD, prompt_class=prompt_class))

    def _leave(self, pending: PendingCall) -> None:
        """The client's side is over; a call that has not ended by now was cancelled by it.

        So is what the router still wants of a call that a late answer ended, of an attempt that it had given up.
        """
        self._pending.pop(pending.call.call_id, None)
        overtaken = pending.attempt > 0 and pending.aborted == pending.attempt
        if not pending.done or overtaken:
            self._post(CallCancelled(call_id=pending.call.call_id))
            self._record(pending, "cancelled")

    def _record(
        self,
        pending: PendingCall,
        state: CallState,
        *,
        usage: Usage | None = None,
        work_done: float = 0.0,
        error: str | None = None,
    ) -> None:
        if pending.done:
            return
        pending.done = True
        if self._refiner is not None:
            self._refiner.forget(pending.call.call_id)
        ended_at_s = self._clock.now_s()
        record = pending.record(state, ended_at_s, usage=usage, work_done=work_done, error=error)
        self._on_record(record)
        if pending.owned and state != "cancelled":
            pending.kept = record
        elif self._keep is not None:
            self._keep(record)

    def _verdict(self, verdict: Dispatch | Refuse) -> None:
        pending = self._pending.get(verdict.call_id)
        if pending is not None:
            pending.verdicts.append(verdict)
            pending.wake.set()
