"""From a view of everything to the situation of one turn: few lines, every name of the outside replaced by an alias."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from swarmx.core.control import AlertSeen, ControlView, ModelStatus, PolicyStatus, Proposal, ReplicaStatus
from swarmx.llm_coordinator.aliases import ELSEWHERE, Aliases, numbered
from swarmx.llm_coordinator.situation import AlertLine, ChangeLine, ModelSeen, ReplicaSeen, Situation, Trigger

MOST_MODELS = 12
MOST_REPLICAS = 24
MOST_ALERTS = 8
MOST_CHANGES = 6

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,23}")


def snapshot(view: ControlView, trigger: Trigger, words: Collection[str]) -> tuple[Situation, Aliases]:
    """The situation, and what its aliases stand for.

    `words` are the words of our own that may be shown: tools, their arguments, policies, parameters.
    """
    alerts = view.alerts[-MOST_ALERTS:]
    alerted = {alert.subject for alert in alerts}
    models = sorted(view.models.values(), key=lambda m: _model_order(m, alerted))[:MOST_MODELS]
    seen = {model.model for model in models}
    present = [r for r in view.replicas.values() if r.model in seen and r.state != "gone"]
    replicas = sorted(present, key=lambda r: _replica_order(r, alerted))[:MOST_REPLICAS]
    changes = [p for p in view.proposals if p.actor.type == "coordinator"][-MOST_CHANGES:]
    aliases = Aliases(
        model=numbered("m", (m.model for m in models)),
        replica=numbered("r", (r.replica_id for r in replicas)),
        proposal=numbered("c", (p.proposal_id for p in changes)),
    )
    situation = Situation(
        at_s=view.at_s,
        trigger=trigger,
        window_s=view.window_s,
        workflows_running=view.workflows_running,
        workflows_ended=view.workflows_ended,
        workflow_p95_s=view.workflow_p95_s,
        routing=_policy(view.routing, words),
        scaling=_policy(view.scaling, words),
        models=tuple(_model(m, aliases) for m in models),
        replicas=tuple(_replica(r, aliases) for r in replicas),
        alerts=tuple(_alert(a, aliases, words, view.at_s) for a in alerts),
        changes=tuple(_change(p, aliases, words, view.at_s) for p in changes),
    )
    return situation, aliases


def _model_order(model: ModelStatus, alerted: Collection[str]) -> tuple[bool, int, float]:
    return model.model not in alerted, -(model.waiting + model.in_flight), -model.arrivals_per_s


def _replica_order(replica: ReplicaStatus, alerted: Collection[str]) -> tuple[bool, bool, int, float]:
    calm = replica.replica_id not in alerted
    return calm, replica.state == "ready", -replica.in_flight, -(replica.kv_usage or 0.0)


def _policy(status: PolicyStatus, words: Collection[str]) -> PolicyStatus:
    known = {name: value for name, value in status.parameters.items() if name in words}
    return PolicyStatus(policy=_word(status.policy, words), parameters=known)


def _word(text: str, words: Collection[str]) -> str:
    return text if text in words else ELSEWHERE


def _model(model: ModelStatus, aliases: Aliases) -> ModelSeen:
    return ModelSeen(
        alias=aliases.of("model", model.model),
        kind=model.kind,
        ready=model.ready,
        starting=model.starting,
        out_of_rotation=model.draining + model.cordoned,
        in_flight=model.in_flight,
        waiting=model.waiting,
        arrivals_per_s=model.arrivals_per_s,
        failure_share=model.failed / model.ended if model.ended else 0.0,
        p50_s=model.p50_s,
        p95_s=model.p95_s,
        wait_p95_s=model.wait_p95_s,
        cost_rate=model.cost_rate,
        min_replicas=model.min_replicas,
        max_replicas=model.max_replicas,
        limit=model.limit,
        wanted=model.wanted,
    )


def _replica(replica: ReplicaStatus, aliases: Aliases) -> ReplicaSeen:
    return ReplicaSeen(
        alias=aliases.of("replica", replica.replica_id),
        model=aliases.of("model", replica.model),
        state=replica.state,
        device=replica.device if _WORD.fullmatch(replica.device) else ELSEWHERE,
        in_flight=replica.in_flight,
        kv_usage=replica.kv_usage,
    )


def _alert(alert: AlertSeen, aliases: Aliases, words: Collection[str], now_s: float) -> AlertLine:
    match alert.kind:
        case "policy_failed":
            subject = _word(alert.subject, words)
        case "at_max":
            subject = aliases.of("model", alert.subject)
        case "breaker_opened" | "breaker_closed" | "replica_failed":
            subject = aliases.of("replica", alert.subject)
    return AlertLine(kind=alert.kind, subject=subject, value=alert.value, ago_s=max(0.0, now_s - alert.at_s))


def _change(proposal: Proposal, aliases: Aliases, words: Collection[str], now_s: float) -> ChangeLine:
    return ChangeLine(
        alias=aliases.of("proposal", proposal.proposal_id),
        tool=_word(proposal.call.tool, words),
        arguments=aliases.shown(proposal.call.arguments, words),
        state=proposal.state,
        ago_s=max(0.0, now_s - proposal.at_s),
        objective_before=proposal.objective_before,
        objective_after=proposal.objective_after,
    )


def every_word(schemas: Sequence[dict[str, object]]) -> frozenset[str]:
    """Every name and enum value in the schemas of the tools: the words of our own."""
    found: set[str] = set()

    def walk(node: object) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                if key == "properties" and isinstance(value, dict):
                    found.update(value)
                elif key in ("name", "const") and isinstance(value, str):
                    found.add(value)
                elif key == "enum" and isinstance(value, list | tuple):
                    found.update(item for item in value if isinstance(item, str))
                walk(value)
        elif isinstance(node, list | tuple):
            for item in node:
                walk(item)

    walk(schemas)
    return frozenset(found)
