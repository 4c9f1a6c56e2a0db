"""The one guard: may this actor make this change now? Every rule has a name, and the first that objects decides."""

from __future__ import annotations

from typing import Any

import msgspec
from pydantic import BaseModel

from swarmx.core.control import Actor, Change, ControlView, Diff, Mode, ToolCall, Verdict
from swarmx.core.errors import ConfigError, Refused
from swarmx.tools.facts import FLEET, cost_rate, touched
from swarmx.tools.ledger import HOUR_S, Ledger
from swarmx.tools.replicas import ready_besides
from swarmx.tools.tool import ControlTool, Tool

_RANKS = {"client": 0, "viewer": 1, "operator": 2, "admin": 3}
_MACHINES = ("coordinator", "agent")


class GuardSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How far one change may go, and how many there may be.

    The steps, cooldowns and rates bind the coordinator and agents; `max_cost_rate` (sum of device weights, 1.0 is one
    L40S) and `people_changes_per_hour` bind people as well. `cooldown_s` and `per_hour` replace the tools' own, by
    name. `auto_irreversible` lists the irreversible tools that mode auto may use unasked.
    """

    replicas_step: int = 2
    bounds_step: int = 2
    parameter_factor: float = 2.0
    cooldown_s: dict[str, float] = {}
    per_hour: dict[str, int] = {}
    coordinator_changes_per_hour: int = 12
    people_changes_per_hour: int = 240
    max_cost_rate: float | None = None
    max_open: int = 20
    auto_irreversible: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for tool, cooldown_s in self.cooldown_s.items():
            if not 0.0 <= cooldown_s <= HOUR_S:
                raise ConfigError(f"the cooldown of {tool} is {cooldown_s:g} s; it must be from 0 to {HOUR_S:g} s")
        if self.parameter_factor < 1.0:
            raise ConfigError(f"parameter_factor is {self.parameter_factor:g}; it must be 1 or more")


class Guard:
    """Pure: the same question over the same view and ledger has the same answer."""

    def __init__(self, settings: GuardSettings | None = None) -> None:
        self.settings = settings or GuardSettings()

    def may_use(self, tool: Tool, actor: Actor) -> Verdict:
        """The rule `role` alone."""
        if _RANKS[actor.role] < _RANKS[tool.role]:
            return _no(
                "role", f"{actor.name!r} has the role {actor.role!r}; {tool.name} needs {tool.role!r} or a higher one"
            )
        return _YES

    def may_decide(self, actor: Actor) -> Verdict:
        """Whether this actor may approve and deny: a person who may also order."""
        if actor.type == "key" and _RANKS[actor.role] >= _RANKS["operator"]:
            return _YES
        return _no("role", f"{actor.name!r} may not decide on proposals; that takes a person, as operator or admin")

    def granted(self, tool: ControlTool[Any], actor: Actor, mode: Mode) -> Mode:
        """The mode that applies: nothing irreversible is automatic for a machine unless that is set by name."""
        by_name = tool.name in self.settings.auto_irreversible
        if mode == "auto" and actor.type in _MACHINES and tool.effect == "irreversible" and not by_name:
            return "review"
        return mode

    def check(
        self,
        tool: ControlTool[Any],
        args: BaseModel,
        *,
        actor: Actor,
        view: ControlView,
        ledger: Ledger,
        now_s: float,
        mode: Mode,
    ) -> Verdict:
        """The verdict on a call that would be made now in this mode. Of an approval, `actor` is the proposer: who
        approves lends it no power."""
        role = self.may_use(tool, actor)
        if not role.allowed:
            return role
        if mode == "observe":
            return _no("mode", f"{tool.name} may only be looked at, its mode is observe; raise the mode to use it")
        if mode != self.granted(tool, actor, mode):
            return _no("mode", f"{tool.name} is irreversible and not set to auto by name; propose it for review")
        try:
            tool.check(args, view)
            diff = tool.diff(args, view)
        except Refused as error:
            return _no(error.rule, str(error))
        if not diff.changes:
            return _no("no_effect", f"{tool.name} would change nothing; everything is so already")
        objections = self._hard(tool, args, diff, actor, view, ledger, now_s)
        if actor.type in _MACHINES:
            objections += self._soft(tool, args, diff, ledger, now_s)
        return objections[0] if objections else _YES

    def may_wait(self, call: ToolCall, actor: Actor, ledger: Ledger) -> Verdict:
        """The rules `duplicate` and `pending`: a machine piles up neither proposals nor suggestions."""
        waiting = [one for one in ledger.waiting.values() if one.actor_type in _MACHINES]
        if actor.type not in _MACHINES:
            return _YES
        if any(one.call == call for one in waiting):
            return _no("duplicate", f"the same {call.tool} waits already; decide on that one, or let it expire")
        if len(waiting) >= self.settings.max_open:
            return _no("pending", f"{len(waiting)} proposals wait, the most allowed; approve or deny some first")
        return _YES

    def _hard(
        self,
        tool: ControlTool[Any],
        args: BaseModel,
        diff: Diff,
        actor: Actor,
        view: ControlView,
        ledger: Ledger,
        now_s: float,
    ) -> list[Verdict]:
        """What nobody may do."""
        objections: list[Verdict] = []
        person = actor.type == "key"
        model = _emptied(diff, view)
        if model is not None and not (person and tool.forced(args)):
            hint = ", or insist with force" if person else ""
            objections.append(
                _no("last_replica", f"{model!r} would have no ready replica left; start another one first{hint}")
            )
        most, cost = self.settings.max_cost_rate, _cost(diff)
        if most is not None and cost is not None and cost > most and cost > cost_rate(view):
            objections.append(
                _no("cost_budget", f"the fleet would cost {cost:g} (1.0 is one L40S), at most {most:g} is allowed")
            )
        limit = self.settings.people_changes_per_hour
        if person and ledger.count(["key"], now_s=now_s) >= limit:
            objections.append(_no("change_budget", f"people made {limit} changes in the last hour, the most allowed"))
        return objections

    def _soft(self, tool: ControlTool[Any], args: BaseModel, diff: Diff, ledger: Ledger, now_s: float) -> list[Verdict]:
        """What machines may not do, and people may."""
        objections = [
            _no("last_replica", f"{change.subject!r} would be left without a replica; only people may do that")
            for change in diff.changes
            if change.what in ("replicas", "max_replicas") and change.after == 0
        ]
        if not any(change.what == "policy" for change in diff.changes):
            objections += [_no("step", detail) for change in diff.changes if (detail := self._too_far(change))]
        elif tool.forced(args):
            objections.append(_no("step", "only people switch to a policy with other parameters than its defaults"))
        cooldown_s = self.settings.cooldown_s.get(tool.name, tool.cooldown_s)
        last_at_s = ledger.last_at_s(tool.name, touched(diff))
        if last_at_s is not None and now_s < last_at_s + cooldown_s:
            ago_s = now_s - last_at_s
            objections.append(
                _no("cooldown", f"{tool.name} was used there {ago_s:.0f} s ago, it rests {cooldown_s:g} s")
            )
        most = self.settings.per_hour.get(tool.name, tool.per_hour)
        if ledger.count(_MACHINES, now_s=now_s, tool=tool.name) >= most:
            objections.append(_no("rate", f"{tool.name} was used {most} times in the last hour, the most allowed"))
        budget = self.settings.coordinator_changes_per_hour
        if ledger.count(_MACHINES, now_s=now_s) >= budget:
            objections.append(_no("change_budget", f"{budget} changes were made in the last hour, the most allowed"))
        return objections

    def _too_far(self, change: Change) -> str | None:
        """Why the change is too large for one step; None if it is not."""
        before, after = change.before, change.after
        if not isinstance(before, int | float) or not isinstance(after, int | float):
            return None
        if change.what in ("replicas", "min_replicas", "max_replicas"):
            step = self.settings.replicas_step if change.what == "replicas" else self.settings.bounds_step
            if abs(after - before) <= step:
                return None
            return f"{change.what} of {change.subject!r} may move by {step} at a time, not from {before} to {after}"
        factor = self.settings.parameter_factor
        if before * after > 0 and 1.0 / factor <= after / before <= factor:
            return None
        return f"{change.what} may change by a factor of {factor:g} at a time, not from {before:g} to {after:g}"


_YES = Verdict(allowed=True, rule="allowed")


def _no(rule: str, detail: str) -> Verdict:
    return Verdict(allowed=False, rule=rule, detail=detail)


def _emptied(diff: Diff, view: ControlView) -> str | None:
    """The model that would have no ready replica because this one is drained or cordoned; None if there is none."""
    for change in diff.changes:
        if change.what == "state" and change.after != "ready" and ready_besides(view, change.subject) == 0:
            return view.replicas[change.subject].model
    return None


def _cost(diff: Diff) -> float | None:
    for line in diff.predicted:
        if line.metric == "cost_rate" and line.subject == FLEET:
            return float(line.value or 0.0)
    return None
