"""What was changed of late and what waits for a decision: the guard's memory, rebuilt from stored proposals."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from swarmx.core.control import Proposal, ProposalState, ToolCall
from swarmx.tools.facts import touched

HOUR_S = 3600.0
WAITING: tuple[ProposalState, ...] = ("open", "suggested")  # what has not ended; both expire


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """One change that was made: when (Unix seconds), with which tool, to what, by a kind of actor."""

    at_s: float
    tool: str
    subjects: frozenset[str]
    actor_type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """One proposal that is open, or a suggestion that has not expired."""

    call: ToolCall
    actor_type: str


@dataclass(slots=True, kw_only=True)
class Ledger:
    """Plain memory of the last hour's changes and of what waits, both by proposal id."""

    applied: dict[str, Applied] = field(default_factory=dict)
    waiting: dict[str, Waiting] = field(default_factory=dict)

    def note(self, proposal: Proposal, now_s: float) -> None:
        """Remember the proposal in its new state; noting the same twice changes nothing."""
        name, actor_type = proposal.proposal_id, proposal.actor.type
        self.waiting.pop(name, None)
        if proposal.state in WAITING:
            self.waiting[name] = Waiting(call=proposal.call, actor_type=actor_type)
        if proposal.applied_at_s is not None:
            self.applied[name] = Applied(
                at_s=proposal.applied_at_s,
                tool=proposal.call.tool,
                subjects=touched(proposal.diff),
                actor_type=actor_type,
            )
        self.applied = {key: change for key, change in self.applied.items() if change.at_s > now_s - HOUR_S}

    def count(self, actor_types: Collection[str], *, now_s: float, tool: str | None = None) -> int:
        """Changes by such actors within the last hour, with one tool or any."""
        return sum(
            change.at_s > now_s - HOUR_S and change.actor_type in actor_types and tool in (None, change.tool)
            for change in self.applied.values()
        )

    def last_at_s(self, tool: str, subjects: frozenset[str]) -> float | None:
        """When anybody last used the tool on any of these, if within the last hour."""
        return max(
            (change.at_s for change in self.applied.values() if change.tool == tool and change.subjects & subjects),
            default=None,
        )
