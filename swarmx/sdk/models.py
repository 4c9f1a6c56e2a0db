"""What the client returns. Times are Unix seconds; fields that a newer server adds are left out."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

State = Literal["running", "cancelling", "finished", "failed", "cancelled"]


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """One node of a workflow; `path` names it, as in `each[1].ask`. A null time: it has not come to that."""

    path: str
    kind: str
    state: str
    parent: str | None = None
    needs: list[str] = []
    role: str | None = None
    model: str | None = None
    ready_at_s: float | None = None
    started_at_s: float | None = None
    ended_at_s: float | None = None
    call_id: str | None = None
    attempt: int = 1
    not_before_s: float | None = None
    error: str | None = None


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one call. `work_done` and the forecasts are output tokens (images: denoising steps)."""

    call_id: str
    workflow_id: str
    node: str
    role: str
    kind: str
    model: str
    state: str
    attempts: int
    replica_id: str | None = None
    device: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    work_done: float = 0.0
    forecast_p50: float = 0.0
    forecast_p90: float = 0.0
    ready_at_s: float = 0.0
    dispatched_at_s: float | None = None
    first_token_at_s: float | None = None
    ended_at_s: float = 0.0
    policy: str = ""
    error: str | None = None


class Workflow(msgspec.Struct, frozen=True, kw_only=True):
    """One workflow with its nodes and calls. `outputs` once it has finished, `error` and `error_node` if it failed."""

    workflow_id: str
    state: State
    name: str
    kind: str
    created_at_s: float
    tenant: str = ""
    mode: str = "declared"
    deadline_at_s: float | None = None
    ended_at_s: float | None = None
    forked_from: str | None = None
    inputs: dict[str, Any] = {}
    outputs: Any = None
    error: str | None = None
    error_node: str | None = None
    nodes: list[Node] = []
    calls: list[Call] = []

    @property
    def ended(self) -> bool:
        """It is finished, failed or cancelled, and nothing about it changes any more."""
        return self.state not in ("running", "cancelling")


class WorkflowSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A workflow as it is listed; `outcome` is its outputs or its error."""

    workflow_id: str
    state: State
    name: str
    kind: str
    created_at_s: float
    tenant: str = ""
    mode: str = "declared"
    deadline_at_s: float | None = None
    ended_at_s: float | None = None
    forked_from: str | None = None
    outcome: Any = None


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """Workflows, newest first; `next_cursor` leads to the next page, None: this is the last."""

    workflows: list[WorkflowSummary]
    next_cursor: str | None = None


class WorkflowEvent(msgspec.Struct, frozen=True, kw_only=True):
    """The `seq`-th event of a workflow, counted from 1. `data` has the fields of its type."""

    seq: int
    at_s: float
    type: str
    data: dict[str, Any] = {}


class Explained(msgspec.Struct, frozen=True, kw_only=True):
    """One decision about a call: the sentences that explain it, and all that they were made of."""

    explanation: list[str]
    decision: dict[str, Any]
    instead: dict[str, Any] | None = None


class Why(msgspec.Struct, frozen=True, kw_only=True):
    """Each decision about a call, first to last."""

    call_id: str
    decisions: list[Explained]


class Begun(msgspec.Struct, frozen=True, kw_only=True):
    """A workflow that the server has on disk."""

    workflow_id: str
