"""What the REST API answers with, as types: the API's own description is made of them."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from swarmx.core.audit import AuditRecord, Report
from swarmx.core.control import (
    AlertSeen,
    Diff,
    Effect,
    Episode,
    Evidence,
    ModelStatus,
    PolicyStatus,
    Proposal,
    ReplicaStatus,
    Role,
    Verdict,
)
from swarmx.core.nouns import Decision
from swarmx.core.records import CallRecord, WorkflowRecord, WorkflowState
from swarmx.core.scaling import ScalePlan
from swarmx.neural.structure_live import Remaining


class _Shown(msgspec.Struct, frozen=True, kw_only=True):
    pass


def _without(kind: type[msgspec.Struct], *names: str, **instead: Any) -> list[Any]:
    """The fields of a struct as they are shown: without these, and others with another type; none is left out."""
    return [
        (field.name, instead.get(field.name, field.type))
        for field in msgspec.structs.fields(kind)
        if field.name not in names
    ]


Call = msgspec.defstruct("CallShown", _without(CallRecord, "encoding"), kw_only=True)
"""What became of a call."""

WorkflowSummary = msgspec.defstruct("WorkflowSummary", _without(WorkflowRecord, "owner", outcome=Any), kw_only=True)
"""A workflow as it is listed; `outcome` is its outputs or its error."""


class Problem(_Shown, frozen=True, kw_only=True):
    """What went wrong (RFC 9457). `where` names the field or node at fault, `rule` the rule that refused."""

    type: str
    title: str
    status: int
    detail: str
    where: str | msgspec.UnsetType = msgspec.UNSET
    rule: str | msgspec.UnsetType = msgspec.UNSET
    param: str | msgspec.UnsetType = msgspec.UNSET


class OpenAIErrorDetail(_Shown, frozen=True, kw_only=True):
    """As clients of that API expect it."""

    message: str
    type: str
    param: str | None
    code: str | int | None


class OpenAIError(_Shown, frozen=True, kw_only=True):
    """What went wrong, on /v1."""

    error: OpenAIErrorDetail


class AcceptedWorkflow(_Shown, frozen=True, kw_only=True):
    """It is on disk and runs; `Location` is where it is shown."""

    workflow_id: str
    state: Literal["running"]


class SignalTaken(_Shown, frozen=True, kw_only=True):
    """The signal is on disk; `repeated`: it had come before with the same key."""

    workflow_id: str
    signal: str
    repeated: bool


class WorkflowPageShown(_Shown, frozen=True, kw_only=True):
    """Newest first; `next_cursor` leads to the next page if there is one."""

    workflows: list[WorkflowSummary]  # type: ignore[valid-type]  # made of the record's fields
    has_more: bool
    next_cursor: str | None


class SpentShown(_Shown, frozen=True, kw_only=True):
    """What calls used up: attempts at them, tokens, money by the prices of then, seconds of replicas."""

    steps: int
    prompt_tokens: int
    output_tokens: int
    money: float
    replica_s: float


class BudgetShown(_Shown, frozen=True, kw_only=True):
    """What may be used up; null is not bounded."""

    tokens: int | None
    steps: int | None
    money: float | None
    replica_s: float | None


class SignalShown(_Shown, frozen=True, kw_only=True):
    """A signal that the workflow declares; one that is awaited is given up at `timeout_at_s`."""

    name: str
    state: Literal["unused", "awaited", "received", "defaulted"]
    timeout_at_s: float | None
    value: Any


class Node(_Shown, frozen=True, kw_only=True):
    """One node of a workflow. Times are Unix seconds, null for what has not happened."""

    path: str
    parent: str | None
    kind: str
    state: str
    needs: list[str]
    role: str | None
    model: str | None
    ready_at_s: float | None
    started_at_s: float | None
    ended_at_s: float | None
    call_id: str | None
    attempt: int
    not_before_s: float | None
    awaits: list[str]
    error: str | None
    spent: SpentShown | None
    budget: BudgetShown | None


class Program(_Shown, frozen=True, kw_only=True):
    """What was seen of a workflow that is known from headers."""

    source: str | None
    parent_id: str | None
    subagents: list[str]
    tools: dict[str, int]
    gaps_s: float
    ended_by: str | None


class Workflow(_Shown, frozen=True, kw_only=True):
    """One workflow with its nodes and calls; `outputs` once it has finished, `error` and `error_node` if it failed."""

    workflow_id: str
    tenant: str
    mode: str
    kind: str
    name: str
    state: WorkflowState
    created_at_s: float
    deadline_at_s: float | None
    ended_at_s: float | None
    forked_from: str | None
    outputs: Any
    error: str | None
    error_node: str | None
    inputs: dict[str, Any]
    spent: SpentShown | None
    budget: BudgetShown | None
    signals: list[SignalShown]
    nodes: list[Node]
    calls: list[Call]  # type: ignore[valid-type]  # made of the record's fields
    remaining: Remaining | None
    program: Program | None


class EventShown(_Shown, frozen=True, kw_only=True):
    """The `seq`-th event of a workflow, with the fields of its type beside these."""

    seq: int
    at_s: float
    type: str


class EventPage(_Shown, frozen=True, kw_only=True):
    """Oldest first; `next_after` is the `after` of the next page."""

    events: list[EventShown]
    has_more: bool
    next_after: int


class Instead(_Shown, frozen=True, kw_only=True):
    """What another policy would have done."""

    policy: str
    explanation: list[str]


class ExplainedDecision(_Shown, frozen=True, kw_only=True):
    """A decision with the sentences that explain it."""

    explanation: list[str]
    decision: Decision
    instead: Instead | msgspec.UnsetType = msgspec.UNSET


class Why(_Shown, frozen=True, kw_only=True):
    """Each decision about the call, first to last."""

    call_id: str
    decisions: list[ExplainedDecision]


class ReplicaList(_Shown, frozen=True, kw_only=True):
    """All replicas."""

    replicas: list[ReplicaStatus]


class ServiceCurve(_Shown, frozen=True, kw_only=True):
    """`completion_s` has the shape [work][uncached][levels], `ttft_s` [uncached][levels], in seconds."""

    replica_id: str
    measured_at_s: float
    age_s: float
    version: str
    levels: list[float]
    work: list[float]
    uncached: list[float]
    ttft_s: list[list[float]]
    completion_s: list[list[list[float]]]


class PolicyShown(_Shown, frozen=True, kw_only=True):
    """A policy that could be in force, with the defaults of its parameters."""

    name: str
    description: str
    parameters: dict[str, float]


class PolicyList(_Shown, frozen=True, kw_only=True):
    """The routing policies; `ETag` stands for the active one."""

    active: PolicyStatus
    policies: list[PolicyShown]


class ConsoleError(_Shown, frozen=True, kw_only=True):
    """Why there is no answer."""

    detail: str
    rule: str


class ConsoleAnswer(_Shown, frozen=True, kw_only=True):
    """A whole answer of the console."""

    text: list[str]
    evidence: list[Evidence]
    proposal: Proposal | None
    error: ConsoleError | None


class ToolShown(_Shown, frozen=True, kw_only=True):
    """A tool of operators; `schema` is how a language model is told of it."""

    name: str
    help: str
    effect: Effect
    role: Role
    arguments: dict[str, Any]
    schema: dict[str, Any]
    cooldown_s: float | msgspec.UnsetType = msgspec.UNSET
    per_hour: int | msgspec.UnsetType | None = msgspec.UNSET


class ToolList(_Shown, frozen=True, kw_only=True):
    """All tools of operators."""

    tools: list[ToolShown]


class ToolResult(_Shown, frozen=True, kw_only=True):
    """What a reading tool saw."""

    result: dict[str, Any]


class DryRun(_Shown, frozen=True, kw_only=True):
    """Whether the change would be allowed, and what it would change; `ETag` stands for that."""

    verdict: Verdict
    diff: Diff


class ProposalList(_Shown, frozen=True, kw_only=True):
    """Newest first."""

    proposals: list[Proposal]
    has_more: bool
    next_cursor: str | None


class AuditPage(_Shown, frozen=True, kw_only=True):
    """Oldest first; the page before has `before` set to the number of the first record."""

    records: list[AuditRecord]
    has_more: bool


class AuditCheck(_Shown, frozen=True, kw_only=True):
    """Whether the log is as it was written."""

    sound: bool
    report: Report


class Scaling(_Shown, frozen=True, kw_only=True):
    """The scaling policy with its bounds and last plans, oldest first."""

    active: PolicyStatus
    models: list[ModelStatus]
    plans: list[ScalePlan]
    alerts: list[AlertSeen]


class EpisodeList(_Shown, frozen=True, kw_only=True):
    """Newest first."""

    episodes: list[Episode]
    has_more: bool
    next_cursor: str | None


class Alive(_Shown, frozen=True, kw_only=True):
    """The process answers."""

    status: Literal["ok"]


class Ready(_Shown, frozen=True, kw_only=True):
    """How many replicas are in rotation."""

    ready_replicas: int


class ModelRow(_Shown, frozen=True, kw_only=True):
    """A model as OpenAI's API lists it."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(_Shown, frozen=True, kw_only=True):
    """Models that some replica serves."""

    object: Literal["list"]
    data: list[ModelRow]
