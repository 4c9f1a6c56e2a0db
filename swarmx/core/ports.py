"""The seams, on one screen: what an agent, a policy, a forecaster, a provider, a store and a caller have to offer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from swarmx.core.actions import Action
from swarmx.core.audit import AuditEntry, AuditRecord
from swarmx.core.control import Episode, Facts, Prompt, Proposal, ProposalState, Reply
from swarmx.core.fleet import CallView, Choice, FleetView, Order
from swarmx.core.forecast import Forecast
from swarmx.core.messages import Message
from swarmx.core.nouns import Call, Decision, Replica, ReplicaGroup
from swarmx.core.prompts import Encoding, PromptText
from swarmx.core.records import (
    Accepted,
    CallRecord,
    Commit,
    Committed,
    Forgotten,
    Idempotency,
    Input,
    ModelRequest,
    ModelResult,
    StoredEvent,
    WorkflowMode,
    WorkflowPage,
    WorkflowRecord,
    WorkflowState,
)
from swarmx.core.scaling import ScaleView, Target

Output = Message | Action


class SchedulerAgent(Protocol):
    """A pure decision maker: the same messages at the same times give the same outputs.

    `listens` are the message types that it wants; `actions` are the action types that it may emit, its bounded set of
    tools: the shell refuses any other.
    """

    @property
    def name(self) -> str: ...
    @property
    def listens(self) -> frozenset[type]: ...
    @property
    def actions(self) -> frozenset[type]: ...
    def handle(self, message: Message, now_s: float) -> Sequence[Output]: ...


class Policy(Protocol):
    """Picks one of the candidates. A frozen dataclass: its fields are its parameters.

    Calls that wait in the router are asked about in its `order`. One that `waits` is shown full replicas, too, and may
    hold a call for one of them; choosing a full replica is to hold the call.
    """

    @property
    def name(self) -> str: ...
    @property
    def order(self) -> Order: ...
    @property
    def waits(self) -> bool: ...
    def choose(self, call: CallView, fleet: FleetView, rng: np.random.Generator) -> Choice: ...


class ScalingPolicy(Protocol):
    """Says how many replicas a model wants. A frozen dataclass: its fields are its parameters."""

    @property
    def name(self) -> str: ...
    def target(self, view: ScaleView) -> Target: ...


class Encoder(Protocol):
    """Turns prompts into vectors. `version` changes with every change of the weights; the same text and version give
    the same vector. A `slow` one (above a millisecond) is called off the loop, with several prompts at once.
    """

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def dimension(self) -> int: ...
    @property
    def slow(self) -> bool: ...
    def encode(self, prompts: Sequence[PromptText]) -> NDArray[np.float32]: ...


class Forecaster(Protocol):
    """Forecasts the work of a call and learns from what it came to.

    The prompt is read once, by `encode`; what comes of it is handed in again by whoever keeps the call.
    """

    def encode(self, call: Call, prompt: PromptText) -> Encoding: ...
    def forecast(self, call: Call, encoding: Encoding) -> Forecast: ...
    def observe(self, call: Call, encoding: Encoding, work_done: float) -> None: ...


class Provider(Protocol):
    """Brings replicas to life, and to an end. `start` returns once every replica answers its health check."""

    async def start(self) -> Sequence[Replica]: ...
    async def stop(self) -> None: ...


class ElasticProvider(Provider, Protocol):
    """A provider that also starts and ends single replicas while the others serve.

    `deploy` returns once the replica answers its health check, and raises ReplicaError, with nothing of it left
    running, when it does not come up. `retire` ends it; one that is unknown or gone already is fine.
    """

    async def deploy(self, replica_id: str, group: ReplicaGroup) -> Replica: ...
    async def retire(self, replica_id: str) -> None: ...


class VectorMemory(Protocol):
    """Remembers vectors of `dimension` numbers with a few plain facts each, and finds the nearest (by cosine).

    `nearest` returns (id, similarity in [-1, 1], facts), best first. Adding an id again replaces it. Raises
    StoreError.
    """

    async def open(self) -> None: ...
    async def close(self) -> None: ...
    async def add(self, key: str, vector: Sequence[float], facts: Facts) -> None: ...
    async def nearest(self, vector: Sequence[float], count: int) -> list[tuple[str, float, Facts]]: ...


class LanguageModel(Protocol):
    """Answers one prompt with one tool call at most. Late, endless, broken replies are values, not exceptions."""

    @property
    def name(self) -> str: ...
    async def reply(self, prompt: Prompt, *, deadline_s: float) -> Reply: ...


class Caller(Protocol):
    """Has one model call answered by some replica. A refusal is a result, not an exception."""

    async def complete(self, request: ModelRequest) -> ModelResult: ...


class AuditTrail(Protocol):
    """Append-only. `write` returns the number of the record once it is on disk. Raises StoreError."""

    async def write(self, entry: AuditEntry) -> int: ...
    async def tail(self, *, limit: int, before: int | None = None) -> list[AuditRecord]: ...


class ControlStore(Protocol):
    """Proposals, episodes and start-up times, durable. `save_` inserts or replaces by id.

    Lists are newest first; `before` is the time and the id of the last one that was seen.
    """

    async def save_proposal(self, proposal: Proposal) -> None: ...
    async def proposal(self, proposal_id: str) -> Proposal | None: ...
    async def proposals(
        self, *, states: Sequence[ProposalState] | None, limit: int, before: tuple[float, str] | None = None
    ) -> list[Proposal]: ...
    async def save_episode(self, episode: Episode) -> None: ...
    async def episode(self, episode_id: str) -> Episode | None: ...
    async def episodes(self, *, limit: int, before: tuple[float, str] | None = None) -> list[Episode]: ...
    async def record_startup(self, group_id: str, device: str, seconds: float, at_s: float) -> None: ...
    async def startups(self) -> dict[str, list[float]]: ...


class Ownership(Protocol):
    """Who runs which workflow: each process has an epoch, and a workflow the epoch of its owner.

    The owner of a declared workflow is the only one that writes to it; that of a transparent one is who ends it.

    `enlist` gives an epoch larger than any before; an `exclusive` one ends all others. `heartbeat` keeps it for
    another `ttl_s`; once that says False, the process stops its own work at once. `claim` takes workflows whose owner
    is gone, `take` one from whoever has it; `owned` names those that an epoch has to run, `waiting` those of them to
    which something was posted. The clock is the store's, since those of processes differ.
    """

    async def enlist(self, name: str, *, ttl_s: float, exclusive: bool) -> int: ...
    async def heartbeat(self, epoch: int, *, ttl_s: float) -> bool: ...
    async def claim(self, epoch: int, *, limit: int, mode: WorkflowMode = "declared") -> list[WorkflowRecord]: ...
    async def take(self, workflow_id: str, epoch: int, *, mode: WorkflowMode = "declared") -> WorkflowRecord | None: ...
    async def owned(self, epoch: int) -> list[str]: ...
    async def waiting(self, epoch: int) -> list[str]: ...
    async def retire(self, epoch: int) -> None: ...


class Store(Protocol):
    """The durable truth: workflows and their events, calls, decisions, blobs. Every method is atomic and durable.

    Reads never cross tenants unless `tenant` is None (an operator's view). `commit` is how the owner of a workflow
    writes to it; `append` is for transparent workflows, and those that no process owns. Both change nothing when the
    workflow is already terminal or the writer lost its place. `post` leaves something for the owner, once for each
    `dedup`. `accept` and `keep_key` remember the key of a request until it expires; `of_key` knows what it was for.

    A workflow that ended long ago is gone once `forget` has come to it, which does no more at a time than others can
    wait for. It passes over one that a valid key leads to, or that has children. The last `kept_calls` calls stay, for
    predictors to learn from, even if their workflow goes; blobs stay as long as a workflow that made them, or a fork
    of it, and what `put_blob` keeps, stays for good.
    """

    async def open(self) -> None: ...
    async def close(self) -> None: ...
    async def accept(
        self, workflow: WorkflowRecord, events: Sequence[bytes], *, idempotency: Idempotency | None = None
    ) -> Accepted: ...
    async def of_key(self, tenant: str, idempotency: Idempotency) -> str | None: ...
    async def keep_key(self, tenant: str, idempotency: Idempotency, workflow_id: str) -> None: ...
    async def commit(self, change: Commit) -> Committed: ...
    async def append(
        self,
        workflow_id: str,
        events: Sequence[bytes],
        *,
        expected_seq: int,
        at_s: float,
        state: WorkflowState | None = None,
        outcome: bytes | None = None,
    ) -> bool: ...
    async def workflow(self, workflow_id: str, *, tenant: str | None) -> WorkflowRecord | None: ...
    async def newest_of(self, workflow_id: str, *, tenant: str | None) -> WorkflowRecord | None: ...
    async def workflows(
        self, *, tenant: str | None, state: WorkflowState | None, limit: int, cursor: str | None
    ) -> WorkflowPage: ...
    async def events(self, workflow_id: str, *, after: int = 0, limit: int | None = None) -> list[StoredEvent]: ...
    async def post(self, workflow_id: str, body: bytes, *, dedup: str, tenant: str | None) -> bool: ...
    async def inputs(self, workflow_id: str) -> list[Input]: ...
    async def unfinished(self) -> list[WorkflowRecord]: ...
    async def record_call(self, record: CallRecord) -> None: ...
    async def call(self, call_id: str, *, tenant: str | None) -> CallRecord | None: ...
    async def calls(self, workflow_id: str, *, tenant: str | None) -> list[CallRecord]: ...
    async def newest_finished(self, limit: int) -> list[CallRecord]: ...
    async def forget(self, *, older_than_s: float, kept_calls: int, limit: int) -> Forgotten: ...
    async def record_decision(self, decision: Decision) -> None: ...
    async def decisions(self, call_id: str, *, tenant: str | None) -> list[Decision]: ...
    async def put_blob(self, tenant: str, media_type: str, data: bytes) -> str: ...
    async def blob(self, sha256: str, *, tenant: str | None) -> tuple[str, bytes] | None: ...


class WorkflowStore(Store, Ownership, Protocol):
    """A store that also says who runs which workflow: what a runner needs."""
