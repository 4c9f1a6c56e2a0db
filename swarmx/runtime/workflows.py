"""Declared workflows: submits, cancels, kills, forks and describes them, and picks them up again after a crash."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar
from uuid import uuid4

import msgspec

from swarmx.core import failpoints
from swarmx.core.errors import NotFound, StoreError, Unavailable, WorkflowError
from swarmx.core.messages import Message
from swarmx.core.ports import Caller, WorkflowStore
from swarmx.core.records import TERMINAL, Accepted, CallRecord, Commit, Idempotency, WorkflowRecord
from swarmx.runtime.announcer import Announcer
from swarmx.runtime.clock import Clock
from swarmx.runtime.ownership import Owner
from swarmx.runtime.tool_catalogue import ToolCatalogue
from swarmx.runtime.workflow_inputs import CANCEL, check_signal_for, encode_signal
from swarmx.runtime.workflow_run import Surroundings, WorkflowRun, give_up
from swarmx.runtime.workflow_view import describe_run
from swarmx.workflows.events import Cancelled, Event, NewerEvent, Submitted, decode_event, encode_event
from swarmx.workflows.forks import fork
from swarmx.workflows.spec import WorkflowSpec
from swarmx.workflows.spending import NO_PRICES, Prices
from swarmx.workflows.state import Run
from swarmx.workflows.tool_names import check_tools
from swarmx.workflows.values import Json

log = logging.getLogger(__name__)

LEASE_S = 10.0
_CLAIMED_AT_ONCE = 256

T = TypeVar("T")


class WorkflowRunner:
    """Runs declared workflows.

    Whatever it acknowledged is in the store first. A call that was out when the process died is made again (at least
    once); its node still finishes once. `on_change` hears the id of a workflow after each stored change, `post` that it
    begins and, exactly once, that its end is stored; `on_latency` then hears its seconds.

    A runner that is `exclusive` is the only one that uses the store, as a lock on its folder has to assure. Others
    share the workflows of one store: each keeps its own for `lease_s` at a time, and takes over those of one that died.
    """

    def __init__(
        self,
        store: WorkflowStore,
        caller: Caller,
        clock: Clock,
        on_change: Callable[[str], None] | None = None,
        *,
        post: Callable[[Message], None] | None = None,
        on_latency: Callable[[float], None] | None = None,
        new_id: Callable[[], str] = lambda: f"wf-{uuid4().hex}",
        exclusive: bool = True,
        lease_s: float = LEASE_S,
        tools: ToolCatalogue | None = None,
        prices: Prices = NO_PRICES,
    ) -> None:
        self._store = store
        self._clock = clock
        self._on_change = on_change
        self._announcer = Announcer(post, on_latency)
        self._tools = ToolCatalogue() if tools is None else tools
        self._new_id = new_id
        self._exclusive = exclusive
        self._live: dict[str, WorkflowRun] = {}
        self._driving: dict[str, asyncio.Task[None]] = {}
        self._accepting: set[str] = set()
        self._left_alone: set[str] = set()
        self._records: list[CallRecord] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False
        self._owner = Owner(
            store,
            name=f"{socket.gethostname()}:{os.getpid()}",
            ttl_s=lease_s,
            exclusive=exclusive,
            on_lost=self._let_go,
            on_beat=self._look_around,
        )
        self._around = Surroundings(
            store=store,
            caller=caller,
            clock=clock,
            announcer=self._announcer,
            notify=self._notify,
            spawn=self._spawn,
            keep=self._keep,
            tools=self._tools,
            prices=prices,
        )

    async def submit(
        self, spec: WorkflowSpec, inputs: dict[str, Any], tenant: str, *, deadline_at_s: float | None = None
    ) -> str:
        """Accept a workflow and begin it; returns its id once it is durable. Raises what `accept` raises."""
        return (await self.accept(spec, inputs, tenant, deadline_at_s=deadline_at_s)).workflow_id

    async def accept(
        self,
        spec: WorkflowSpec,
        inputs: dict[str, Any],
        tenant: str,
        *,
        deadline_at_s: float | None = None,
        idempotency: Idempotency | None = None,
    ) -> Accepted:
        """Accept a workflow and begin it, or find the one that came with the same key before.

        The deadline is absolute, Unix seconds; without one the definition's relative `deadline_s` counts from now.
        Raises WorkflowError when the inputs do not fit or a tool is not there, KeyReused when the key came with
        something else, StoreError when it cannot be stored, Unavailable while the server stops.
        """
        self._check_open()
        if self._tools.is_settled:
            check_tools(spec, self._tools.of(tenant))
        now_s = self._clock.now_s()
        if deadline_at_s is None and spec.deadline_s is not None:
            deadline_at_s = now_s + spec.deadline_s
        run, submitted = Run.start(spec, inputs, workflow_id=self._new_id(), deadline_at_s=deadline_at_s)
        record = self._new(run, submitted, tenant, now_s)
        return await self._accept(record, run, [submitted], idempotency)

    async def fork(
        self,
        workflow_id: str,
        path: str,
        tenant: str | None,
        *,
        inputs: dict[str, Any] | None = None,
        idempotency: Idempotency | None = None,
    ) -> Accepted:
        """Begin a new workflow that shares the beginning of another up to one of its nodes.

        The node, and whatever depends on it, is done anew; the definition stays the one that the old workflow was
        submitted with, its relative deadline counts from now, and `inputs` replace some of the old ones. Raises
        NotFound; WorkflowError when the workflow has no such node or input or its events cannot be read; and what
        `accept` raises.
        """
        self._check_open()
        old = await self._record(workflow_id, tenant)
        _check_declared(old)
        now_s = self._clock.now_s()
        events = [decode_event(event.body) for event in await self._store.events(workflow_id)]
        deadline_s = Run.rebuild(events[:1]).graph.spec.deadline_s
        begun = fork(
            events,
            path,
            forked_from=workflow_id,
            workflow_id=self._new_id(),
            deadline_at_s=None if deadline_s is None else now_s + deadline_s,
            inputs=inputs,
        )
        run, submitted = Run.rebuild(begun), begun[0]
        assert isinstance(submitted, Submitted)  # noqa: S101  # a fork begins with it
        record = self._new(run, submitted, old.tenant, now_s)
        return await self._accept(record, run, begun, idempotency)

    async def recover(self) -> int:
        """Continue every unfinished workflow that no other process runs; returns how many.

        One that cannot be read is failed, but for one that a newer version wrote: that is left alone.
        """
        count = 0
        while claimed := await self._store.claim(await self._owner.epoch(), limit=_CLAIMED_AT_ONCE):
            failpoints.hit("runner.claimed")
            for record in claimed:
                count += await self._pick_up(record)
        return count

    async def cancel(self, workflow_id: str, tenant: str | None, *, wait: bool = True) -> WorkflowRecord:
        """Let a workflow's calls go and end it; returns its record once it has ended. Raises NotFound.

        The wish is durable first. Without `wait`, and where another process runs the workflow, the record may say
        that it still runs.
        """
        record = await self._record(workflow_id, tenant)
        if record.state in TERMINAL:
            return record
        _check_declared(record)
        await self._post(workflow_id, CANCEL, dedup="cancel", tenant=tenant)
        if wait and (live := self._live.get(workflow_id)) is not None:
            await live.ended.wait()
        return await self._record(workflow_id, tenant)

    async def signal(self, workflow_id: str, name: str, value: Json, *, dedup: str, tenant: str | None) -> bool:
        """Send a value that the workflow waits for, or will wait for; False: this one (by `dedup`) came before.

        It is durable before this returns. Raises NotFound; WorkflowError when the workflow has ended, declares no such
        signal, does not take the value, or has got this signal from somebody else.
        """
        record = await self._record(workflow_id, tenant)
        _check_declared(record)
        events = [decode_event(event.body) for event in await self._store.events(workflow_id)]
        if not check_signal_for(record, events, name, value, signal_id=dedup):
            return False
        body = encode_signal(name, value, signal_id=dedup)
        new = await self._post(workflow_id, body, dedup=f"signal:{dedup}", tenant=tenant)
        if not new and (await self._record(workflow_id, tenant)).state in TERMINAL:
            raise WorkflowError(f"the workflow {workflow_id} ended before the signal {name!r} came")
        return new

    async def kill(self, workflow_id: str, tenant: str | None) -> WorkflowRecord:
        """End a workflow at once, whoever runs it and whether or not that still answers; its calls are let go after.

        Works for workflows whose events cannot be read, too. Raises NotFound, StoreError.
        """
        _check_declared(await self._record(workflow_id, tenant))
        while (taken := await self._store.take(workflow_id, epoch := await self._owner.epoch())) is not None:
            failpoints.hit("runner.taken")
            now_s = self._clock.now_s()
            change = Commit(
                workflow_id=workflow_id,
                epoch=epoch,
                expected_seq=taken.seq,
                at_s=now_s,
                events=(encode_event(Cancelled(killed=True)),),
                state="cancelled",
            )
            if await self._store.commit(change) == "stored":  # else it took another step meanwhile
                if (driving := self._driving.get(workflow_id)) is not None:
                    driving.cancel()
                self._announcer.ended(taken, "cancelled", now_s)
                self._notify(workflow_id)
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

    def posted(self, workflow_id: str) -> None:
        """Another process may have posted something to the workflow, or taken it; who runs it looks."""
        if (live := self._live.get(workflow_id)) is not None:
            live.poke()

    def runs(self, workflow_id: str) -> bool:
        """Whether this process runs it: `on_change` hears of each of its changes."""
        return workflow_id in self._live

    @property
    def running(self) -> int:
        """How many workflows this process is running."""
        return len(self._live)

    async def close(self) -> None:
        """Stop all work. Unfinished workflows stay so: the next `recover` continues them."""
        self._closed = True
        await self._owner.stop()
        while self._tasks:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await self._write_records()
        await self._owner.retire()

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable("this server is stopping and accepts no workflows; submit again once it is back")

    def _new(self, run: Run, submitted: Submitted, tenant: str, now_s: float) -> WorkflowRecord:
        spec = run.graph.spec
        return WorkflowRecord(
            workflow_id=submitted.workflow_id,
            tenant=tenant,
            mode="declared",
            kind=spec.kind,
            name=spec.name,
            state="running",
            created_at_s=now_s,
            deadline_at_s=submitted.deadline_at_s,
            spec_sha256=submitted.spec_sha256,
            forked_from=submitted.forked_from,
        )

    async def _record(self, workflow_id: str, tenant: str | None) -> WorkflowRecord:
        record = await self._store.workflow(workflow_id, tenant=tenant)
        if record is None:
            raise NotFound(f"there is no workflow {workflow_id!r}; `swarmx workflows` lists those that there are")
        return record

    async def _accept(
        self, record: WorkflowRecord, run: Run, events: Sequence[Event], idempotency: Idempotency | None
    ) -> Accepted:
        """Store and begin, also if the client goes away meanwhile: what is stored must have somebody who runs it."""

        async def store_and_begin() -> Accepted:
            owned = msgspec.structs.replace(record, owner=await self._owner.epoch())
            bodies = [encode_event(event) for event in events]
            failpoints.hit("runner.accept")
            self._accepting.add(record.workflow_id)
            try:
                accepted = await self._store.accept(owned, bodies, idempotency=idempotency)
                failpoints.hit("runner.accepted")
                if not accepted.replayed:
                    self._begin(WorkflowRun(self._around, owned, run, seq=len(bodies)), again=False)
            finally:
                self._accepting.discard(record.workflow_id)
            return accepted

        return await asyncio.shield(self._spawn(store_and_begin()))

    async def _post(self, workflow_id: str, body: bytes, *, dedup: str, tenant: str | None) -> bool:
        """Leave something for a workflow and see that it is looked at; False: it came before, or too late."""
        new = await self._store.post(workflow_id, body, dedup=dedup, tenant=tenant)
        failpoints.hit("runner.posted")
        if workflow_id not in self._live and self._exclusive:
            await self._take_up(workflow_id)
        if (live := self._live.get(workflow_id)) is not None:
            live.poke()
        return new

    async def _take_up(self, workflow_id: str) -> None:
        """Run a workflow that this process should run and does not."""
        record = await self._store.take(workflow_id, await self._owner.epoch())
        if record is not None:
            await self._pick_up(record)

    async def _pick_up(self, record: WorkflowRecord) -> bool:
        stored = await self._store.events(record.workflow_id)
        if record.workflow_id in self._live:
            return False  # picked up meanwhile
        try:
            run = Run.rebuild(decode_event(event.body) for event in stored)
        except NewerEvent as error:
            if record.workflow_id not in self._left_alone:
                log.error("workflow %s is left alone: %s", record.workflow_id, error)
            self._left_alone.add(record.workflow_id)
            return False
        except WorkflowError as error:
            await give_up(self._around, record, len(stored), str(error))
            return False
        ahead_s = max(event.at_s for event in stored) - self._clock.now_s()
        if ahead_s > 0.0:  # the system clock was set back meanwhile: a rest must not last as long as that
            run.set_back(ahead_s)
        self._begin(WorkflowRun(self._around, record, run, seq=len(stored)), again=True)
        return True

    def _begin(self, live: WorkflowRun, *, again: bool) -> None:
        workflow_id = live.record.workflow_id

        def let_go(_: object) -> None:
            if self._live.get(workflow_id) is live:
                del self._live[workflow_id], self._driving[workflow_id]
            live.ended.set()

        self._live[workflow_id] = live
        self._announcer.submitted(live.record, again=again)
        self._driving[workflow_id] = self._spawn(live.drive(again=again))
        self._driving[workflow_id].add_done_callback(let_go)

    def _let_go(self) -> None:
        """Stop all work without writing: another process may have taken it over."""
        while self._driving:
            self._driving.popitem()[1].cancel()
        self._live.clear()  # its own successor here need not wait for that

    async def _look_around(self) -> None:
        """Among several processes: see what was posted to this one's workflows, and take over those of the dead.

        A kill by another leaves a workflow that is run and not owned; an accept that nobody heard of, the opposite.
        """
        if self._closed:
            return
        running, epoch = set(self._live), await self._owner.epoch()
        owned, waiting = set(await self._store.owned(epoch)), await self._store.waiting(epoch)
        for workflow_id in {*waiting, *(running - owned)}:
            self.posted(workflow_id)
        for workflow_id in owned - self._live.keys() - self._accepting - self._left_alone:
            record = await self._store.workflow(workflow_id, tenant=None)
            if record is not None and record.owner == epoch and record.state not in TERMINAL:  # still
                await self._pick_up(record)
        await self.recover()

    def _keep(self, records: Sequence[CallRecord]) -> None:
        if records:
            self._records.extend(records)
            if not self._closed:
                self._spawn(self._write_records())

    async def _write_records(self) -> None:
        while self._records:
            record = self._records[0]
            try:
                await self._store.record_call(record)
            except StoreError as error:
                log.error("the record of call %s was lost: %s", record.call_id, error)
            if self._records and self._records[0] is record:
                self._records.pop(0)

    def _notify(self, workflow_id: str) -> None:
        if self._on_change is None:
            return
        try:
            self._on_change(workflow_id)
        except Exception:
            log.exception("whoever listens to changes of workflow %s raised", workflow_id)

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _check_declared(record: WorkflowRecord) -> None:
    if record.mode != "declared":
        raise WorkflowError(
            f"the workflow {record.workflow_id} is its client's own: it is cancelled at the server that its client "
            "talks to, and never killed or forked"
        )
