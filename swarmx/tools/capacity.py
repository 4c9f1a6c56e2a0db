"""Tools for how many replicas a model has: one number now, and the bounds that the scaler keeps."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field, model_validator

from swarmx.core.control import ControlView, Diff, Evidence, ModelStatus, Scalar, ToolCall
from swarmx.core.errors import Refused
from swarmx.core.messages import BoundsChanged, ScaleRequested
from swarmx.tools import figures
from swarmx.tools.facts import changes, cost_after, known_model, replicas_of
from swarmx.tools.figures import Figures
from swarmx.tools.tool import STRICT, ControlTool, ModelName, Verification

Count = Annotated[int, Field(ge=0, le=1000)]


class ScaleModel(BaseModel):
    """Arguments of scale_model."""

    model_config = STRICT
    model: ModelName
    replicas: Count
    hold_s: Annotated[float, Field(ge=10.0, le=3600.0)] = 300.0


class SetReplicaBounds(BaseModel):
    """Arguments of set_replica_bounds."""

    model_config = STRICT
    model: ModelName
    min_replicas: Count
    max_replicas: Count

    @model_validator(mode="after")
    def _ordered(self) -> SetReplicaBounds:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas is {self.min_replicas}, above max_replicas, which is {self.max_replicas}")
        return self


def _elastic(view: ControlView, name: str) -> tuple[ModelStatus, int]:
    """The model, and the most replicas that it can have. Raises Refused."""
    model = known_model(view, name)
    if model.limit is None:
        raise Refused(
            f"{name!r} has no group of replicas on demand, so none can be started or stopped; "
            "add a group to the settings",
            rule="not_elastic",
        )
    return model, model.limit


def _check_scale(args: ScaleModel, view: ControlView) -> None:
    model, limit = _elastic(view, args.model)
    low = 0 if model.min_replicas is None else model.min_replicas
    high = limit if model.max_replicas is None else min(model.max_replicas, limit)
    if not low <= args.replicas <= high:
        raise Refused(
            f"{args.replicas} replicas of {args.model!r} were asked for, its bounds are {low} to {high}; "
            "move them first with set_replica_bounds",
            rule="bounds",
        )


def _diff_scale(args: ScaleModel, view: ControlView) -> Diff:
    model = view.models[args.model]
    predicted = [cost_after(view, model, args.replicas), _load(model, args.replicas)]
    if args.replicas > replicas_of(model) and model.start_s is not None:
        predicted.append(Evidence(metric="ready_in_s", subject=args.model, value=model.start_s, unit="s"))
    return Diff(changes=changes(view, args.model, [("replicas", args.replicas)]), predicted=tuple(predicted))


def _load(model: ModelStatus, replicas: int) -> Evidence:
    calls = model.in_flight + model.waiting
    value = round(calls / replicas, 3) if replicas else None
    return Evidence(metric="calls_per_replica", subject=model.model, value=value, unit="calls")


def _apply_scale(args: ScaleModel, view: ControlView, now_s: float) -> tuple[ScaleRequested]:
    return (ScaleRequested(model=args.model, replicas=args.replicas, hold_s=args.hold_s),)


def _undo_scale(args: ScaleModel, diff: Diff) -> ToolCall:
    before = diff.changes[0].before
    return ToolCall(tool="scale_model", arguments=args.model_dump() | {"replicas": before})


def _check_bounds(args: SetReplicaBounds, view: ControlView) -> None:
    _, limit = _elastic(view, args.model)
    if args.max_replicas > limit:
        raise Refused(
            f"max_replicas {args.max_replicas} of {args.model!r} is above its limit of {limit}; "
            "ask for less, or raise the limit of its group in the settings",
            rule="bounds",
        )


def _diff_bounds(args: SetReplicaBounds, view: ControlView) -> Diff:
    model = view.models[args.model]
    replicas = min(max(replicas_of(model), args.min_replicas), args.max_replicas)
    wanted = [("min_replicas", args.min_replicas), ("max_replicas", args.max_replicas)]
    raised = args.max_replicas > (model.max_replicas or 0)
    predicted = (
        cost_after(view, model, args.max_replicas if raised else replicas),  # what is allowed may be used
        Evidence(metric="replicas", subject=args.model, value=replicas, unit="replicas"),
    )
    return Diff(changes=changes(view, args.model, wanted), predicted=predicted)


def _apply_bounds(args: SetReplicaBounds, view: ControlView, now_s: float) -> tuple[BoundsChanged]:
    return (BoundsChanged(model=args.model, min_replicas=args.min_replicas, max_replicas=args.max_replicas),)


def _undo_bounds(args: SetReplicaBounds, diff: Diff) -> ToolCall | None:
    before = args.model_dump() | {change.what: change.before for change in diff.changes}
    return None if None in before.values() else ToolCall(tool="set_replica_bounds", arguments=before)


def _verify(diff: Diff, before: Figures, after: Figures) -> Verification:
    lowered = any(_number(change.after) < _number(change.before) for change in diff.changes)
    return (figures.after_shrinking if lowered else figures.after_growth)(before, after)


def _number(value: Scalar | None) -> float:
    return float(value or 0)


SCALE_MODEL = ControlTool(
    name="scale_model",
    help="Give a model this many replicas now and hold it there for a while, whatever the scaling policy says.",
    arguments=ScaleModel,
    effect="reversible",
    cooldown_s=120.0,
    per_hour=12,
    check=_check_scale,
    diff=_diff_scale,
    apply=_apply_scale,
    undo=_undo_scale,
    verify=_verify,
)

SET_REPLICA_BOUNDS = ControlTool(
    name="set_replica_bounds",
    help="Set the fewest and the most replicas that the scaler may give a model.",
    arguments=SetReplicaBounds,
    effect="reversible",
    cooldown_s=300.0,
    per_hour=6,
    check=_check_bounds,
    diff=_diff_bounds,
    apply=_apply_bounds,
    undo=_undo_bounds,
    verify=_verify,
)
