"""Runs declared workflows: makes their model calls, records what happens, and picks them up again after a crash."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, assert_never
from uuid import uuid4

import msgspec

from swarmx.core.errors import NotFound, StoreError, SwarmXError, Unavailable, WorkflowError
from swarmx.core.messages import Message
from swarmx.core.ports import Caller, Store
from swarmx.core.records import TERMINAL, ModelRequest, WorkflowRecord, WorkflowState
from swarmx.runtime.announcer import Announcer
from swarmx.runtime.clock import Clock
from swarmx.runtime.workflow_view import describe_run
from swarmx.workflows.answers import Unusable
from swarmx.workflows.events import (
    Cancelled,
    CancelRequested,
    Event,
    Failed,
    Finished,
    NodeFailed,
    NodeFinished,
    decode_event,
    encode_event,
)
from swarmx.workflows.plan import StartModelCall, advance, calls_in_flight, read_answer
from swarmx.workflows.spec import WorkflowSpec
from swarmx.workflows.state import Run

log = logging.getLogger(__name__)

DEADLINE = "deadline"
_RELEASE_S = 5.0  # how long a cancelled call may take to let go before its workflow ends without it
_DEADLINE_CHECK_S = 3600.0
_MAX_ERROR_CHARS = 2000
_RETRY_S = (0.1, 0.5, 2.0, 5.0)  # between attempts to store; the last one repeats


@dataclass(slots=True, kw_only=True)
class _Live:
    """A workflow that this process is running. `inbox` brings what happened to it; only its own task changes `run`."""

    record: WorkflowRecord
    run: Run
    seq: int
    inbox: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    calls: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    timer: asyncio.TimerHandle | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class _LostPlace(Exception):  # control flow within this module, not an error
    """Another writer owns the workflow, or it has ended: this process lets it go."""


class WorkflowRunner:
    """Submits, runs, cancels and describes declared workflows.

    Whatever it acknowledged is in the store first. A call that was out when the process died is made again (at least
    once); its node still finishes once. `on_change` hears the id of a workflow after each stored change, `post` that it
    begins and, exactly once, that its end is stored; `on_latency` then hears its seconds.
    """

    def __init__(
        self,
        store: Store,
        caller: Caller,
        clock: Clock,
        on_change: Callable[[str], None] | None = None,
        *,
        post: Callable[[Message], None] | None = None,
        on_latency: Callable[[float], None] | None = None,
        new_id: Callable[[], str] = lambda: f"wf-{uuid4().hex}",
    ) -> None:
        self._store = store
        self._caller = caller
        self._clock = clock
        self._on_change = on_change
        self._announcer = Announcer(post, on_latency)
        self._new_id = new_id
        self._live: dict[str, _Live] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    async def submit(
        self, spec: WorkflowSpec, inputs: dict[str, Any], tenant: str, *, deadline_at_s: float | None = None
    ) -> str:
        """Accept a workflow and begin it; returns its id once it is durable.

        The deadline is absolute, Unix seconds; without one the definition's relative `deadline_s` counts from now.
        Raises WorkflowError when the inputs do not fit, StoreError when it cannot be stored, Unavailable while the
        server stops.
        """
        if self._closed:
            raise Unavailable("this server is stopping and accepts no workflows; submit again once it is back")
        now_s = self._clock.now_s()
        if deadline_at_s is None and spec.deadline_s is not None:
            deadline_at_s = now_s + spec.deadline_s
        run, submitted = Run.start(spec, inputs)
        record = WorkflowRecord(
            workflow_id=self._new_id(),
            tenant=tenant,
            mode="declared",
            kind=spec.kind,
            name=spec.name,
            state="running",
            created_at_s=now_s,
            deadline_at_s=deadline_at_s,
        )
        live = _Live(record=record, run=run, seq=1)
        # A client that goes away while this is being stored must not leave a workflow that nobody runs.
        await asyncio.shield(self._spawn(self._accept(live, submitted)))
        return record.workflow_id

    async def recover(self) -> int:
        """Continue every unfinished workflow of the store; returns how many. One that cannot be read is failed."""
        count = 0
        for record in await self._store.unfinished():
            if record.mode == "declared" and record.workflow_id not in self._live:
                count += await self._pick_up(record)
        return count

    async def cancel(self, workflow_id: str, tenant: str | None) -> WorkflowRecord:
        """Let a workflow's calls go and end it; returns its record once it has ended. Raises NotFound."""
        record = await self._record(workflow_id, tenant)
        if record.state in TERMINAL:
            return record
        if record.mode != "declared":
            raise WorkflowError(f"the workflow {workflow_id} is its client's own; only declared ones can be cancelled")
        if workflow_id not in self._live:
            record = await self._record(workflow_id, tenant)  # it may have ended while it was first read
            if record.state in TERMINAL:
                return record
            await self._pick_up(record)
        live = self._live.get(workflow_id)
        if live is not None:
            live.inbox.put_nowait(CancelRequested())
            await live.ended.wait()
        return await self._record(workflow_id, tenant)

    async def wait(self, workflow_id: str, tenant: str | None) -> WorkflowRecord:
        """The workflow's record once it has ended, or once this runner has let it go. Raises NotFound."""
        await self._record(workflow_id, tenant)  # is it there, and may the tenant see it
        live = self._live.get(workflow_id)
        if live is not None:
            await live.ended.wait()
        return await self._record(workflow_id, tenant)

    async def describe(self, workflow_id: str, tenant: str | None) -> dict[str, Any]:
        """A workflow with its nodes, their states and times, its outputs or its error. Raises NotFound."""
        record = await self._record(workflow_id, tenant)
        return describe_run(record, await self._store.events(workflow_id))

    @property
    def running(self) -> int:
        """How many workflows this process is running."""
        return len(self._live)

    async def close(self) -> None:
        """Stop all work. Unfinished workflows stay so: the next `recover` continues them."""
        self._closed = True
        while self._tasks:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _record(self, workflow_id: str, tenant: str | None) -> WorkflowRecord:
        record = await self._store.workflow(workflow_id, tenant=tenant)
        if record is None:
            raise NotFound(f"there is no workflow {workflow_id!r}; `swarmx workflows` lists those that there are")
        return record

    async def _accept(self, live: _Live, submitted: Event) -> None:
        await self._store.accept(live.record, [encode_event(submitted)])
        self._begin(live, [])

    async def _pick_up(self, record: WorkflowRecord) -> bool:
        stored = await self._store.events(record.workflow_id)
        if record.workflow_id in self._live:
            return False  # picked up meanwhile
        try:
            run = Run.rebuild(decode_event(event.body) for event in stored)
        except WorkflowError as error:
            await self._give_up(record, len(stored), str(error))
            return False
        self._begin(_Live(record=record, run=run, seq=len(stored)), calls_in_flight(run), again=True)
        return True

    def _begin(self, live: _Live, calls: list[StartModelCall], *, again: bool = False) -> None:
        self._live[live.record.workflow_id] = live
        self._announcer.submitted(live.record, again=again)
        self._spawn(self._drive(live, calls))

    async def _drive(self, live: _Live, calls: list[StartModelCall]) -> None:
        """A workflow's own task: take in what happened, record what follows, make the calls; until it ends."""
        workflow_id = live.record.workflow_id
        try:
            self._notify(workflow_id)
            self._watch_deadline(live)
            await self._turn(live, _drained(live.inbox))
            if not live.run.ended:
                self._make(live, calls)
            while not live.run.ended:
                await self._turn(live, [await live.inbox.get(), *_drained(live.inbox)])
        except _LostPlace:
            log.warning("workflow %s has ended elsewhere or is run by another process; let go", workflow_id)
        except Exception as error:
            log.exception("workflow %s ran into a defect", workflow_id)
            await self._give_up(live.record, live.seq, f"{type(error).__name__}: {error}")
        finally:
            if live.timer is not None:
                live.timer.cancel()
            for task in live.calls.values():
                task.cancel()
            self._live.pop(workflow_id, None)
            live.ended.set()

    async def _turn(self, live: _Live, happened: list[Event]) -> None:
        run = live.run
        recorded: list[Event] = []
        for event in happened:
            if isinstance(event, NodeFinished | NodeFailed):
                live.calls.pop(event.path, None)
            if not run.ended:
                run.apply(event)
                recorded.append(event)
        if run.stopping or run.ended:
            if run.cancelling and not run.ended:
                await self._append(live, recorded)
                recorded = []
            await _release(live)
        following, calls = advance(run)
        await self._append(live, recorded + following)
        self._make(live, calls)

    async def _append(self, live: _Live, events: list[Event]) -> None:
        """Store the events, trying again for as long as the store cannot. Raises _LostPlace."""
        if not events:
            return
        state, outcome = _ending(live.run)
        bodies = [encode_event(event) for event in events]
        workflow_id = live.record.workflow_id
        attempt = 0
        while True:
            try:
                won = await self._store.append(
                    workflow_id,
                    bodies,
                    expected_seq=live.seq,
                    at_s=self._clock.now_s(),
                    state=state,
                    outcome=outcome,
                )
                break
            except StoreError as error:
                log.warning("workflow %s waits for the store: %s", workflow_id, error)
                await asyncio.sleep(_RETRY_S[min(attempt, len(_RETRY_S) - 1)])
                attempt += 1
        if not won and attempt:  # a write that was reported as failed may have reached the disk
            record = await self._store.workflow(workflow_id, tenant=None)
            won = record is not None and record.seq == live.seq + len(bodies)
        if not won:
            raise _LostPlace
        live.seq += len(bodies)
        self._notify(workflow_id)
        if state is not None:
            self._announcer.ended(live.record, state, self._clock.now_s())

    def _make(self, live: _Live, calls: list[StartModelCall]) -> None:
        for call in calls:
            live.calls[call.path] = self._spawn(self._answer(live, call))

    async def _answer(self, live: _Live, call: StartModelCall) -> None:
        """Have one call answered and put what it means for its node into the inbox."""
        record = live.record
        request = ModelRequest(
            tenant=record.tenant,
            workflow_id=record.workflow_id,
            workflow_kind=record.kind,
            node=call.path,
            role=call.role,
            kind=call.kind,
            model=call.model,
            body=call.body,
            deadline_at_s=record.deadline_at_s,
            priority=live.run.graph.spec.priority,
        )
        call_id: str | None = None
        event: Event
        try:
            result = await self._caller.complete(request)
            call_id = result.call_id
            if result.answer is None:
                event = NodeFailed(path=call.path, error=_plain(result.error or "refused"), call_id=call_id)
            else:
                event = await self._read(live, call, result.answer, call_id)
        except SwarmXError as error:
            event = NodeFailed(path=call.path, error=_plain(str(error)), call_id=call_id)
        except Exception as error:
            log.exception("the call of %s in workflow %s ran into a defect", call.path, record.workflow_id)
            event = NodeFailed(path=call.path, error=_plain(f"{type(error).__name__}: {error}"), call_id=call_id)
        live.inbox.put_nowait(event)

    async def _read(self, live: _Live, call: StartModelCall, answer: dict[str, Any], call_id: str) -> Event:
        read = read_answer(live.run, call.path, answer)
        if isinstance(read, Unusable):
            return NodeFailed(path=call.path, error=_plain(read.error), call_id=call_id)
        for blob in read.blobs:
            await self._store.put_blob(live.record.tenant, blob.media_type, blob.data)
        return NodeFinished(path=call.path, output=read.output, call_id=call_id)

    def _watch_deadline(self, live: _Live) -> None:
        if live.record.deadline_at_s is None:
            return
        left_s = live.record.deadline_at_s - self._clock.now_s()
        if left_s <= 0.0:
            live.inbox.put_nowait(Failed(error=DEADLINE))
        else:
            loop = asyncio.get_running_loop()
            live.timer = loop.call_later(min(left_s, _DEADLINE_CHECK_S), self._watch_deadline, live)

    async def _give_up(self, record: WorkflowRecord, seq: int, why: str) -> None:
        """End a workflow that cannot be continued."""
        workflow_id = record.workflow_id
        log.error("workflow %s cannot be continued: %s", workflow_id, why)
        failed = Failed(error=_plain(f"the workflow cannot be continued: {why}"))
        try:
            ended = await self._store.append(
                workflow_id,
                [encode_event(failed)],
                expected_seq=seq,
                at_s=self._clock.now_s(),
                state="failed",
                outcome=_outcome(failed),
            )
        except SwarmXError:
            log.exception("workflow %s could not be ended either; the next start tries again", workflow_id)
        else:
            if ended:
                self._announcer.ended(record, "failed", self._clock.now_s())
        self._notify(workflow_id)

    def _notify(self, workflow_id: str) -> None:
        if self._on_change is None:
            return
        try:
            self._on_change(workflow_id)
        except Exception:
            log.exception("whoever listens to changes of workflow %s raised", workflow_id)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _release(live: _Live) -> None:
    """Cancel the calls that are still out and give them time to let go."""
    tasks = list(live.calls.values())
    live.calls.clear()
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=_RELEASE_S)


def _drained(inbox: asyncio.Queue[Event]) -> list[Event]:
    events: list[Event] = []
    while not inbox.empty():
        events.append(inbox.get_nowait())
    return events


def _ending(run: Run) -> tuple[WorkflowState | None, bytes | None]:
    """The state to store and, at the end, the outcome."""
    match run.end:
        case None:
            return ("cancelling" if run.cancelling else None), None
        case Finished():
            return "finished", _outcome(run.end)
        case Failed():
            return "failed", _outcome(run.end)
        case Cancelled():
            return "cancelled", None
        case _:
            assert_never(run.end)


def _outcome(end: Finished | Failed) -> bytes:
    """The outputs, or {"error", "node"}, as JSON."""
    if isinstance(end, Finished):
        return msgspec.json.encode(end.outputs)
    return msgspec.json.encode({"error": end.error, "node": end.path})


def _plain(text: str) -> str:
    """An error text that can be stored and shown: valid Unicode, of bounded length."""
    return text.encode("utf-8", "replace").decode()[:_MAX_ERROR_CHARS]
