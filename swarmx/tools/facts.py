"""The facts that tools change, by subject and name: how to read one, how to tell what would change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from swarmx.core.control import Change, ControlView, Diff, Evidence, ModelStatus, ReplicaStatus, Scalar
from swarmx.core.errors import Refused
from swarmx.core.words import near

FLEET = "fleet"  # the subject of figures that are about all models together


def replicas_of(model: ModelStatus) -> int:
    """What bounds and requests count: replicas that take calls, or will."""
    return model.ready + model.starting


def present(view: ControlView, subject: str, what: str) -> Scalar | None:
    """The fact as it is now; None where there is no such thing.

    Of a model: `replicas`, `min_replicas`, `max_replicas`. Of a replica: `state`. Of `routing` and `scaling`: `policy`,
    and `POLICY.PARAMETER`, which is None while another policy is in force.
    """
    match what:
        case "replicas":
            return replicas_of(view.models[subject]) if subject in view.models else None
        case "min_replicas":
            return view.models[subject].min_replicas if subject in view.models else None
        case "max_replicas":
            return view.models[subject].max_replicas if subject in view.models else None
        case "state":
            return view.replicas[subject].state if subject in view.replicas else None
    status = view.routing if subject == "routing" else view.scaling
    if what == "policy":
        return status.policy
    policy, _, parameter = what.partition(".")
    return status.parameters.get(parameter) if policy == status.policy else None


def changes(view: ControlView, subject: str, wanted: Iterable[tuple[str, Scalar | None]]) -> tuple[Change, ...]:
    """Those of the wanted facts that are not so yet."""
    lines = (
        Change(subject=subject, what=what, before=present(view, subject, what), after=after) for what, after in wanted
    )
    return tuple(line for line in lines if line.before != line.after)


def in_force(made: Sequence[Change], view: ControlView) -> bool:
    """Whether everything still is as these changes made it. What was drained may be gone by now."""
    return all(_holds(change, present(view, change.subject, change.what)) for change in made)


def _holds(change: Change, now: Scalar | None) -> bool:
    if change.after == "draining":
        return now not in ("ready", "starting")
    return now == change.after


def touched(diff: Diff) -> frozenset[str]:
    """Everything that the diff is about: what changes, and the models that feel it."""
    return frozenset(change.subject for change in diff.changes) | frozenset(
        evidence.subject for evidence in diff.predicted if evidence.subject != FLEET
    )


def cost_rate(view: ControlView) -> float:
    """Device weights of all replicas together."""
    return sum(model.cost_rate for model in view.models.values())


def cost_after(view: ControlView, model: ModelStatus, replicas: int) -> Evidence:
    """The cost of the fleet with that many replicas of the model, if each more or less is like the next to start."""
    weight = 1.0 if model.next_cost is None else model.next_cost
    value = cost_rate(view) + weight * (replicas - replicas_of(model))
    return Evidence(metric="cost_rate", subject=FLEET, value=round(value, 6), unit="L40S")


def known_model(view: ControlView, name: str) -> ModelStatus:
    """Raises Refused for a model that is not there."""
    if name not in view.models:
        raise Refused(
            f"there is no model {name!r}; there are {listed(view.models)}.{near(name, view.models)}",
            rule="unknown_target",
        )
    return view.models[name]


def known_replica(view: ControlView, replica_id: str) -> ReplicaStatus:
    """Raises Refused for a replica that is not there, or not any more."""
    replica = view.replicas.get(replica_id)
    if replica is None or replica.state == "gone":
        there = [name for name, row in view.replicas.items() if row.state != "gone"]
        gone = "is gone" if replica is not None else "is unknown"
        raise Refused(
            f"the replica {replica_id!r} {gone}; there are {listed(there)}.{near(replica_id, there)}",
            rule="unknown_target",
        )
    return replica


def listed(names: Iterable[str]) -> str:
    """The names in a sentence, at most ten of them."""
    known = sorted(names)
    more = f" and {len(known) - 10} more" if len(known) > 10 else ""
    return (", ".join(known[:10]) or "none") + more
