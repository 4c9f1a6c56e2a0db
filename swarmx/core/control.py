"""The nouns of the control plane: who wants which tool used, what that would change, what became of it.

Everything that people, the console, the coordinator and the scaler do to a running SwarmX is told in these values.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from swarmx.core.messages import AlertKind
from swarmx.core.nouns import CallKind, Decision, ReplicaState
from swarmx.core.scaling import ScalePlan

Effect = Literal["read", "reversible", "irreversible"]
Mode = Literal["observe", "suggest", "review", "auto"]
Role = Literal["client", "viewer", "operator", "admin"]
Via = Literal["rest", "cli", "console", "web", "coordinator", "agent", "start"]
Scalar = float | int | str | bool
Facts = dict[str, Scalar]
ProposalState = Literal[
    "suggested",  # the mode allows no more than saying it
    "open",  # waits for approve or deny
    "applied",  # in force, not verified yet
    "kept",  # in force, and the figures did not get worse
    "rolled_back",
    "denied",
    "expired",  # nobody decided in time
    "stale",  # what it would change is no longer as it was when it was proposed
    "failed",
]


class Actor(msgspec.Struct, frozen=True, kw_only=True):
    """Who acts: a person or program behind a key, the coordinator, an agent, or SwarmX itself at its start."""

    type: Literal["key", "coordinator", "agent", "system"]
    name: str
    role: Role


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """One tool with its arguments, already validated."""

    tool: str
    arguments: dict[str, Any]


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a diff: `what` of `subject` goes from `before` to `after`."""

    subject: str
    what: str
    before: Scalar | None
    after: Scalar | None


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """One number behind a statement: which metric of what, over which window (None: now)."""

    metric: str
    subject: str
    value: Scalar | None
    unit: str = ""
    window_s: float | None = None


class Diff(msgspec.Struct, frozen=True, kw_only=True):
    """What a tool call would change, and the effect that is expected of it. Empty: it would change nothing."""

    changes: tuple[Change, ...]
    predicted: tuple[Evidence, ...] = ()


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The guard's answer; `rule` names the rule that decided."""

    allowed: bool
    rule: str
    detail: str = ""


class Proposal(msgspec.Struct, frozen=True, kw_only=True):
    """A tool call on its way: asked for, decided, applied, verified. Times are Unix seconds.

    `reason` is the asker's own words (a person's, the rules', or a model's: untrusted, cut to 400 characters).
    `objective_before` is the figure that the verification compares with, in its own unit.
    """

    proposal_id: str
    at_s: float
    expires_at_s: float
    actor: Actor
    via: Via
    call: ToolCall
    diff: Diff
    state: ProposalState
    reason: str = ""
    evidence: tuple[Evidence, ...] = ()
    episode_ids: tuple[str, ...] = ()
    decided_by: Actor | None = None
    decided_at_s: float | None = None
    applied_at_s: float | None = None
    verified_at_s: float | None = None
    objective_before: float | None = None
    objective_after: float | None = None
    rollback_of: str | None = None
    detail: str = ""


class Episode(msgspec.Struct, frozen=True, kw_only=True):
    """One turn of the coordinator, as it is remembered: the situation in numbers, what was done, how it ended.

    `vector` embeds the situation, shape [llm_coordinator.situation.DIMENSION]. Nothing in it is a tenant's text.
    """

    episode_id: str
    at_s: float
    trigger: str
    source: Literal["model", "rules"]
    facts: Facts
    vector: tuple[float, ...]
    call: ToolCall
    reason: str
    proposal_id: str | None
    outcome: str = "pending"
    objective_before: float | None = None
    objective_after: float | None = None


class CurveStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A replica's service curve in short: the completion time of a call with `work` output tokens (megapixel-steps) and
    `uncached` prompt tokens, if it came now; said `age_s` ago by the predictor `version`."""

    age_s: float
    version: str
    work: float
    uncached: float
    p50_s: float
    p90_s: float


class ReplicaStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the list of replicas. `utilisation` is the share of the time since it was first
    seen with a call in flight; `elastic` tells whether SwarmX itself can start and stop it."""

    replica_id: str
    model: str
    kind: str
    device: str
    url: str
    provider: str
    emulated: bool
    state: ReplicaState
    in_flight: int
    calls: int
    utilisation: float
    running: int | None
    waiting: int | None
    kv_usage: float | None
    signal_age_s: float | None
    elastic: bool = False
    service_curve: CurveStatus | None = None


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One model: its replicas, its load now, and how its calls fared over the last `window_s`, shorter for a new model.

    Latencies are those of calls that finished, None while none did; bounds are None for a model that cannot be scaled
    here. `cost_rate` is the sum of the device weights of its replicas (1.0 is one L40S), `next_cost` the weight of the
    replica that would be started next.
    """

    model: str
    kind: CallKind
    ready: int
    starting: int
    cordoned: int
    draining: int
    in_flight: int
    waiting: int
    window_s: float
    arrivals_per_s: float
    ended: int
    failed: int
    p50_s: float | None
    p95_s: float | None
    wait_p95_s: float | None
    cost_rate: float
    min_replicas: int | None = None
    max_replicas: int | None = None
    limit: int | None = None
    wanted: float | None = None
    start_s: float | None = None
    next_cost: float | None = None


class PolicyStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A policy in force."""

    policy: str
    parameters: dict[str, float]


class CoordinatorStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Who thinks for the coordinator, whether there is a model that can be asked now, and what it may do.

    After a row of failures it only observes, whatever the modes say, until `observes_until_s` (Unix seconds).
    """

    engine: Literal["off", "rules", "openai", "vllm"]
    model: str | None
    is_up: bool
    mode: Mode
    modes: dict[str, Mode]
    observes_until_s: float | None


class AlertSeen(msgspec.Struct, frozen=True, kw_only=True):
    """An alert, and when it was raised."""

    at_s: float
    kind: AlertKind
    subject: str
    value: float


class ControlView(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that tools, guard, coordinator and console may look at: a snapshot of plain values.

    `workflow_p95_s` is over the workflows that finished or failed in the last `window_s`. `decisions` holds those about
    the calls that were asked for; alerts, plans and proposals are the last ones, oldest first, with
    all proposals that are open.
    """

    at_s: float
    window_s: float
    models: dict[str, ModelStatus]
    replicas: dict[str, ReplicaStatus]
    routing: PolicyStatus
    scaling: PolicyStatus
    workflows_running: int
    workflows_ended: int
    workflow_p95_s: float | None
    alerts: tuple[AlertSeen, ...] = ()
    plans: tuple[ScalePlan, ...] = ()
    proposals: tuple[Proposal, ...] = ()
    decisions: dict[str, tuple[Decision, ...]] = {}


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """What a language model is asked: chat messages, and the tools that it may call (OpenAI's shape)."""

    system: str
    user: str
    tools: tuple[dict[str, Any], ...]
    max_tokens: int


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """What came back. `error` says why there is nothing to use; `tool` and `arguments` (JSON text) are as sent."""

    tool: str | None = None
    arguments: str = ""
    text: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    seconds: float = 0.0
    error: Literal["unreachable", "late", "refused", "too_long", "not_a_reply"] | None = None
    detail: str = ""
