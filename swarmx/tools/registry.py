"""All tools by name: calls are understood here, and applied changes rolled back by the tool that made them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from swarmx.core.actions import Action
from swarmx.core.control import ControlView, Diff, Proposal, ToolCall
from swarmx.core.errors import ConfigError, Refused
from swarmx.core.messages import Message
from swarmx.core.words import near
from swarmx.tools import figures
from swarmx.tools.capacity import SCALE_MODEL, SET_REPLICA_BOUNDS
from swarmx.tools.catalogue import Catalogue
from swarmx.tools.facts import in_force
from swarmx.tools.policies import policy_tools
from swarmx.tools.reads import read_tools
from swarmx.tools.replicas import CORDON_REPLICA, DRAIN_REPLICA
from swarmx.tools.tool import STRICT, ControlTool, ProposalId, Tool

_SHOWN_ERRORS = 3


class Rollback(BaseModel):
    """Arguments of rollback."""

    model_config = STRICT
    proposal_id: ProposalId


@dataclass(frozen=True, slots=True, kw_only=True)
class Understood:
    """A call whose tool exists and whose arguments fit; `reason` came along with the arguments, if at all."""

    tool: Tool
    args: BaseModel
    reason: str

    @property
    def call(self) -> ToolCall:
        """The call with every argument, defaults included."""
        return ToolCall(tool=self.tool.name, arguments=self.args.model_dump())


class Registry:
    """The tools, immutable."""

    def __init__(self, tools: tuple[Tool, ...]) -> None:
        self.tools: Mapping[str, Tool] = {tool.name: tool for tool in tools}

    def understand(self, call: ToolCall) -> Understood:
        """Raises ConfigError for a tool that does not exist or arguments that do not fit it."""
        tool = self.tools.get(call.tool)
        if tool is None:
            raise ConfigError(
                f"there is no tool {call.tool[:40]!r}; there are {', '.join(self.tools)}.{near(call.tool, self.tools)}"
            )
        arguments = dict(call.arguments)
        reason = arguments.pop("reason", "")
        try:
            args = tool.arguments.model_validate(arguments)
        except ValidationError as error:
            raise ConfigError(f"{tool.name}: {_problems(error)}; it takes {_signature(tool)}") from None
        return Understood(tool=tool, args=args, reason=reason if isinstance(reason, str) else "")


def make_registry(catalogue: Catalogue) -> Registry:
    """Every tool, over the policies of the catalogue."""
    tools: tuple[Tool, ...] = (
        *read_tools(catalogue),
        SCALE_MODEL,
        SET_REPLICA_BOUNDS,
        DRAIN_REPLICA,
        CORDON_REPLICA,
        *policy_tools(catalogue),
    )
    return Registry((*tools, _rollback(Registry(tools))))


def _rollback(registry: Registry) -> ControlTool[Rollback]:
    def undoing(args: Rollback, view: ControlView) -> tuple[ControlTool[Any], BaseModel]:
        """The call that takes the proposal's changes back, as the tool that made them gives it."""
        proposal = _applied(args.proposal_id, view)
        undo: ToolCall | None = None
        if proposal.call.tool in registry.tools:  # not so for a roll back, and for a tool of another version
            made = registry.understand(proposal.call)
            undo = made.tool.undo(made.args, proposal.diff) if isinstance(made.tool, ControlTool) else None
        if undo is None:
            raise Refused(f"{proposal.call.tool} of {args.proposal_id!r} cannot be undone", rule="irreversible")
        call = registry.understand(undo)
        assert isinstance(call.tool, ControlTool)  # noqa: S101  # a control tool is undone by a control tool
        return call.tool, call.args

    def check(args: Rollback, view: ControlView) -> None:
        tool, inner = undoing(args, view)
        if not in_force(_applied(args.proposal_id, view).diff.changes, view):
            raise Refused(
                f"what {args.proposal_id!r} changed is no longer as it left it; give a new order instead", rule="stale"
            )
        tool.check(inner, view)

    def diff(args: Rollback, view: ControlView) -> Diff:
        tool, inner = undoing(args, view)
        return tool.diff(inner, view)

    def apply(args: Rollback, view: ControlView, now_s: float) -> tuple[Message | Action, ...]:
        tool, inner = undoing(args, view)
        return tool.apply(inner, view, now_s)

    return ControlTool(
        name="rollback",
        help="Take back an applied proposal, if everything still is as it left it.",
        arguments=Rollback,
        effect="reversible",
        cooldown_s=60.0,
        per_hour=6,
        check=check,
        diff=diff,
        apply=apply,
        undo=lambda args, diff: None,
        verify=lambda diff, before, after: figures.unmeasured(),
    )


def _applied(proposal_id: str, view: ControlView) -> Proposal:
    for proposal in view.proposals:
        if proposal.proposal_id == proposal_id:
            if proposal.state not in ("applied", "kept"):
                raise Refused(
                    f"the proposal {proposal_id!r} is {proposal.state}; only one that is in force can be rolled back",
                    rule="state",
                )
            return proposal
    raise Refused(f"there is no proposal {proposal_id!r}; list them and check the id", rule="unknown_target")


def _problems(error: ValidationError) -> str:
    found = error.errors(include_url=False, include_context=False)
    lines = [
        f"{'.'.join(map(str, problem['loc']))[:40] or 'arguments'}: {problem['msg']} (got {_shown(problem['input'])})"
        for problem in found[:_SHOWN_ERRORS]
    ]
    return "; ".join(lines) + (f"; and {len(found) - _SHOWN_ERRORS} more" if len(found) > _SHOWN_ERRORS else "")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _signature(tool: Tool) -> str:
    fields = tool.arguments.model_fields
    return ", ".join(name if field.is_required() else f"[{name}]" for name, field in fields.items()) or "no arguments"
