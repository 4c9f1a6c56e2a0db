"""Tools for the policies in force: choose one for routing or for scaling, or move one of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from swarmx.core.control import Change, ControlView, Diff, PolicyStatus, Scalar, ToolCall
from swarmx.core.errors import ConfigError, Refused
from swarmx.core.messages import PolicyChanged, ScalingPolicyChanged
from swarmx.core.words import near
from swarmx.tools import figures
from swarmx.tools.catalogue import Catalogue, PolicyKind
from swarmx.tools.facts import changes, listed
from swarmx.tools.figures import Figures
from swarmx.tools.tool import STRICT, ControlTool, ParameterName, RoutingPolicyName, ScalingPolicyName, Verification

Number = Annotated[float, Field(allow_inf_nan=False)]
Parameters = Annotated[dict[ParameterName, Number], Field(max_length=16)]


class SetRoutingPolicy(BaseModel):
    """Arguments of set_routing_policy."""

    model_config = STRICT
    policy: RoutingPolicyName
    parameters: Parameters = {}


class SetScalingPolicy(BaseModel):
    """Arguments of set_scaling_policy."""

    model_config = STRICT
    policy: ScalingPolicyName
    parameters: Parameters = {}


class SetPolicyParameter(BaseModel):
    """Arguments of set_policy_parameter."""

    model_config = STRICT
    kind: Literal["routing", "scaling"]
    parameter: ParameterName
    value: Number


SetPolicy = SetRoutingPolicy | SetScalingPolicy

_CHANGED: Mapping[PolicyKind, type[PolicyChanged | ScalingPolicyChanged]] = {
    "routing": PolicyChanged,
    "scaling": ScalingPolicyChanged,
}
_VERIFY: Mapping[PolicyKind, Callable[[Figures, Figures], Verification]] = {
    "routing": figures.after_policy,
    "scaling": figures.after_scaling_policy,
}


def _status(view: ControlView, kind: PolicyKind) -> PolicyStatus:
    """The policy of that kind."""
    return view.routing if kind == "routing" else view.scaling


def policy_tools(catalogue: Catalogue) -> tuple[ControlTool[Any], ...]:
    """set_routing_policy, set_scaling_policy and set_policy_parameter over the policies of the catalogue."""

    def check(kind: PolicyKind, name: str, parameters: Mapping[str, float]) -> None:
        known = catalogue.policies[kind]
        if name not in known:
            raise Refused(
                f"there is no {kind} policy {name!r}; there are {listed(known)}.{near(name, known)}",
                rule="unknown_target",
            )
        for parameter, value in parameters.items():
            check_parameter(kind, name, parameter, value)
        try:
            catalogue.validate_policy(kind, name, parameters)
        except ConfigError as error:
            raise Refused(str(error), rule="bounds") from error

    def check_parameter(kind: PolicyKind, name: str, parameter: str, value: float) -> None:
        known = catalogue.policies[kind][name].parameters
        if parameter not in known:
            raise Refused(
                f"the {kind} policy {name!r} has no parameter {parameter!r}; it has {listed(known)}."
                f"{near(parameter, known)}",
                rule="unknown_target",
            )
        info = known[parameter]
        if not info.low <= value <= info.high:
            raise Refused(
                f"{parameter} of {name!r} must be from {info.low:g} to {info.high:g}; it is to be {value:g}",
                rule="bounds",
            )

    def diff_policy(kind: PolicyKind, args: SetPolicy, view: ControlView) -> Diff:
        status = _status(view, kind)
        wanted: list[tuple[str, Scalar | None]] = [("policy", args.policy)]
        if status.policy != args.policy:
            wanted += [(f"{status.policy}.{name}", None) for name in status.parameters]
        full = catalogue.policies[kind][args.policy].full(args.parameters)
        wanted += [(f"{args.policy}.{name}", value) for name, value in full.items()]
        return Diff(changes=changes(view, kind, wanted))

    def undo_policy(kind: PolicyKind, tool: str, args: SetPolicy, diff: Diff) -> ToolCall:
        changed = {change.what: change.before for change in diff.changes}
        policy = str(changed.pop("policy", args.policy))
        kept = catalogue.policies[kind][policy].full(args.parameters) if policy == args.policy else {}
        parameters = kept | {
            what.partition(".")[2]: before for what, before in changed.items() if what.startswith(f"{policy}.")
        }
        return ToolCall(tool=tool, arguments={"policy": policy, "parameters": parameters})

    def parameters_after(args: SetPolicyParameter, view: ControlView) -> dict[str, float]:
        return _status(view, args.kind).parameters | {args.parameter: args.value}

    def diff_parameter(args: SetPolicyParameter, view: ControlView) -> Diff:
        policy = _status(view, args.kind).policy
        return Diff(changes=changes(view, args.kind, [(f"{policy}.{args.parameter}", args.value)]))

    def choose(kind: PolicyKind, arguments: type[SetPolicy]) -> ControlTool[SetPolicy]:
        name = f"set_{kind}_policy"
        changed, verify = _CHANGED[kind], _VERIFY[kind]
        return ControlTool(
            name=name,
            help=f"Use this {kind} policy from now on, with its default parameters.",
            arguments=arguments,
            effect="reversible",
            cooldown_s=600.0,
            per_hour=3,
            check=lambda args, view: check(kind, args.policy, args.parameters),
            diff=lambda args, view: diff_policy(kind, args, view),
            apply=lambda args, view, now_s: (
                changed(policy=args.policy, parameters=catalogue.policies[kind][args.policy].full(args.parameters)),
            ),
            undo=lambda args, diff: undo_policy(kind, name, args, diff),
            verify=lambda diff, before, after: verify(before, after),
            forced=lambda args: bool(args.parameters),
        )

    parameter = ControlTool(
        name="set_policy_parameter",
        help="Change one parameter of the routing or the scaling policy that is in force.",
        arguments=SetPolicyParameter,
        effect="reversible",
        cooldown_s=300.0,
        per_hour=6,
        check=lambda args, view: check(args.kind, _status(view, args.kind).policy, parameters_after(args, view)),
        diff=diff_parameter,
        apply=lambda args, view, now_s: (
            _CHANGED[args.kind](policy=_status(view, args.kind).policy, parameters=parameters_after(args, view)),
        ),
        undo=_undo_parameter,
        verify=lambda diff, before, after: _VERIFY["routing" if diff.changes[0].subject == "routing" else "scaling"](
            before, after
        ),
    )
    return choose("routing", SetRoutingPolicy), choose("scaling", SetScalingPolicy), parameter


def _undo_parameter(args: SetPolicyParameter, diff: Diff) -> ToolCall | None:
    change: Change = diff.changes[0]
    if change.before is None:
        return None
    return ToolCall(tool="set_policy_parameter", arguments=args.model_dump() | {"value": change.before})
