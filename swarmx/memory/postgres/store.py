"""The store in PostgreSQL: one writing connection with group commit, reads beside it, and several gateways at once."""

# ruff: noqa: S608  # statements are put together from fixed columns and conditions; values are always bound

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from hashlib import sha256
from typing import TypeVar

import asyncpg
import msgspec

from swarmx.core.errors import StoreError
from swarmx.core.nouns import Decision
from swarmx.core.records import (
    SCHEMA_VERSION,
    Accepted,
    Blob,
    CallRecord,
    Commit,
    Committed,
    Forgotten,
    Idempotency,
    Input,
    StoredEvent,
    WorkflowMode,
    WorkflowPage,
    WorkflowRecord,
    WorkflowState,
)
from swarmx.memory.postgres import forgetting, owners, workflows
from swarmx.memory.postgres.connection import explained, place_of
from swarmx.memory.postgres.lane import Lane
from swarmx.memory.postgres.reading import Listener, Readers
from swarmx.memory.postgres.schema import migrate
from swarmx.memory.rows import decoded, finished

T = TypeVar("T")


class PostgresStore:
    """The Store port on a PostgreSQL database, `postgresql://user@host:port/name`, which several processes may share.

    A write returns once the database says that it is durable. The clock of leases is the database's. No statement takes
    longer than `timeout_s`; a lost connection is made anew for up to `patience_s`. Also implements the Ownership port.
    """

    def __init__(self, url: str, *, timeout_s: float = 5.0, patience_s: float = 5.0) -> None:
        self._url = url
        self._where = place_of(url)
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._writer: Lane | None = None
        self._readers: Readers | None = None
        self._listener: Listener | None = None

    async def open(self) -> None:
        """Create or migrate the tables. Raises StoreError: it cannot be reached, or a newer version wrote them."""
        if self._writer is not None:
            raise StoreError(f"the store {self._where} is already open")
        limits = {"timeout_s": self._timeout_s, "patience_s": self._patience_s}
        writer = Lane(self._url, where=self._where, **limits)
        try:
            await writer.open(lambda connection: migrate(connection, self._where))
            self._writer = writer
            self._readers = await Readers.open(self._url, where=self._where, **limits)
        except Exception as error:
            await self.close()
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"the database {self._where} cannot be opened: {explained(error, self._where)}") from error

    def listen(self, on_posted: Callable[[str], None]) -> None:
        """From now on, until it is closed, `on_posted` hears the ids of workflows to which something was posted, or
        which were taken, by whichever process; it may miss some.

        Raises StoreError if somebody listens already.
        """
        if self._listener is not None:
            raise StoreError(f"somebody already listens to {self._where}; one listener a store")
        self._listener = Listener(self._url, owners.CHANNEL, on_posted, where=self._where, timeout_s=self._timeout_s)

    async def close(self) -> None:
        """Finish queued writes and close. Closing twice is fine."""
        for part in (self._listener, self._writer, self._readers):
            if part is not None:
                await part.close()
        self._listener = self._writer = self._readers = None

    async def accept(
        self, workflow: WorkflowRecord, events: Sequence[bytes], *, idempotency: Idempotency | None = None
    ) -> Accepted:
        """Store a new workflow with its first events; `seq` becomes their number.

        A key that came before gives the workflow that it brought then. Raises StoreError if the id exists, KeyReused.
        """
        bodies = list(events)
        return await self.write(lambda connection: workflows.accept(connection, workflow, bodies, idempotency))

    async def of_key(self, tenant: str, idempotency: Idempotency) -> str | None:
        """The workflow of the request that came with the key before, None for a new key. Raises KeyReused."""
        return await self.read(lambda connection: workflows.of_key(connection, tenant, idempotency, None))

    async def keep_key(self, tenant: str, idempotency: Idempotency, workflow_id: str) -> None:
        """Remember that the request with this key was carried out, on this workflow; the first one stays."""
        await self.write(lambda connection: workflows.keep_key(connection, tenant, idempotency, workflow_id))

    async def commit(self, change: Commit) -> Committed:
        """Write everything in the change, or say why nothing was. Raises NotFound."""
        return await self.write(lambda connection: workflows.commit(connection, change))

    async def append(
        self,
        workflow_id: str,
        events: Sequence[bytes],
        *,
        expected_seq: int,
        at_s: float,
        state: WorkflowState | None = None,
        outcome: bytes | None = None,
    ) -> bool:
        """Add to a transparent workflow, or one that no process owns, and change the state if one is given.

        False, and nothing has changed: the workflow is terminal or run by somebody, has another number of events than
        `expected_seq`, or must not change to that state. Raises NotFound.
        """
        change = Commit(
            workflow_id=workflow_id,
            epoch=0,
            expected_seq=expected_seq,
            at_s=at_s,
            events=tuple(events),
            state=state,
            outcome=outcome,
        )
        return await self.write(lambda connection: workflows.append(connection, change))

    async def workflow(self, workflow_id: str, *, tenant: str | None) -> WorkflowRecord | None:
        """One workflow, or None if it is unknown or another tenant's."""
        return await self.read(lambda connection: workflows.find(connection, workflow_id, tenant))

    async def newest_of(self, workflow_id: str, *, tenant: str | None) -> WorkflowRecord | None:
        """The last of a workflow and those that came after it as `workflow_id~2`, `workflow_id~3`, ...; or None."""
        return await self.read(lambda connection: workflows.newest_of(connection, workflow_id, tenant))

    async def workflows(
        self, *, tenant: str | None, state: WorkflowState | None, limit: int, cursor: str | None
    ) -> WorkflowPage:
        """A page, newest first; `limit` is 1 to 1000. Raises NotFound for a cursor that this store did not give out."""
        return await self.read(
            lambda connection: workflows.page(connection, tenant=tenant, state=state, limit=limit, cursor=cursor)
        )

    async def events(self, workflow_id: str, *, after: int = 0, limit: int | None = None) -> list[StoredEvent]:
        """The events of a workflow behind the `after`-th, in their order; none if it is unknown."""
        return await self.read(lambda connection: workflows.events(connection, workflow_id, after, limit))

    async def unfinished(self) -> list[WorkflowRecord]:
        """The workflows of all tenants that are not terminal, oldest first."""
        return await self.read(workflows.unfinished)

    async def post(self, workflow_id: str, body: bytes, *, dedup: str, tenant: str | None) -> bool:
        """Leave something for the owner; False: that came before, or the workflow has ended. Raises NotFound."""
        return await self.write(
            lambda connection: owners.post(connection, workflow_id, body, dedup=dedup, tenant=tenant)
        )

    async def inputs(self, workflow_id: str) -> list[Input]:
        """What was posted to the workflow and has not become an event yet, in its order."""
        return await self.read(lambda connection: owners.inputs(connection, workflow_id))

    async def enlist(self, name: str, *, ttl_s: float, exclusive: bool) -> int:
        """An epoch, larger than any before, that others respect for `ttl_s`; an `exclusive` one ends all others."""
        return await self.write(lambda connection: owners.enlist(connection, name, ttl_s, exclusive=exclusive))

    async def heartbeat(self, epoch: int, *, ttl_s: float) -> bool:
        """Keep the epoch for another `ttl_s`; False: it is over."""
        return await self.write(lambda connection: owners.heartbeat(connection, epoch, ttl_s))

    async def claim(self, epoch: int, *, limit: int, mode: WorkflowMode = "declared") -> list[WorkflowRecord]:
        """Take up to `limit` unfinished workflows of the mode whose owner is gone, the oldest first."""
        return await self.write(lambda connection: owners.claim(connection, epoch, limit, mode))

    async def take(self, workflow_id: str, epoch: int, *, mode: WorkflowMode = "declared") -> WorkflowRecord | None:
        """Take one workflow from whoever has it; None if it is unknown, has ended, or is of another mode."""
        return await self.write(lambda connection: owners.take(connection, workflow_id, epoch, mode))

    async def owned(self, epoch: int) -> list[str]:
        """The unfinished workflows that this epoch has to run."""
        return await self.read(lambda connection: owners.owned(connection, epoch))

    async def waiting(self, epoch: int) -> list[str]:
        """The workflows of this epoch to which something was posted that has not become an event yet."""
        return await self.read(lambda connection: owners.waiting(connection, epoch))

    async def retire(self, epoch: int) -> None:
        """End the epoch; its workflows are free."""
        await self.write(lambda connection: owners.retire(connection, epoch))

    async def record_call(self, record: CallRecord) -> None:
        """Keep what became of a call. The first record of a call stands: a call is never counted twice."""
        await self.write(lambda connection: workflows.insert_call(connection, record))

    async def call(self, call_id: str, *, tenant: str | None) -> CallRecord | None:
        """One call, or None if it is unknown or another tenant's."""
        found = await self._bodies("calls WHERE call_id = $1 AND tenant = coalesce($2::text, tenant)", call_id, tenant)
        return decoded(found[0], CallRecord) if found else None

    async def calls(self, workflow_id: str, *, tenant: str | None) -> list[CallRecord]:
        """The calls of a workflow in the order in which they became ready."""
        found = await self._bodies(
            "calls WHERE workflow_id = $1 AND tenant = coalesce($2::text, tenant) ORDER BY ready_at_s, call_id",
            workflow_id,
            tenant,
        )
        return [decoded(body, CallRecord) for body in found]

    async def newest_finished(self, limit: int) -> list[CallRecord]:
        """The finished ones among the last `limit` calls that were recorded, of all tenants, oldest first."""
        found = await self._bodies("calls ORDER BY number DESC LIMIT $1", limit)
        return finished(found)

    async def forget(self, *, older_than_s: float, kept_calls: int, limit: int) -> Forgotten:
        """Delete up to `limit` of what ended more than `older_than_s` ago; ask again until that is nothing."""
        return await self.write(
            lambda connection: forgetting.forget(
                connection, older_than_s=older_than_s, kept_calls=kept_calls, limit=limit
            )
        )

    async def record_decision(self, decision: Decision) -> None:
        """Add a decision to the log."""
        body = msgspec.json.encode(decision)
        call = decision.call
        await self.write(
            lambda connection: connection.execute(
                "INSERT INTO decisions (call_id, tenant, at_s, body, schema_version) VALUES ($1, $2, $3, $4, $5)",
                call.call_id,
                call.tenant,
                decision.at_s,
                body,
                SCHEMA_VERSION,
            )
        )

    async def decisions(self, call_id: str, *, tenant: str | None) -> list[Decision]:
        """The decisions about a call, first to last."""
        found = await self._bodies(
            "decisions WHERE call_id = $1 AND tenant = coalesce($2::text, tenant) ORDER BY decision_id", call_id, tenant
        )
        return [decoded(body, Decision) for body in found]

    async def put_blob(self, tenant: str, media_type: str, data: bytes) -> str:
        """Keep the bytes under their SHA-256, which is returned (64 hex digits)."""
        blob = Blob(sha256=sha256(data).hexdigest(), media_type=media_type, data=data)
        await self.write(lambda connection: workflows.insert_blob(connection, tenant, blob))
        return blob.sha256

    async def blob(self, sha256: str, *, tenant: str | None) -> tuple[str, bytes] | None:
        """Media type and bytes, or None if unknown or another tenant's."""
        row = await self.read(
            lambda connection: connection.fetchrow(
                "SELECT media_type, data FROM blobs WHERE sha256 = $1 AND tenant = coalesce($2::text, tenant) "
                "ORDER BY tenant",
                sha256,
                tenant,
            )
        )
        return None if row is None else (row[0], row[1])

    async def write(self, work: Callable[[asyncpg.Connection], Awaitable[T]]) -> T:
        """Run the job in a transaction, alone or with others; returns once it is durable."""
        if self._writer is None:
            raise self._not_open()
        return await self._writer.do(work)

    async def read(self, work: Callable[[asyncpg.Connection], Awaitable[T]]) -> T:
        """Run the job beside the writer; it sees what was stored when it began."""
        if self._readers is None:
            raise self._not_open()
        return await self._readers.do(work)

    async def _bodies(self, tail: str, *values: object) -> list[bytes]:
        return [
            row[0] for row in await self.read(lambda connection: connection.fetch(f"SELECT body FROM {tail}", *values))
        ]

    def _not_open(self) -> StoreError:
        return StoreError(f"the store {self._where} is not open; call open() first")
