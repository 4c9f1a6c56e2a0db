"""Tools for one replica: drain it for good, or take it out of rotation and put it back."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

from swarmx.core.actions import Cordon, Drain
from swarmx.core.control import ControlView, Diff, Evidence, ToolCall
from swarmx.core.errors import Refused
from swarmx.tools import figures
from swarmx.tools.facts import changes, known_replica
from swarmx.tools.figures import Figures
from swarmx.tools.tool import STRICT, ControlTool, ReplicaId, Verification


class DrainReplica(BaseModel):
    """Arguments of drain_replica."""

    model_config = STRICT
    replica_id: ReplicaId
    deadline_s: Annotated[float, Field(ge=0.0, le=3600.0)] = 60.0
    force: bool = False


class CordonReplica(BaseModel):
    """Arguments of cordon_replica."""

    model_config = STRICT
    replica_id: ReplicaId
    cordoned: bool
    force: bool = False


def ready_besides(view: ControlView, replica_id: str) -> int:
    """How many other replicas of its model take calls."""
    model = view.replicas[replica_id].model
    return sum(row.model == model and row.state == "ready" for name, row in view.replicas.items() if name != replica_id)


def _check_drain(args: DrainReplica, view: ControlView) -> None:
    known_replica(view, args.replica_id)


def _diff_drain(args: DrainReplica, view: ControlView) -> Diff:
    return Diff(
        changes=changes(view, args.replica_id, [("state", "draining")]),
        predicted=(_ready(view, args.replica_id, 0),),
    )


def _apply_drain(args: DrainReplica, view: ControlView, now_s: float) -> tuple[Drain]:
    return (Drain(replica_id=args.replica_id, deadline_at_s=now_s + args.deadline_s),)


def _check_cordon(args: CordonReplica, view: ControlView) -> None:
    state = known_replica(view, args.replica_id).state
    if state not in ("ready", "cordoned"):
        raise Refused(
            f"{args.replica_id!r} is {state}; only a replica that is ready or cordoned can be cordoned or put back",
            rule="state",
        )


def _diff_cordon(args: CordonReplica, view: ControlView) -> Diff:
    return Diff(
        changes=changes(view, args.replica_id, [("state", "cordoned" if args.cordoned else "ready")]),
        predicted=(_ready(view, args.replica_id, 0 if args.cordoned else 1),),
    )


def _apply_cordon(args: CordonReplica, view: ControlView, now_s: float) -> tuple[Cordon]:
    return (Cordon(replica_id=args.replica_id, cordoned=args.cordoned),)


def _undo_cordon(args: CordonReplica, diff: Diff) -> ToolCall:
    return ToolCall(
        tool="cordon_replica", arguments={"replica_id": args.replica_id, "cordoned": not args.cordoned, "force": False}
    )


def _ready(view: ControlView, replica_id: str, own: int) -> Evidence:
    model = view.replicas[replica_id].model
    return Evidence(metric="ready", subject=model, value=ready_besides(view, replica_id) + own, unit="replicas")


def _verify(diff: Diff, before: Figures, after: Figures) -> Verification:
    back = all(change.after == "ready" for change in diff.changes)
    return (figures.after_growth if back else figures.after_shrinking)(before, after)


DRAIN_REPLICA = ControlTool(
    name="drain_replica",
    help="Send a replica no more calls, let it finish those it has until the deadline, then stop it for good.",
    arguments=DrainReplica,
    effect="irreversible",
    cooldown_s=300.0,
    per_hour=4,
    check=_check_drain,
    diff=_diff_drain,
    apply=_apply_drain,
    undo=lambda args, diff: None,
    verify=_verify,
    forced=lambda args: args.force,
)

CORDON_REPLICA = ControlTool(
    name="cordon_replica",
    help="Take a replica out of rotation (it finishes the calls that it has), or put it back.",
    arguments=CordonReplica,
    effect="reversible",
    cooldown_s=120.0,
    per_hour=6,
    check=_check_cordon,
    diff=_diff_cordon,
    apply=_apply_cordon,
    undo=_undo_cordon,
    verify=_verify,
    forced=lambda args: args.force,
)
