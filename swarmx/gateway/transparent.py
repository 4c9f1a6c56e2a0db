"""Workflows that nobody declared: calls of an ordinary OpenAI client that name their workflow in a header."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec

from swarmx.core.errors import StoreError
from swarmx.core.messages import Message
from swarmx.core.ports import Store
from swarmx.core.records import WorkflowRecord
from swarmx.runtime.announcer import Announcer
from swarmx.runtime.clock import Clock
from swarmx.runtime.requests import BadRequest

log = logging.getLogger(__name__)

NO_WORKFLOW = ""
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a call says of its workflow: `x-swarmx-workflow-id`, `-kind`, `-node` and `-final`."""

    workflow_id: str
    kind: str
    node: str
    final: bool


def identity_of(headers: Mapping[str, str]) -> Identity | None:
    """Read the workflow headers; None without them. Raises BadRequest for an id that cannot be one."""
    workflow_id = headers.get("x-swarmx-workflow-id")
    if workflow_id is None:
        return None
    if not _ID.fullmatch(workflow_id):
        raise BadRequest(
            f"x-swarmx-workflow-id {workflow_id[:140]!r}: use up to 128 letters, digits and . _ : - characters."
        )
    return Identity(
        workflow_id=workflow_id,
        kind=headers.get("x-swarmx-workflow-kind", "transparent")[:64],
        node=headers.get("x-swarmx-node", "")[:64],
        final=headers.get("x-swarmx-workflow-final", "").lower() in ("1", "true", "yes"),
    )


def store_id(identity: Identity, tenant: str) -> str:
    """The id of the workflow in the store; clients of two tenants may use the same one."""
    return f"{tenant}:{identity.workflow_id}"


@dataclass(slots=True)
class _Open:
    """A workflow that takes calls. `lock` guards its beginning and its end in the store.

    `last_s` is when it was last heard of, which silence counts from; `answered_s` is when its last call ended.
    """

    record: WorkflowRecord
    in_flight: int = 0
    calls: int = 0
    final: bool = False
    ended: bool = False
    last_s: float = 0.0
    answered_s: float = 0.0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class TransparentWorkflows:
    """Opens a workflow at its first call, and finishes it after its final one or when it has been silent for long.

    `post` hears that it begins and, exactly once, that its end is stored; `on_latency` then hears the seconds from its
    beginning to the end of its last call.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        *,
        idle_s: float,
        post: Callable[[Message], None] | None = None,
        on_latency: Callable[[float], None] | None = None,
    ) -> None:
        self._store = store
        self._clock = clock
        self._idle_s = idle_s
        self._announcer = Announcer(post, on_latency)
        self._open: dict[tuple[str, str], _Open] = {}

    async def recover(self) -> None:
        """Take up the workflows that were open when the last process ended; silence finishes them."""
        for record in await self._store.unfinished():
            if record.mode == "transparent":
                calls = await self._store.calls(record.workflow_id, tenant=record.tenant)
                self._open[record.tenant, record.name] = _Open(
                    record=record,
                    calls=len(calls),
                    last_s=self._clock.now_s(),
                    answered_s=max((call.ended_at_s for call in calls), default=record.created_at_s),
                )
                self._announcer.submitted(record, again=True)

    async def touch(self, identity: Identity, tenant: str) -> None:
        """A call of the workflow begins. Raises BadRequest when the workflow has ended, StoreError."""
        state = self._open.get((tenant, identity.workflow_id))
        if state is None:
            state = _Open(record=self._new(identity, tenant), last_s=self._clock.now_s())
            self._open[tenant, identity.workflow_id] = state
            async with state.lock:
                try:
                    await self._begin(state)
                except BaseException:
                    self._forget(state)
                    raise
                self._announcer.submitted(state.record)
        async with state.lock:
            if state.ended:
                raise _over(state.record)
            state.in_flight += 1
            state.calls += 1
            state.final = state.final or identity.final
            state.last_s = self._clock.now_s()

    async def release(self, identity: Identity, tenant: str) -> None:
        """A call of the workflow has ended."""
        state = self._open.get((tenant, identity.workflow_id))
        if state is None:
            return
        state.in_flight -= 1
        state.last_s = state.answered_s = self._clock.now_s()
        if state.final:
            await self._finish(state)

    async def run(self) -> None:
        """Finish workflows that have been silent; runs until cancelled."""
        while True:
            await asyncio.sleep(min(30.0, self._idle_s / 4.0))
            oldest_s = self._clock.now_s() - self._idle_s
            for state in list(self._open.values()):
                if state.last_s < oldest_s:
                    await self._finish(state)

    async def _begin(self, state: _Open) -> None:
        if await self._store.workflow(state.record.workflow_id, tenant=state.record.tenant) is not None:
            raise _over(state.record)
        await self._store.accept(state.record, ())

    async def _finish(self, state: _Open) -> None:
        """End a workflow without a call in flight; if the store cannot, silence tries again."""
        record = state.record
        async with state.lock:
            if state.ended or state.in_flight:
                return
            try:
                await self._store.append(
                    record.workflow_id,
                    (),
                    expected_seq=record.seq,
                    at_s=self._clock.now_s(),
                    state="finished",
                    outcome=msgspec.json.encode({"calls": state.calls}),
                )
            except StoreError as error:
                log.warning("the workflow %s could not be finished: %s", record.workflow_id, error)
                return
            self._forget(state)
            # A refusal means that an earlier write, reported as failed, did end it: it has ended, once, either way.
            self._announcer.ended(record, "finished", state.answered_s)

    def _forget(self, state: _Open) -> None:
        state.ended = True
        self._open.pop((state.record.tenant, state.record.name), None)

    def _new(self, identity: Identity, tenant: str) -> WorkflowRecord:
        return WorkflowRecord(
            workflow_id=store_id(identity, tenant),
            tenant=tenant,
            mode="transparent",
            kind=identity.kind,
            name=identity.workflow_id,
            state="running",
            created_at_s=self._clock.now_s(),
        )


def _over(record: WorkflowRecord) -> BadRequest:
    return BadRequest(f"the workflow {record.name!r} has ended; start another one under a new id.")
