"""What the coordinator sees in one turn, in numbers and aliases, and the vector that stands for it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Literal, get_args

import msgspec

from swarmx.core.control import Facts, PolicyStatus, ProposalState, Scalar
from swarmx.core.messages import AlertKind
from swarmx.core.nouns import CallKind, ReplicaState

Trigger = Literal["timer"] | AlertKind
# Stored vectors have a number for each of these; alerts about predictors wake no coordinator, and have none.
TRIGGERS: tuple[Trigger, ...] = ("timer", *get_args(AlertKind)[:5])


class ModelSeen(msgspec.Struct, frozen=True, kw_only=True):
    """One model; the fields are those of `ModelStatus`, `failure_share` is a fraction of the calls that ended."""

    alias: str
    kind: CallKind
    ready: int
    starting: int
    out_of_rotation: int
    in_flight: int
    waiting: int
    arrivals_per_s: float
    failure_share: float
    p50_s: float | None
    p95_s: float | None
    wait_p95_s: float | None
    cost_rate: float
    min_replicas: int | None
    max_replicas: int | None
    limit: int | None
    wanted: float | None


class ReplicaSeen(msgspec.Struct, frozen=True, kw_only=True):
    """One replica; `device` is the word of the operator's settings."""

    alias: str
    model: str
    state: ReplicaState
    device: str
    in_flight: int
    kv_usage: float | None


class AlertLine(msgspec.Struct, frozen=True, kw_only=True):
    """An alert, `ago_s` seconds old; `subject` is an alias, the word of a policy, or `another`."""

    kind: AlertKind
    subject: str
    value: float
    ago_s: float


class ChangeLine(msgspec.Struct, frozen=True, kw_only=True):
    """A change that the coordinator proposed, and what became of it."""

    alias: str
    tool: str
    arguments: dict[str, Scalar]
    state: ProposalState
    ago_s: float
    objective_before: float | None
    objective_after: float | None


class Situation(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers, words of our own and aliases; never a text that came from outside.

    Models with a recent alert come first, then the most loaded; so do replicas, those out of rotation before others.
    """

    at_s: float
    trigger: Trigger
    window_s: float
    workflows_running: int
    workflows_ended: int
    workflow_p95_s: float | None
    routing: PolicyStatus
    scaling: PolicyStatus
    models: tuple[ModelSeen, ...]
    replicas: tuple[ReplicaSeen, ...]
    alerts: tuple[AlertLine, ...]
    changes: tuple[ChangeLine, ...]


# The features of `embed` in order, each with the value at which it reads 1.0; all grow with the logarithm.
_SCALES: tuple[tuple[str, float], ...] = (
    ("models", 8.0),
    ("ready", 16.0),
    ("starting", 4.0),
    ("out_of_rotation", 4.0),
    ("in_flight", 100.0),
    ("waiting", 50.0),
    ("arrivals_per_s", 20.0),
    ("workflows_running", 50.0),
    ("workflow_p95_s", 60.0),
    ("worst_in_flight_per_ready", 16.0),
    ("worst_p50_s", 30.0),
    ("worst_p95_s", 60.0),
    ("worst_wait_p95_s", 30.0),
    ("worst_failure_share", 0.2),
    ("worst_wanted_of_max", 2.0),
    ("widest_spare_replicas", 8.0),
    ("most_room_to_limit", 8.0),
    ("models_at_max", 4.0),
    ("cost_rate", 16.0),
    ("mean_kv_usage", 1.0),
    ("worst_kv_usage", 1.0),
    ("worst_imbalance", 16.0),
    ("breaker_opened_alerts", 4.0),
    ("policy_failed_alerts", 4.0),
    ("at_max_alerts", 4.0),
)
DIMENSION = len(TRIGGERS) + len(_SCALES)


def embed(situation: Situation) -> tuple[float, ...]:
    """The situation as a vector of length one, shape [DIMENSION]: the trigger (one of N), then `_SCALES`.

    Sums, means and extremes over models and replicas: it does not depend on their names or order.
    """
    values = _features(situation)
    trigger = [1.0 if situation.trigger == one else 0.0 for one in TRIGGERS]
    scaled = [_scaled(values[name], scale) for name, scale in _SCALES]
    vector = [*trigger, *scaled]
    length = math.sqrt(sum(x * x for x in vector))
    return tuple(x / length for x in vector)


def _scaled(value: float, scale: float) -> float:
    return math.log1p(max(0.0, value)) / math.log1p(scale) if math.isfinite(value) else 0.0


def _features(situation: Situation) -> dict[str, float]:
    models, replicas = situation.models, situation.replicas
    bounded = [m for m in models if m.max_replicas is not None]
    usages = [r.kv_usage for r in replicas if r.kv_usage is not None]
    loads: dict[str, list[int]] = {}
    for replica in replicas:
        if replica.state == "ready":
            loads.setdefault(replica.model, []).append(replica.in_flight)
    alerts = Counter(alert.kind for alert in situation.alerts)
    return {
        "models": len(models),
        "ready": sum(m.ready for m in models),
        "starting": sum(m.starting for m in models),
        "out_of_rotation": sum(m.out_of_rotation for m in models),
        "in_flight": sum(m.in_flight for m in models),
        "waiting": sum(m.waiting for m in models),
        "arrivals_per_s": sum(m.arrivals_per_s for m in models),
        "workflows_running": situation.workflows_running,
        "workflow_p95_s": situation.workflow_p95_s or 0.0,
        "worst_in_flight_per_ready": _most(m.in_flight / max(1, m.ready) for m in models),
        "worst_p50_s": _most(m.p50_s or 0.0 for m in models),
        "worst_p95_s": _most(m.p95_s or 0.0 for m in models),
        "worst_wait_p95_s": _most(m.wait_p95_s or 0.0 for m in models),
        "worst_failure_share": _most(m.failure_share for m in models),
        "worst_wanted_of_max": _most((m.wanted or 0.0) / max(1, m.max_replicas or 0) for m in bounded),
        "widest_spare_replicas": _most((m.max_replicas or 0) - (m.wanted or 0.0) for m in bounded),
        "most_room_to_limit": _most((m.limit or 0) - (m.max_replicas or 0) for m in bounded),
        "models_at_max": sum(m.ready + m.starting >= (m.max_replicas or 0) for m in bounded),
        "cost_rate": sum(m.cost_rate for m in models),
        "mean_kv_usage": sum(usages) / len(usages) if usages else 0.0,
        "worst_kv_usage": _most(usages),
        "worst_imbalance": _most(max(load) - min(load) for load in loads.values()),
        "breaker_opened_alerts": alerts["breaker_opened"],
        "policy_failed_alerts": alerts["policy_failed"],
        "at_max_alerts": alerts["at_max"],
    }


def _most(values: Iterable[float]) -> float:
    return max(values, default=0.0)


def facts(situation: Situation) -> Facts:
    """What the vector memory keeps beside the vector: numbers and the trigger."""
    models = situation.models
    kept: Facts = {
        "at_s": situation.at_s,
        "trigger": situation.trigger,
        "models": len(models),
        "ready": sum(m.ready for m in models),
        "in_flight": sum(m.in_flight for m in models),
        "waiting": sum(m.waiting for m in models),
        "arrivals_per_s": sum(m.arrivals_per_s for m in models),
        "cost_rate": sum(m.cost_rate for m in models),
    }
    if situation.workflow_p95_s is not None:
        kept["workflow_p95_s"] = situation.workflow_p95_s
    return kept
