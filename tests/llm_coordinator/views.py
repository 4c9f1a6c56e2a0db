"""Views of a small fleet to test with, and the real tools over the real policies."""

from __future__ import annotations

from typing import Any

from swarmx.agents.policies import POLICIES, describe, make_policy, parameters_of
from swarmx.agents.scaling import SCALING_POLICIES, describe_scaling, make_scaling_policy, scaling_parameters_of
from swarmx.core.control import (
    Actor,
    AlertSeen,
    ControlView,
    Diff,
    ModelStatus,
    PolicyStatus,
    Proposal,
    ProposalState,
    ReplicaStatus,
    ToolCall,
)
from swarmx.core.scaling import ScalePlan
from swarmx.llm_coordinator.prompt import schemas_of
from swarmx.llm_coordinator.snapshot import every_word
from swarmx.tools.catalogue import Catalogue, ParameterInfo, PolicyInfo
from swarmx.tools.registry import make_registry

NOW_S = 10_000.0
COORDINATOR = Actor(type="coordinator", name="coordinator", role="operator")
PERSON = Actor(type="key", name="ada", role="operator")


def _validate(kind: str, name: str, parameters: Any) -> None:
    (make_policy if kind == "routing" else make_scaling_policy)(name, parameters)


CATALOGUE = Catalogue(
    policies={
        "routing": {
            name: PolicyInfo(
                help=describe(name),
                parameters={key: ParameterInfo(default=value) for key, value in parameters_of(name).items()},
            )
            for name in POLICIES
        },
        "scaling": {
            name: PolicyInfo(
                help=describe_scaling(name),
                parameters={key: ParameterInfo(default=value) for key, value in scaling_parameters_of(name).items()},
            )
            for name in SCALING_POLICIES
        },
    },
    validate_policy=_validate,
    explain=lambda decision: [decision.policy],
)
REGISTRY = make_registry(CATALOGUE)
TOOLS = {name: tool for name, tool in REGISTRY.tools.items() if tool.effect != "read" or name == "no_op"}
SCHEMAS = schemas_of(TOOLS.values(), CATALOGUE)
WORDS = every_word(SCHEMAS)


def a_model(model: str, **changes: Any) -> ModelStatus:
    values: dict[str, Any] = {
        "model": model,
        "kind": "llm",
        "ready": 2,
        "starting": 0,
        "cordoned": 0,
        "draining": 0,
        "in_flight": 4,
        "waiting": 0,
        "window_s": 120.0,
        "arrivals_per_s": 1.5,
        "ended": 180,
        "failed": 9,
        "p50_s": 2.0,
        "p95_s": 7.5,
        "wait_p95_s": 0.4,
        "cost_rate": 2.0,
        "min_replicas": 1,
        "max_replicas": 2,
        "limit": 8,
        "wanted": 1.4,
        "start_s": 30.0,
    }
    return ModelStatus(**(values | changes))


def a_replica(replica_id: str, model: str, **changes: Any) -> ReplicaStatus:
    values: dict[str, Any] = {
        "replica_id": replica_id,
        "model": model,
        "kind": "llm",
        "device": "l40s",
        "url": "http://127.0.0.1:1",
        "provider": "emulated",
        "emulated": True,
        "state": "ready",
        "in_flight": 2,
        "calls": 90,
        "utilisation": 0.5,
        "running": 2,
        "waiting": 0,
        "kv_usage": 0.25,
        "signal_age_s": 0.5,
        "elastic": True,
    }
    return ReplicaStatus(**(values | changes))


def a_view(*models: ModelStatus, **changes: Any) -> ControlView:
    """Each model with its ready replicas, named MODEL-0, MODEL-1, ...; `coder` alone when none is given."""
    models = models or (a_model("coder"),)
    replicas = [a_replica(f"{m.model}-{number}", m.model) for m in models for number in range(m.ready)]
    values: dict[str, Any] = {
        "at_s": NOW_S,
        "window_s": 120.0,
        "models": {m.model: m for m in models},
        "replicas": {r.replica_id: r for r in replicas},
        "routing": PolicyStatus(policy="least_work", parameters={}),
        "scaling": PolicyStatus(policy="target_tracking", parameters=scaling_parameters_of("target_tracking")),
        "workflows_running": 3,
        "workflows_ended": 40,
        "workflow_p95_s": 21.5,
    }
    return ControlView(**(values | changes))


def an_alert(kind: Any, subject: str, *, ago_s: float = 5.0, value: float = 0.0) -> AlertSeen:
    return AlertSeen(at_s=NOW_S - ago_s, kind=kind, subject=subject, value=value)


def a_plan(model: str, *, ago_s: float, wanted: float) -> ScalePlan:
    return ScalePlan(
        model=model,
        at_s=NOW_S - ago_s,
        policy="target_tracking",
        parameters={},
        have=2.0,
        wanted=wanted,
        target=2,
        min_replicas=1,
        max_replicas=8,
        horizon_s=30.0,
        terms={},
        deploys=(),
        drains=(),
        reason="steady",
    )


def a_proposal(
    tool: str,
    state: ProposalState,
    *,
    ago_s: float = 60.0,
    proposal_id: str = "p1",
    actor: Actor = COORDINATOR,
    **arguments: Any,
) -> Proposal:
    return Proposal(
        proposal_id=proposal_id,
        at_s=NOW_S - ago_s,
        expires_at_s=NOW_S + 900.0,
        actor=actor,
        via="coordinator",
        call=ToolCall(tool=tool, arguments=arguments),
        diff=Diff(changes=()),
        state=state,
    )
