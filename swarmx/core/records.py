"""What is kept: workflows, their events, calls; and what a model call asks for and comes back with."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from swarmx.core.failures import Failure
from swarmx.core.nouns import CallKind

SCHEMA_VERSION = 1

WorkflowState = Literal["running", "cancelling", "finished", "failed", "cancelled"]
WorkflowMode = Literal["declared", "transparent"]
TERMINAL: frozenset[WorkflowState] = frozenset({"finished", "failed", "cancelled"})
CallState = Literal["finished", "failed", "cancelled", "refused"]


class WorkflowRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One workflow as it is listed; times are Unix seconds. `outcome` is its outputs or its error, JSON.

    `owner` is the epoch of the process that runs it, 0 for one that no process ever ran. `parent_id` is the workflow
    that began this one, `forked_from` the one whose beginning it shares; `spec_sha256` is the hash of its definition.
    """

    workflow_id: str
    tenant: str
    mode: WorkflowMode
    kind: str
    name: str
    state: WorkflowState
    created_at_s: float
    deadline_at_s: float | None = None
    ended_at_s: float | None = None
    seq: int = 0
    outcome: bytes | None = None
    schema_version: int = SCHEMA_VERSION
    parent_id: str | None = None
    forked_from: str | None = None
    spec_sha256: str = ""
    owner: int = 0


class WorkflowPage(msgspec.Struct, frozen=True, kw_only=True):
    """Newest first; `next_cursor` is None on the last page."""

    workflows: list[WorkflowRecord]
    next_cursor: str | None


class StoredEvent(msgspec.Struct, frozen=True, kw_only=True):
    """The `seq`-th event (from 1) of a workflow; `body` is the JSON that the workflow room wrote."""

    seq: int
    at_s: float
    body: bytes
    schema_version: int = SCHEMA_VERSION


class CallRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a call: the experience that predictors learn from. Holds no prompt, only its key and size.

    `policy`, `ahead`, `expected_s` and `kv_usage` are what was known when the last attempt was sent: who decided, how
    many calls the replica had already, what the policy expected it to cost there (None where it weighs no costs), and
    how full the replica's KV cache was by its own last word. `position` counts the calls of the workflow in order of
    arrival, from 1; 0 for a call without a workflow. `encoding` is the prompt as its `encoder` saw it, float16
    numbers that the text cannot be read from; predictors are trained again on it.
    """

    call_id: str
    tenant: str
    workflow_id: str
    workflow_kind: str
    node: str
    role: str
    kind: CallKind
    model: str
    state: CallState
    attempts: int
    replica_id: str | None
    device: str | None
    prompt_key: str
    prompt_bytes: int
    prompt_tokens: int
    work_done: float
    forecast_p50: float
    forecast_p90: float
    forecast_source: str
    ready_at_s: float
    dispatched_at_s: float | None
    first_token_at_s: float | None
    ended_at_s: float
    error: str | None = None
    policy: str = ""
    ahead: int | None = None
    expected_s: float | None = None
    kv_usage: float | None = None
    position: int = 0
    encoder: str = ""
    encoding: bytes = b""
    cached_tokens: int = 0
    forecast_version: str = ""
    work_limit: float | None = None
    schema_version: int = SCHEMA_VERSION


class Blob(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that belong into the blob store; outputs refer to them by `sha256`, 64 hex digits."""

    sha256: str
    media_type: str
    data: bytes


class Commit(msgspec.Struct, frozen=True, kw_only=True):
    """What belongs together about one workflow, written whole or not at all.

    It counts only if `epoch` still owns the workflow and `expected_seq` is the number of its events. `state` changes
    it (running, then cancelling, then terminal; never back) and `outcome` goes with a terminal one. `taken` are the
    inputs that became events; `calls` and `blobs` are what the answers behind the events left.
    """

    workflow_id: str
    epoch: int
    expected_seq: int
    at_s: float
    events: tuple[bytes, ...] = ()
    state: WorkflowState | None = None
    outcome: bytes | None = None
    taken: tuple[int, ...] = ()
    calls: tuple[CallRecord, ...] = ()
    blobs: tuple[Blob, ...] = ()


Committed = Literal["stored", "lost", "ended"]  # lost: somebody else owns the workflow, or wrote to it


class Input(msgspec.Struct, frozen=True, kw_only=True):
    """Something that was sent to a running workflow from outside, and waits for its owner."""

    number: int
    body: bytes
    at_s: float


class Idempotency(msgspec.Struct, frozen=True, kw_only=True):
    """A client's key for one request. `fingerprint` is the hash of what was asked for with it.

    It is a key of `tenant`, whoever's workflow the request is about; None: of the tenant of the workflow.
    """

    key: str
    fingerprint: str
    expires_at_s: float
    tenant: str | None = None


class Accepted(msgspec.Struct, frozen=True, kw_only=True):
    """The workflow that is in the store now; `replayed`: the key's first one, and nothing was written."""

    workflow_id: str
    replayed: bool = False


class Forgotten(msgspec.Struct, frozen=True, kw_only=True):
    """How much a store has forgotten; once that is nothing, there is nothing left to forget."""

    workflows: int = 0
    calls: int = 0
    decisions: int = 0

    def __bool__(self) -> bool:
        return self != Forgotten()


class ModelRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One call of a workflow node. `body` is the OpenAI request (chat completion or image generation).

    `request_id` names this attempt to the engine; `idempotency_key` is the same for every attempt at the same node.
    An `owned` call's record comes back with its result, for whoever keeps both in one write.

    For a tool, `model` is its pool, `role` its name, and `body` the `core.toolbox.ToolCall`. It may take `timeout_s`;
    one that is for `once` is sent to one replica only.
    """

    tenant: str
    workflow_id: str
    workflow_kind: str
    node: str
    role: str
    kind: CallKind
    model: str
    body: dict[str, Any]
    deadline_at_s: float | None = None
    priority: int = 0
    request_id: str = ""
    idempotency_key: str = ""
    owned: bool = False
    timeout_s: float | None = None
    once: bool = False


class ModelResult(msgspec.Struct, frozen=True, kw_only=True):
    """The answer (the replica's JSON) or what went wrong. Exactly one of `answer` and `failure` is set."""

    call_id: str
    replica_id: str | None
    attempts: int
    answer: dict[str, Any] | None = None
    failure: Failure | None = None
    record: CallRecord | None = None
