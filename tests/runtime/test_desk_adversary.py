"""Whatever is said to the desk, and by whom: no bound is broken, and every change leaves its trace."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from swarmx.core.actions import Action, Cordon, Drain
from swarmx.core.control import Actor, Proposal, ToolCall
from swarmx.core.errors import Refused, SwarmXError
from swarmx.core.messages import BoundsChanged, Message, PolicyChanged, ScaleRequested, ScalingPolicyChanged
from swarmx.memory.sqlite import SqliteStore
from swarmx.runtime.desk import Desk
from swarmx.tools.guard import Guard, GuardSettings
from tests.runtime.offices import Office
from tests.tools.worlds import (
    ADMIN,
    CATALOGUE,
    CLIENT,
    COORDINATOR,
    LIMIT,
    OPERATOR,
    VIEWER,
    WEIGHT,
)

WINDOW_S = 3600.0
BUDGETS = GuardSettings(
    coordinator_changes_per_hour=8,
    people_changes_per_hour=25,
    max_cost_rate=12 * WEIGHT,
    max_open=1,
    per_hour={"scale_model": 2, "set_replica_bounds": 2},
)
PER_HOUR = {"scale_model": 2, "set_replica_bounds": 2, "drain_replica": 4, "cordon_replica": 6, "rollback": 6}
PER_HOUR |= {"set_routing_policy": 3, "set_scaling_policy": 3, "set_policy_parameter": 6}
REST_S = {"scale_model": 120.0, "set_replica_bounds": 300.0, "drain_replica": 300.0, "cordon_replica": 120.0}
REST_S |= {"set_routing_policy": 600.0, "set_scaling_policy": 600.0, "set_policy_parameter": 300.0, "rollback": 60.0}


class Referee:
    """Knows the rules from the manual, not from the guard, and looks at every effect before it happens."""

    def __init__(self, office: Office) -> None:
        self.office = office
        self.current: Proposal | None = None
        self.machine: deque[tuple[float, str]] = deque()
        self.people: deque[float] = deque()
        self.used_at_s: dict[tuple[str, str], float] = {}
        self.effects = 0
        self.violations: list[str] = []
        post, act = office.post, office.act
        office.desk = Desk(
            registry=office.desk.registry,
            guard=Guard(BUDGETS),
            store=office.control,
            audit=office.audit,
            view=office.view,
            post=self.before(post),
            act=self.before(act),
            clock=office.world,
        )
        office.desk.on_change.append(self.changed)

    def changed(self, proposal: Proposal) -> None:
        if proposal.state == "applied":
            self.current = proposal

    def before(self, do: Callable[..., None]) -> Callable[..., None]:
        def checked(output: Message | Action, *more: Any) -> None:
            try:
                self.check(output, partial(do, output, *more))
            except AssertionError as error:  # the desk would take it for a change that failed
                self.violations.append(f"{output}: {error}")
                raise

        return checked

    def check(self, output: Message | Action, do: Callable[[], None]) -> None:
        proposal, intent = self.current, self.office.audit.last()
        assert proposal is not None
        self.current = None
        assert (intent.kind, intent.proposal_id) == ("intent", proposal.proposal_id)
        self.rules(output, proposal)
        facts = self.office.world.facts()
        do()
        now = self.office.world.facts()
        for change in proposal.diff.changes:
            assert facts.get((change.subject, change.what)) == change.before
            assert now.get((change.subject, change.what)) == change.after
        self.effects += 1

    def rules(self, output: Message | Action, proposal: Proposal) -> None:
        world, actor, now_s = self.office.world, proposal.actor, self.office.world.at_s
        machine = actor.type == "coordinator"
        assert actor.role in ("operator", "admin")
        assert proposal.decided_by is None or proposal.decided_by in (OPERATOR, ADMIN)
        assert actor.type != "key" or proposal.decided_by is not None
        if machine:
            self.budget(proposal, now_s)
        elif actor.type == "key":
            self.people.append(now_s)
            assert sum(at_s > now_s - WINDOW_S for at_s in self.people) <= 25
        insists = actor.type == "key" and proposal.call.arguments.get("force") is True
        match output:
            case ScaleRequested():
                low, high = world.bounds[output.model]
                have = len(world.having(output.model, "ready", "starting"))
                assert max(0, low) <= output.replicas <= min(high, LIMIT)
                assert not machine or output.replicas > 0
                assert not machine or abs(output.replicas - have) <= 2
                alive = [1 for _, state in world.replicas.values() if state != "gone"]
                assert output.replicas <= have or WEIGHT * (len(alive) + output.replicas - have) <= 12 * WEIGHT + 1e-6
            case BoundsChanged():
                low, high = world.bounds[output.model]
                assert 0 <= output.min_replicas <= output.max_replicas <= LIMIT
                assert not machine or abs(output.min_replicas - low) <= 2
                assert not machine or abs(output.max_replicas - high) <= 2
                assert not machine or output.max_replicas > 0
            case Drain() | Cordon(cordoned=True):
                model, _ = world.replicas[output.replica_id]
                assert set(world.having(model, "ready")) - {output.replica_id} or insists
                assert not machine or isinstance(output, Cordon) or proposal.decided_by is not None
            case PolicyChanged() | ScalingPolicyChanged():
                kind = "routing" if isinstance(output, PolicyChanged) else "scaling"
                status = world.routing if kind == "routing" else world.scaling
                info = CATALOGUE.policies[kind][output.policy]  # type: ignore[index]
                assert output.parameters.keys() == info.parameters.keys()
                for name, value in output.parameters.items():
                    assert info.parameters[name].low <= value <= info.parameters[name].high
                    if machine and status.policy == output.policy and (was := status.parameters[name]) != value:
                        assert was / 2 - 1e-9 <= value <= was * 2 + 1e-9
            case Cordon():
                pass
            case _:
                raise AssertionError(output)

    def budget(self, proposal: Proposal, now_s: float) -> None:
        tool = proposal.call.tool
        self.machine.append((now_s, tool))
        recent = [used for at_s, used in self.machine if at_s > now_s - WINDOW_S]
        assert len(recent) <= 8
        assert recent.count(tool) <= PER_HOUR[tool]
        for change in proposal.diff.changes:
            subject = self.office.world.replicas.get(change.subject, (change.subject,))[0]
            assert now_s >= self.used_at_s.get((tool, subject), -WINDOW_S) + REST_S[tool] or any(
                other.subject == change.subject for other in proposal.diff.changes if other is not change
            )
            self.used_at_s[tool, subject] = now_s


_STEPS = ("propose",) * 4 + ("approve",) * 2 + ("order", "deny", "time", "world")


class Adversary:
    """Says anything to the desk, sense or nonsense, in any role, at any time."""

    def __init__(self, office: Office, seed: int) -> None:
        self.office = office
        self.rng = np.random.default_rng(seed)
        self.known = ["pr-none"]
        self.rules: set[str] = set()

    def one(self, *choices: Any) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def call(self) -> ToolCall:
        model = self.one("coder", "coder", "coder", "writer", "writer", "writer", "painter", "nobody", "")
        replica = self.one(*self.office.world.replicas, "coder-99")
        nonsense = self.one(7, -1, 10**9, 2.5, "two", None, True)
        number = self.one(0, 1, 2, 3, 4, 5, 6) if self.rng.random() < 0.9 else nonsense
        value = float(self.one(0.0, 0.1, 0.3, 0.45, 0.6, 0.8, 1.0, 2.0, 9.0, -1.0, float("nan"), float("inf")))
        policy = self.one("least_work", "sticky", "static", "tracking", "oracle")
        flag = self.one(True, False)
        arguments: dict[str, dict[str, Any]] = {
            "scale_model": {"model": model, "replicas": number},
            "set_replica_bounds": {"model": model, "min_replicas": self.one(0, 1, 2), "max_replicas": number},
            "drain_replica": {"replica_id": replica, "force": flag},
            "cordon_replica": {"replica_id": replica, "cordoned": flag, "force": self.one(True, False)},
            "set_routing_policy": {"policy": policy, "parameters": self.one({}, {"weight": value}, {"low": value})},
            "set_scaling_policy": {"policy": policy, "parameters": self.one({}, {"high": value})},
            "set_policy_parameter": {
                "kind": self.one("routing", "scaling", "pricing"),
                "parameter": self.one("weight", "low", "high", "depth"),
                "value": value,
            },
            "rollback": {"proposal_id": self.one(*self.known[-12:])},
        }
        tool = self.one(*arguments)
        if self.rng.random() < 0.05:
            return self.one(*(ToolCall(tool=name, arguments={}) for name in ("no_op", "inspect_cluster", "shell")))
        extra = {"sudo": True} if self.rng.random() < 0.02 else {}
        return ToolCall(tool=tool, arguments=arguments[tool] | extra)

    async def step(self) -> None:
        person = self.one(OPERATOR, ADMIN)
        anybody = self.one(COORDINATOR, OPERATOR, VIEWER, CLIENT)
        actor = anybody if self.rng.random() < 0.2 else person
        desk, proposal_id = self.office.desk, self.one(*self.known[-6:])
        try:
            match self.one(*_STEPS):
                case "propose":
                    await self.propose(
                        anybody if self.rng.random() < 0.2 else self.one(COORDINATOR, COORDINATOR, person)
                    )
                case "order":
                    made = await desk.order(self.call(), actor=actor, via="rest")
                    assert made.state == "applied"
                    self.known.append(made.proposal_id)
                case "approve":
                    await desk.approve(proposal_id, actor=actor, via="web")
                case "deny" if self.rng.random() < 0.3:
                    await desk.deny(proposal_id, actor=actor, via="web")
                case "time":
                    self.office.world.at_s += float(self.rng.exponential(60.0))
                    await self.office.desk.settle()
                case "world":
                    self.disturb()
        except Refused as error:
            self.rules.add(error.rule)
        except SwarmXError as error:
            self.rules.add(type(error).__name__)

    async def propose(self, actor: Actor) -> None:
        mode = self.one("observe", "suggest", "review", "review", "auto", "auto")
        made = await self.office.desk.propose(self.call(), actor=actor, via="coordinator", mode=mode)
        self.known.append(made.proposal_id)
        allowed = {"suggest": {"suggested"}, "review": {"open"}, "auto": {"applied", "open"}}
        assert made.state in allowed[mode]
        assert made.state != "open" or mode == "review" or made.call.tool == "drain_replica"

    def disturb(self) -> None:
        world = self.office.world
        name = self.one(*world.replicas)
        model, state = world.replicas[name]
        match state:
            case "starting":
                world.put(name, self.one("ready", "gone"))
            case "draining":
                world.put(name, "gone")
            case "ready" if self.rng.random() < 0.1:
                world.put(name, "gone")
            case "gone":
                del world.replicas[name]
                world.started += 1
                world.replicas[f"{model}-new{world.started}"] = (model, "starting")
            case _:
                pass
        if not world.having("painter", "ready"):
            world.replicas["painter-1"] = ("painter", "ready")
        load = world.loads[self.one(*world.loads)]
        load.p95_s, load.waiting = self.one(None, 1.0, 4.0, 9.0), self.one(0, 0, 0, 5)
        load.arrivals_per_s, load.ended = self.one(0.5, 2.0, 8.0), self.one(0, 20, 200)


@pytest.mark.parametrize("seed", range(2))
async def test_an_adversary_breaks_no_rule_in_thousands_of_steps(seed: int) -> None:
    store = SqliteStore(":memory:")
    await store.open()
    office = Office(store=store, guard=BUDGETS)
    referee, adversary = Referee(office), Adversary(office, seed)
    states: set[str] = set()
    office.desk.on_change.append(lambda proposal: states.add(proposal.state))
    for _ in range(4000):
        await adversary.step()
        waiting = await office.desk.proposals(states=("open", "suggested"), limit=1000)
        assert sum(proposal.actor == COORDINATOR for proposal in waiting) <= BUDGETS.max_open
    assert referee.violations == []
    office.audit.check()
    intents = [record for record in office.audit.records if record.entry.kind == "intent"]
    outcomes = [record.entry.outcome for record in office.audit.records if record.entry.kind == "outcome"]
    assert referee.effects == len(office.done) == len(intents) == outcomes.count("applied") > 100
    met = {"mode", "bounds", "step", "cooldown", "rate", "change_budget", "cost_budget", "last_replica", "no_effect"}
    met |= {"unknown_target", "not_elastic", "state", "stale", "decided", "pending", "irreversible"}
    assert adversary.rules >= met | {"Forbidden", "NotFound", "ConfigError"}, "it tries what the rules are about"
    assert {"kept", "rolled_back", "denied", "expired", "stale", "suggested"} <= states
    await store.close()
