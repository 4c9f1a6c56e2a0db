"""What is kept: workflows, their events, calls; and what a model call asks for and comes back with."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from swarmx.core.nouns import CallKind

SCHEMA_VERSION = 1

WorkflowState = Literal["running", "cancelling", "finished", "failed", "cancelled"]
WorkflowMode = Literal["declared", "transparent"]
TERMINAL: frozenset[WorkflowState] = frozenset({"finished", "failed", "cancelled"})
CallState = Literal["finished", "failed", "cancelled", "refused"]


class WorkflowRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One workflow as it is listed; times are Unix seconds. `outcome` is its outputs or its error, JSON."""

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


class ModelRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One model call of a workflow node. `body` is the OpenAI request (chat completion or image generation)."""

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


class ModelResult(msgspec.Struct, frozen=True, kw_only=True):
    """The answer (the replica's JSON) or the refusal. Exactly one of `answer` and `error` is set."""

    call_id: str
    replica_id: str | None
    attempts: int
    answer: dict[str, Any] | None = None
    error: str | None = None
