"""Workflows that nobody declared: calls of an ordinary OpenAI client whose headers say which belong together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from swarmx.core.errors import StoreError
from swarmx.core.messages import Message
from swarmx.core.nouns import Call
from swarmx.core.ports import WorkflowStore
from swarmx.core.records import TERMINAL, WorkflowRecord, WorkflowState
from swarmx.gateway.identity import Identity, Source, identity_of, store_id
from swarmx.gateway.program_events import (
    CallAnswered,
    CallSeen,
    ProgramStarted,
    SubagentSeen,
    ToolGap,
    Why,
    outline,
    program_events,
)
from swarmx.gateway.program_log import ProgramLog
from swarmx.runtime.announcer import Announcer
from swarmx.runtime.clock import Clock
from swarmx.runtime.requests import BadRequest

log = logging.getLogger(__name__)

NO_WORKFLOW = ""
_FLUSH_S = 1.0  # what a crash may lose of the events; nothing but figures hangs on them

_CLAIMED_AT_ONCE = 256

T = TypeVar("T")


@dataclass(slots=True, kw_only=True)
class _Open:
    """A workflow that takes calls. `lock` guards its beginning and its end in the store.

    `last_s` is when it was last heard of, which silence counts from; `answered_s` is when its last call ended.
    """

    record: WorkflowRecord
    source: Source
    visits: set[Visit] = field(default_factory=set)
    calls: int = 0
    final: bool = False
    cancelled: bool = False
    ended: bool = False
    last_s: float = 0.0
    answered_s: float = 0.0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def why(self) -> Why:
        """What ends it, if it ends now."""
        return "cancelled" if self.cancelled else "final" if self.final else "silence"


class Visit:
    """One call of a workflow, from `touch` to `release`."""

    __slots__ = ("_open", "_scope")

    def __init__(self, opened: _Open) -> None:
        self._open = opened
        self._scope: asyncio.Timeout | None = None

    @property
    def opened(self) -> _Open:
        return self._open

    @property
    def workflow_id(self) -> str:
        """The id of the workflow in the store."""
        return self._open.record.workflow_id

    async def guard(self, step: Awaitable[T]) -> T:
        """Await a step of the answer. Raises BadRequest when the workflow is cancelled meanwhile."""
        try:
            async with asyncio.timeout(None) as scope:
                self._scope = scope
                if self._open.cancelled:
                    self.interrupt()
                return await step
        except TimeoutError:
            if not scope.expired():
                raise
            raise _was_cancelled(self._open.record) from None
        finally:
            self._scope = None

    def interrupt(self) -> None:
        """Let the step go that is awaited now."""
        if self._scope is not None:
            self._scope.reschedule(asyncio.get_running_loop().time())


class TransparentWorkflows:
    """Opens a workflow at its first call, and finishes it after its final one or when it has been silent for long.

    One that silence ended goes on as its next generation, a workflow of its own, when its client comes back. `post`
    hears that it begins and, exactly once, that its end is stored or that another server has it; `on_latency` hears the
    seconds from its beginning to the end of its last call, of one that this server ended. Without `traces` calls do not
    belong together by `traceparent`.

    Each is owned, by `epoch`, by the server that its client came to last: silence there ends it. With a store that
    servers share, one looks `others_every_s` for workflows whose server is gone, and ends them after a silence.
    """

    def __init__(
        self,
        store: WorkflowStore,
        clock: Clock,
        *,
        epoch: Callable[[], Awaitable[int]],
        idle_s: float,
        others_every_s: float | None = None,
        traces: bool = True,
        post: Callable[[Message], None] | None = None,
        on_latency: Callable[[float], None] | None = None,
    ) -> None:
        self._store = store
        self._clock = clock
        self._epoch = epoch
        self._idle_s = idle_s
        self._others_every_s = others_every_s
        self._traces = traces
        self._announcer = Announcer(post, on_latency)
        self._log = ProgramLog(store, clock)
        self._open: dict[tuple[str, str], _Open] = {}

    async def recover(self) -> None:
        """Take up the workflows that are open and whose server is gone; silence finishes them. Raises StoreError."""
        epoch = await self._epoch()
        while claimed := await self._store.claim(epoch, limit=_CLAIMED_AT_ONCE, mode="transparent"):
            for record in claimed:
                calls = await self._store.calls(record.workflow_id, tenant=record.tenant)
                if (record.tenant, record.name) in self._open:
                    continue  # its client has come here already
                self._open[record.tenant, record.name] = _Open(
                    record=record,
                    source="swarmx",
                    calls=len(calls),
                    cancelled=record.state == "cancelling",
                    last_s=self._clock.now_s(),
                    answered_s=max((call.ended_at_s for call in calls), default=record.created_at_s),
                )
                self._log.resume(record)
                self._announcer.submitted(record, again=True)

    def identify(self, headers: Iterable[tuple[bytes, bytes]]) -> Identity | None:
        """Whose call it is, if it belongs to a workflow. Raises BadRequest."""
        return identity_of(headers, traces=self._traces)

    async def touch(self, identity: Identity, tenant: str) -> Visit:
        """A call of the workflow begins. Raises BadRequest when the workflow must not go on, StoreError."""
        while True:
            state = self._open.get((tenant, identity.workflow_id))
            if state is None:
                state = await self._first(identity, tenant)
            async with state.lock:
                if state.ended:
                    continue  # while this call waited: whether another one may follow is told by the store
                if state.cancelled:
                    raise _was_cancelled(state.record)
                visit = Visit(state)
                state.visits.add(visit)
                state.calls += 1
                state.final = state.final or identity.final
                state.last_s = self._clock.now_s()
                return visit

    def seen(self, visit: Visit, call: Call, *, tools_offered: int) -> None:
        """What the call of the visit is."""
        self._log.note(
            visit.workflow_id,
            CallSeen(
                at_s=self._clock.now_s(),
                call_id=call.call_id,
                role=call.role,
                model=call.model,
                prompt_tokens=call.prompt_tokens,
                tools_offered=tools_offered,
            ),
        )

    def answered(self, call: Call, tools: tuple[str, ...]) -> None:
        """The answer to a call of any workflow asks for these tools."""
        self._log.note(call.workflow_id, CallAnswered(at_s=self._clock.now_s(), call_id=call.call_id, tools=tools))

    def tools_returned(self, workflow_id: str, tools: tuple[str, ...], gap_s: float) -> None:
        """The results of these tools came back, that long after any workflow asked for them."""
        self._log.note(workflow_id, ToolGap(at_s=self._clock.now_s(), tools=tools, gap_s=gap_s))

    async def release(self, visit: Visit) -> None:
        """A call of the workflow has ended."""
        state = visit.opened
        state.visits.discard(visit)
        state.last_s = state.answered_s = self._clock.now_s()
        if state.final or state.cancelled:
            await self._finish(state)

    async def close(self, identity: Identity, tenant: str) -> None:
        """The client has no more calls for it; of a workflow that is not open there is nothing to do."""
        state = self._open.get((tenant, identity.workflow_id))
        if state is not None:
            state.final = True
            await self._finish(state)

    async def outline(self, workflow_id: str) -> dict[str, Any]:
        """What has been seen of the workflow, as plain data (`program_events.outline`). Raises StoreError."""
        await self._log.flush()
        return outline(program_events(await self._store.events(workflow_id)))

    async def cancel(self, workflow_id: str, tenant: str | None) -> WorkflowRecord | None:
        """Let go the calls of the workflow and of all that it started, and end them; returns its record.

        It ends once its last call is gone, and takes no others. None: no such one is open. `tenant` is None for an
        operator, who sees all. Raises StoreError.
        """
        root = next((one for one in self._open.values() if one.record.workflow_id == workflow_id), None)
        if root is None or tenant not in (None, root.record.tenant):
            return None
        tree = self._tree(root)
        for state in tree:
            async with state.lock:
                if not state.ended:
                    await self._log.cancelling(state.record.workflow_id)
                    state.cancelled = True
            for visit in state.visits:
                visit.interrupt()
        for state in tree:
            await self._finish(state)
        return await self._store.workflow(workflow_id, tenant=tenant)

    async def run(self) -> None:
        """Write down what is seen, and finish workflows that have been silent; runs until cancelled."""
        looked_s = asyncio.get_running_loop().time()
        try:
            while True:
                await asyncio.sleep(min(_FLUSH_S, self._idle_s / 4.0, self._others_every_s or _FLUSH_S))
                await self._log.flush()
                oldest_s = self._clock.now_s() - self._idle_s
                for state in list(self._open.values()):
                    if state.cancelled or (state.last_s < oldest_s and not await self._goes_on_elsewhere(state)):
                        await self._finish(state)
                now_s = asyncio.get_running_loop().time()
                if self._others_every_s is not None and now_s - looked_s >= self._others_every_s:
                    looked_s = now_s
                    try:
                        await self.recover()
                    except StoreError as error:
                        log.warning("the workflows of servers that are gone were not looked for: %s", error)
        finally:
            await self._log.flush()

    async def _first(self, identity: Identity, tenant: str) -> _Open:
        """Open it; whoever comes meanwhile waits for the lock."""
        now_s = self._clock.now_s()
        parent = self._open.get((tenant, identity.parent or ""))
        parent_id = None if identity.parent is None else store_id(identity.parent, tenant)
        state = _Open(
            record=WorkflowRecord(
                workflow_id=store_id(identity.workflow_id, tenant),
                tenant=tenant,
                mode="transparent",
                kind=identity.kind,
                name=identity.workflow_id,
                state="running",
                created_at_s=now_s,
                parent_id=parent.record.workflow_id if parent else parent_id,
            ),
            source=identity.source,
            last_s=now_s,
        )
        self._open[tenant, identity.workflow_id] = state
        async with state.lock:
            try:
                again = await self._begin(state)
            except BaseException:
                self._forget(state)
                raise
            self._announcer.submitted(state.record, again=again)
        if parent is not None and not again:
            seen = SubagentSeen(at_s=now_s, workflow_id=state.record.workflow_id)
            self._log.note(parent.record.workflow_id, seen)
        return state

    async def _begin(self, state: _Open) -> bool:
        """Store its beginning. True: it had begun already, elsewhere or by a write that was reported as failed."""
        epoch = await self._epoch()
        number, last = await self._newest(state.record)
        if last is not None and last.state not in TERMINAL:
            taken = await self._store.take(last.workflow_id, epoch, mode="transparent")
            if taken is None:  # it ended meanwhile: that decides what follows
                return await self._begin(state)
            state.record = taken
            self._log.resume(taken)
            return True
        if last is not None:
            if last.state == "cancelled":
                raise _was_cancelled(last)
            if state.source == "swarmx" and _ended_by(last) == "final":
                raise BadRequest(f"the workflow {last.name!r} has ended; start another one under a new id.")
            state.record = msgspec.structs.replace(
                state.record, workflow_id=_generation(state.record.workflow_id, number + 1)
            )
        record = state.record = msgspec.structs.replace(state.record, owner=epoch)
        started = ProgramStarted(at_s=record.created_at_s, source=state.source, parent_id=record.parent_id)
        await self._log.begin(record, started)
        return False

    async def _newest(self, record: WorkflowRecord) -> tuple[int, WorkflowRecord | None]:
        """The newest generation in the store and its number; (0, None) without any. Older ones may be gone."""
        found = await self._store.newest_of(record.workflow_id, tenant=record.tenant)
        if found is None:
            return 0, None
        return int(found.workflow_id.removeprefix(record.workflow_id).lstrip("~") or 1), found

    async def _finish(self, state: _Open) -> None:
        """End a workflow without a call in flight; if the store cannot, silence tries again."""
        async with state.lock:
            if state.ended or state.visits:
                return
            why = state.why
            try:
                ended_here = await self._log.end(state.record.workflow_id, why, calls=state.calls)
            except StoreError as error:
                log.warning("the workflow %s could not be finished: %s", state.record.workflow_id, error)
                return
            self._forget(state)
            if ended_here:
                ending: WorkflowState = "cancelled" if why == "cancelled" else "finished"
                self._announcer.ended(state.record, ending, state.answered_s)
            else:
                self._announcer.left(state.record.workflow_id)

    async def _goes_on_elsewhere(self, state: _Open) -> bool:
        """Whether its client has gone on at another server, which it is left to once nothing of it is here any more."""
        workflow_id = state.record.workflow_id
        async with state.lock:
            if state.ended or state.visits:
                return True
            try:
                epoch = await self._epoch()
                found, moved = await self._log.catch_up(workflow_id)
            except StoreError as error:
                log.warning("whether the workflow %s is silent is not known: %s", workflow_id, error)
                return True
            if found is not None and found.state not in TERMINAL and found.owner != epoch:
                self._forget(state)
                self._log.forget(workflow_id)
                self._announcer.left(workflow_id)
                return True
            if moved:
                state.last_s = self._clock.now_s()
            return moved

    def _forget(self, state: _Open) -> None:
        state.ended = True
        self._open.pop((state.record.tenant, state.record.name), None)

    def _tree(self, root: _Open) -> list[_Open]:
        """The workflow and the open ones that it, or one of them, started."""
        children: dict[str | None, list[_Open]] = {}
        for state in self._open.values():
            children.setdefault(state.record.parent_id, []).append(state)
        tree = [root]
        for state in tree:  # grows while it is walked
            # A child that came before the first call of its parent knows the id of its first generation.
            for parent_id in (state.record.workflow_id, store_id(state.record.name, state.record.tenant)):
                tree += [child for child in children.pop(parent_id, ()) if child is not root]
        return tree


def _generation(workflow_id: str, number: int) -> str:
    """Ids of clients have no tilde, so that no two workflows share one; it needs no escape in a URL."""
    return workflow_id if number == 1 else f"{workflow_id}~{number}"


def _ended_by(record: WorkflowRecord) -> str | None:
    outcome = msgspec.json.decode(record.outcome) if record.outcome is not None else {}
    return outcome.get("ended_by") if isinstance(outcome, dict) else None


def _was_cancelled(record: WorkflowRecord) -> BadRequest:
    return BadRequest(f"the workflow {record.name!r} was cancelled; start another one under a new id.")
