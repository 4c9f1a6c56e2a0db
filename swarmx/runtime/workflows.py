"""Declared workflows: submits, cancels, kills, forks and describes them, and picks them up again after a crash."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, TypeVar
from uuid import uuid4

import msgspec

from swarmx.core import failpoints
from swarmx.core.errors import NotFound, StoreError, Unavailable, WorkflowError
from swarmx.core.messages import Message
from swarmx.core.ports import Caller, WorkflowStore
from swarmx.core.records import TERMINAL, Accepted, CallRecord, Idempotency, WorkflowRecord
from swarmx.runtime import beginnings
from swarmx.runtime.announcer import Announcer
from swarmx.runtime.beginnings import Beginning
from swarmx.runtime.call_records import CallRecords
from swarmx.runtime.clock import Clock
from swarmx.runtime.doubtful import once_readable
from swarmx.runtime.folding import folded
from swarmx.runtime.kills import Kills
from swarmx.runtime.ownership import Owner
from swarmx.runtime.tool_catalogue import ToolCatalogue
from swarmx.runtime.workflow_inputs import CANCEL, encode_signal, may_signal
from swarmx.runtime.workflow_run import Surroundings, WorkflowRun, give_up
from swarmx.runtime.workflow_view import describe_run
from swarmx.workflows.events import NewerEvent, decode_event, encode_event
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
    begins and, exactly once, that its end is stored or that it is left; `on_latency` hears the seconds to an end.

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
        self._records = CallRecords(store)
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
        self._kills = Kills(store, clock, epoch=self._owner.epoch, spawn=self._spawn, killed=self._killed)
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
        new = beginnings.submitted(
            spec,
            inputs,
            workflow_id=self._new_id(),
            tenant=tenant,
            now_s=self._clock.now_s(),
            deadline_at_s=deadline_at_s,
        )
        return await self._accept(new, idempotency)

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
        fold = partial(
            beginnings.forked, old, path=path, workflow_id=self._new_id(), now_s=self._clock.now_s(), inputs=inputs
        )
        new = await folded(await self._store.events(workflow_id), fold)
        return await self._accept(new, idempotency)

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
        signal, or does not take the value; Refused when it has got this signal from somebody else.
        """
        _check_declared(await self._record(workflow_id, tenant))
        if not await may_signal(self._store, workflow_id, name, value, signal_id=dedup):
            return False
        body = encode_signal(name, value, signal_id=dedup)
        if await self._post(workflow_id, body, dedup=f"signal:{name}", tenant=tenant):  # the first one has the place
            return True
        if not await may_signal(self._store, workflow_id, name, value, signal_id=dedup):
            return False
        raise WorkflowError(f"the workflow {workflow_id} ended before the signal {name!r} came")

    async def kill(self, workflow_id: str, tenant: str | None) -> WorkflowRecord:
        """End a workflow at once, whoever runs it and whether or not that still answers; its calls are let go after.

        Works for workflows whose events cannot be read, too. Raises NotFound, StoreError.
        """
        _check_declared(await self._record(workflow_id, tenant))
        await self._kills.kill(workflow_id)
        return await self._record(workflow_id, tenant)

    async def wait(self, workflow_id: str, tenant: str | None) -> WorkflowRecord:
        """The workflow's record once it has ended, or once this runner has let it go. Raises NotFound."""
        live = self._live.get(workflow_id)
        if live is not None and tenant in (None, live.record.tenant):
            await live.ended.wait()
        return await self._record(workflow_id, tenant)

    async def describe(self, workflow_id: str, tenant: str | None) -> dict[str, Any]:
        """A workflow with its nodes, their states and times, its outputs or its error. Raises NotFound."""
        record = await self._record(workflow_id, tenant)
        return await folded(await self._store.events(workflow_id), partial(describe_run, record))

    async def epoch(self) -> int:
        """That of this process, which its workflows have as their owner. Raises StoreError."""
        return await self._owner.epoch()

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
        await self._records.flush()
        await self._owner.retire()

    def _killed(self, record: WorkflowRecord, now_s: float) -> None:
        if (driving := self._driving.get(record.workflow_id)) is not None:
            driving.cancel()
        self._announcer.ended(record, "cancelled", now_s)
        self._notify(record.workflow_id)

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable("this server is stopping and accepts no workflows; submit again once it is back")

    async def _record(self, workflow_id: str, tenant: str | None) -> WorkflowRecord:
        record = await self._store.workflow(workflow_id, tenant=tenant)
        if record is None:
            raise NotFound(f"there is no workflow {workflow_id!r}; `swarmx workflows` lists those that there are")
        return record

    async def _accept(self, new: Beginning, idempotency: Idempotency | None) -> Accepted:
        """Store and begin, also if the client goes away meanwhile: what is stored must have somebody who runs it."""

        async def store_and_begin() -> Accepted:
            owned = msgspec.structs.replace(new.record, owner=await self._owner.epoch())
            bodies = [encode_event(event) for event in new.events]
            failpoints.hit("runner.accept")
            self._accepting.add(owned.workflow_id)
            try:
                try:
                    accepted = await self._store.accept(owned, bodies, idempotency=idempotency)
                except StoreError:
                    self._spawn(once_readable(partial(self._take_up, owned.workflow_id)))
                    raise
                failpoints.hit("runner.accepted")
                if not accepted.replayed:
                    self._begin(WorkflowRun(self._around, owned, new.run, seq=len(bodies)), again=False)
            finally:
                self._accepting.discard(owned.workflow_id)
            return accepted

        return await asyncio.shield(self._spawn(store_and_begin()))

    async def _post(self, workflow_id: str, body: bytes, *, dedup: str, tenant: str | None) -> bool:
        """Leave something for a workflow and see that it is looked at; False: it came before, or too late.

        It is looked at also if the client goes away meanwhile, and if the store says that it failed: it may be there.
        """

        async def post_and_poke() -> bool:
            try:
                new = await self._store.post(workflow_id, body, dedup=dedup, tenant=tenant)
                failpoints.hit("runner.posted")
                if workflow_id not in self._live and self._exclusive:
                    await self._take_up(workflow_id)
                return new
            finally:
                self.posted(workflow_id)

        return await asyncio.shield(self._spawn(post_and_poke()))

    async def _take_up(self, workflow_id: str) -> None:
        """Run a workflow that this process should run and does not."""
        if workflow_id in self._live:
            return
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
                self._leave(workflow_id)
            live.ended.set()

        self._live[workflow_id] = live
        self._announcer.submitted(live.record, again=again)
        self._driving[workflow_id] = self._spawn(live.drive(again=again))
        self._driving[workflow_id].add_done_callback(let_go)

    def _let_go(self) -> None:
        """Stop all work without writing: another process may have taken it over."""
        while self._driving:
            workflow_id, driving = self._driving.popitem()
            driving.cancel()
            del self._live[workflow_id]  # its own successor here need not wait for that
            self._leave(workflow_id)

    def _leave(self, workflow_id: str) -> None:
        """Tell the agents, and who waits, that it is not run here any more; its end, if it has one, tells the store."""
        if self._announcer.left(workflow_id):
            self._notify(workflow_id)

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
            self._records.add(records)
            if not self._closed:
                self._spawn(self._records.flush())

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
