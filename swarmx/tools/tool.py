"""What a tool is: typed arguments, and pure functions that check, show, do, undo and verify one change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from swarmx.core.actions import Action
from swarmx.core.control import ControlView, Diff, Effect, Evidence, Role, ToolCall
from swarmx.core.messages import Message

A = TypeVar("A", bound=BaseModel)
Names = Literal["model", "replica", "routing_policy", "scaling_policy", "parameter", "proposal", "call"]

STRICT = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _named(kind: Names, longest: int) -> Any:
    return Field(min_length=1, max_length=longest, json_schema_extra={"names": kind})


ModelName = Annotated[str, _named("model", 128)]
ReplicaId = Annotated[str, _named("replica", 128)]
RoutingPolicyName = Annotated[str, _named("routing_policy", 40)]
ScalingPolicyName = Annotated[str, _named("scaling_policy", 40)]
ParameterName = Annotated[str, _named("parameter", 40)]
ProposalId = Annotated[str, _named("proposal", 40)]
CallId = Annotated[str, _named("call", 128)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """Whether a change may stay, and the figure that decided, before and after it (None: nothing to measure)."""

    kept: bool
    metric: str
    before: float | None = None
    after: float | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadTool(Generic[A]):
    """Looks and changes nothing. `calls` names the calls whose decisions the view must hold. May raise NotFound."""

    name: str
    help: str
    arguments: type[A]
    read: Callable[[A, ControlView], dict[str, Any]]
    calls: Callable[[A], tuple[str, ...]] = lambda _: ()
    role: Role = "viewer"

    @property
    def effect(self) -> Effect:
        return "read"


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlTool(Generic[A]):
    """Changes one thing. `check` raises Refused when the arguments do not fit the world; the rest relies on it.

    `diff` says what `apply` is going to do, at a time in Unix seconds. `undo` makes the call that takes the changes
    back, or None. `verify` compares `tools.figures` of the time of the change with those of some time later. `forced`
    tells whether the arguments insist on what only people may have: a model's last ready replica, a policy with other
    parameters than its own. The coordinator waits `cooldown_s` between two uses on the same subject, and has
    `per_hour` uses.
    """

    name: str
    help: str
    arguments: type[A]
    effect: Effect
    cooldown_s: float
    per_hour: int
    check: Callable[[A, ControlView], None]
    diff: Callable[[A, ControlView], Diff]
    apply: Callable[[A, ControlView, float], tuple[Message | Action, ...]]
    undo: Callable[[A, Diff], ToolCall | None]
    verify: Callable[[Diff, tuple[Evidence, ...], tuple[Evidence, ...]], Verification]
    forced: Callable[[A], bool] = lambda _: False
    role: Role = "operator"


Tool = ReadTool[Any] | ControlTool[Any]
