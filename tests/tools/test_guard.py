"""Every rule of the guard objects where it must, by its name, and nowhere else."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from swarmx.core.control import Actor, Diff, Mode, Proposal, ProposalState, ToolCall, Verdict
from swarmx.core.errors import ConfigError
from swarmx.tools.guard import Guard, GuardSettings
from swarmx.tools.ledger import Ledger
from swarmx.tools.registry import make_registry
from swarmx.tools.tool import ControlTool
from tests.tools.worlds import ADMIN, CATALOGUE, CLIENT, COORDINATOR, OPERATOR, VIEWER, WEIGHT, World, call

REGISTRY = make_registry(CATALOGUE)
AGENT = Actor(type="agent", name="prefetcher", role="operator")


def verdict(
    asked: ToolCall,
    actor: Actor = COORDINATOR,
    *,
    world: World | None = None,
    ledger: Ledger | None = None,
    mode: Mode = "review",
    proposals: tuple[Proposal, ...] = (),
    **settings: Any,
) -> Verdict:
    understood = REGISTRY.understand(asked)
    assert isinstance(understood.tool, ControlTool)
    world = world or World()
    return Guard(GuardSettings(**settings)).check(
        understood.tool,
        understood.args,
        actor=actor,
        view=world.view(proposals),
        ledger=ledger or Ledger(),
        now_s=world.at_s,
        mode=mode,
    )


def rule(*args: Any, **more: Any) -> str:
    found = verdict(*args, **more)
    assert found.allowed == (found.rule == "allowed")
    assert found.allowed or found.detail
    return found.rule


def made(
    number: int, asked: ToolCall, *, actor: Actor = COORDINATOR, at_s: float = 990.0, state: str = "applied"
) -> Proposal:
    understood = REGISTRY.understand(asked)
    assert isinstance(understood.tool, ControlTool)
    fields = {
        "proposal_id": f"pr-{number}",
        "at_s": at_s,
        "expires_at_s": at_s + 900,
        "actor": actor,
        "via": "cli",
        "call": understood.call,
        "diff": understood.tool.diff(understood.args, World().view()),
        "state": state,
        "applied_at_s": at_s if state == "applied" else None,
    }
    return msgspec.convert(fields, Proposal)


def ledger(*proposals: Proposal, now_s: float = 1000.0) -> Ledger:
    found = Ledger()
    for proposal in proposals:
        found.note(proposal, now_s)
    return found


SCALE = call("scale_model", model="coder", replicas=3)


@pytest.mark.parametrize(
    ("actor", "expected"),
    [
        (ADMIN, "allowed"),
        (OPERATOR, "allowed"),
        (COORDINATOR, "allowed"),
        (VIEWER, "role"),
        (CLIENT, "role"),
        (msgspec.structs.replace(COORDINATOR, role="viewer"), "role"),
    ],
)
def test_a_change_needs_an_operator(actor: Actor, expected: str) -> None:
    assert rule(SCALE, actor) == expected


def test_looking_needs_a_viewer_and_deciding_a_person() -> None:
    guard, look = Guard(), REGISTRY.tools["inspect_cluster"]
    assert guard.may_use(look, VIEWER).allowed
    assert not guard.may_use(look, CLIENT).allowed
    assert [guard.may_decide(actor).allowed for actor in (ADMIN, OPERATOR, VIEWER, CLIENT, COORDINATOR, AGENT)] == [
        True,
        True,
        False,
        False,
        False,
        False,
    ]


def test_observe_allows_nothing() -> None:
    assert rule(SCALE, mode="observe") == "mode"
    assert rule(SCALE, OPERATOR, mode="observe") == "mode"
    assert rule(SCALE, mode="suggest") == "allowed"


def test_nothing_irreversible_is_automatic_for_a_machine_unless_named() -> None:
    drain = call("drain_replica", replica_id="coder-1")
    tool = REGISTRY.tools["drain_replica"]
    assert isinstance(tool, ControlTool)
    assert Guard().granted(tool, COORDINATOR, "auto") == "review"
    assert Guard().granted(tool, OPERATOR, "auto") == "auto"
    assert Guard(GuardSettings(auto_irreversible=("drain_replica",))).granted(tool, COORDINATOR, "auto") == "auto"
    assert rule(drain, mode="auto") == "mode"
    assert rule(drain, mode="review") == "allowed"
    assert rule(drain, mode="auto", auto_irreversible=("drain_replica",)) == "allowed"
    assert rule(drain, OPERATOR, mode="auto") == "allowed"
    assert rule(SCALE, mode="auto") == "allowed"


def test_the_tools_own_refusals_keep_their_names() -> None:
    assert rule(call("scale_model", model="coda", replicas=3)) == "unknown_target"
    assert rule(call("scale_model", model="coder", replicas=5), OPERATOR) == "bounds"


def test_a_change_that_changes_nothing_is_refused() -> None:
    assert rule(call("scale_model", model="coder", replicas=2), OPERATOR) == "no_effect"
    assert rule(call("cordon_replica", replica_id="coder-1", cordoned=False)) == "no_effect"
    assert rule(call("set_routing_policy", policy="least_work")) == "no_effect"


@pytest.mark.parametrize("tool", ["drain_replica", "cordon_replica"])
def test_the_last_ready_replica_stays_unless_a_person_insists(tool: str) -> None:
    more = {"cordoned": True} if tool == "cordon_replica" else {}
    world = World()
    world.put("coder-2", "starting")
    plain, forced = call(tool, replica_id="coder-1", **more), call(tool, replica_id="coder-1", force=True, **more)
    assert rule(plain, world=world) == "last_replica"
    assert rule(forced, world=world) == "last_replica"
    assert rule(forced, AGENT, world=world) == "last_replica"
    assert rule(plain, OPERATOR, world=world) == "last_replica"
    assert rule(forced, OPERATOR, world=world) == "allowed"
    assert rule(plain, world=World()) == "allowed"


def test_the_last_replica_may_be_put_back() -> None:
    world = World()
    world.put("coder-1", "cordoned")
    world.put("coder-2", "cordoned")
    assert rule(call("cordon_replica", replica_id="coder-1", cordoned=False), world=world) == "allowed"


def test_only_people_take_a_models_last_replica_by_number() -> None:
    world = World(bounds={"coder": (0, 4), "writer": (0, 1)})
    assert rule(call("scale_model", model="coder", replicas=0), world=world) == "last_replica"
    assert rule(call("scale_model", model="coder", replicas=0), OPERATOR, world=world) == "allowed"
    none = call("set_replica_bounds", model="writer", min_replicas=0, max_replicas=0)
    assert rule(none, world=world) == "last_replica"
    assert rule(none, OPERATOR, world=world) == "allowed"


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (call("scale_model", model="coder", replicas=4), "allowed"),
        (call("scale_model", model="coder", replicas=5), "step"),
        (call("set_replica_bounds", model="coder", min_replicas=3, max_replicas=6), "allowed"),
        (call("set_replica_bounds", model="coder", min_replicas=4, max_replicas=6), "step"),
        (call("set_policy_parameter", kind="scaling", parameter="low", value=0.8), "allowed"),
        (call("set_policy_parameter", kind="scaling", parameter="low", value=0.19), "step"),
        (call("set_policy_parameter", kind="scaling", parameter="low", value=0.0), "step"),
        (call("set_scaling_policy", policy="static"), "allowed"),
    ],
)
def test_a_machine_takes_small_steps_and_people_do_not_have_to(asked: ToolCall, expected: str) -> None:
    bounds = {"coder": (1, 6), "writer": (1, 4)} if asked.tool == "scale_model" else {"coder": (1, 4), "writer": (1, 4)}
    world = World(bounds=bounds)
    assert rule(asked, world=world) == expected
    assert rule(asked, OPERATOR, world=world) == "allowed"


def test_a_machine_does_not_jump_by_switching_the_policy() -> None:
    asked = call("set_routing_policy", policy="sticky", parameters={"weight": 8.0})
    assert rule(asked) == "step"
    assert rule(asked, OPERATOR) == "allowed"
    assert rule(call("set_routing_policy", policy="sticky")) == "allowed"


def test_a_parameter_that_is_zero_has_no_small_step() -> None:
    world = World()
    world.scaling = msgspec.structs.replace(world.scaling, parameters={"low": 0.0, "high": 0.8})
    asked = call("set_policy_parameter", kind="scaling", parameter="low", value=0.01)
    assert rule(asked, world=world) == "step"
    assert rule(asked, OPERATOR, world=world) == "allowed"


def test_the_steps_can_be_set() -> None:
    assert rule(call("scale_model", model="coder", replicas=3), replicas_step=0) == "step"
    bounds = call("set_replica_bounds", model="coder", min_replicas=4, max_replicas=6)
    assert rule(bounds, bounds_step=3) == "allowed"
    parameter = call("set_policy_parameter", kind="scaling", parameter="low", value=0.1)
    assert rule(parameter, parameter_factor=4.0) == "allowed"


def test_nobody_goes_over_the_cost_budget() -> None:
    assert rule(SCALE, OPERATOR, max_cost_rate=5 * WEIGHT) == "cost_budget"
    assert rule(SCALE, OPERATOR, max_cost_rate=6 * WEIGHT) == "allowed"
    raised = call("set_replica_bounds", model="coder", min_replicas=3, max_replicas=4)
    assert rule(raised, OPERATOR, max_cost_rate=5 * WEIGHT) == "cost_budget"
    allowed = call("set_replica_bounds", model="coder", min_replicas=1, max_replicas=6)
    assert rule(allowed, OPERATOR, max_cost_rate=8 * WEIGHT) == "cost_budget"
    assert rule(allowed, OPERATOR, max_cost_rate=9 * WEIGHT) == "allowed"


def test_a_fleet_that_costs_too_much_may_still_shrink() -> None:
    assert rule(call("scale_model", model="coder", replicas=1), max_cost_rate=1.0) == "allowed"


def test_a_tool_rests_where_it_was_used_by_whomever() -> None:
    for actor in (COORDINATOR, OPERATOR):
        used = ledger(made(1, SCALE, actor=actor, at_s=900.0))
        assert rule(SCALE, ledger=used) == "cooldown"
        assert rule(SCALE, OPERATOR, ledger=used) == "allowed"
        assert rule(call("scale_model", model="writer", replicas=3), ledger=used) == "allowed"
        assert rule(SCALE, ledger=used, cooldown_s={"scale_model": 100.0}) == "allowed"
        assert rule(SCALE, ledger=used, cooldown_s={"scale_model": 100.1}) == "cooldown"


def test_the_replicas_of_a_model_rest_together() -> None:
    used = ledger(made(1, call("cordon_replica", replica_id="coder-2", cordoned=True)))
    assert rule(call("cordon_replica", replica_id="coder-1", cordoned=True), ledger=used) == "cooldown"
    assert rule(call("cordon_replica", replica_id="writer-1", cordoned=True), ledger=used) == "allowed"


def test_a_tool_has_so_many_uses_an_hour() -> None:
    other = call("scale_model", model="writer", replicas=3)
    used = ledger(*[made(n, other, at_s=500.0 + n) for n in range(12)])
    assert rule(SCALE, ledger=used, coordinator_changes_per_hour=99) == "rate"
    assert rule(SCALE, ledger=used, coordinator_changes_per_hour=99, per_hour={"scale_model": 13}) == "allowed"
    assert rule(SCALE, OPERATOR, ledger=used) == "allowed"
    people = ledger(*[made(n, other, at_s=500.0 + n, actor=OPERATOR) for n in range(12)])
    assert rule(SCALE, ledger=people) == "allowed"


def test_machines_share_one_budget_and_people_another() -> None:
    bounds = call("set_replica_bounds", model="writer", min_replicas=2, max_replicas=4)
    used = ledger(made(1, bounds, actor=AGENT), made(2, bounds, actor=COORDINATOR), made(3, bounds, actor=OPERATOR))
    assert rule(SCALE, ledger=used, coordinator_changes_per_hour=2) == "change_budget"
    assert rule(SCALE, ledger=used, coordinator_changes_per_hour=3) == "allowed"
    assert rule(SCALE, OPERATOR, ledger=used, coordinator_changes_per_hour=0) == "allowed"
    assert rule(SCALE, OPERATOR, ledger=used, people_changes_per_hour=1) == "change_budget"
    assert rule(SCALE, ledger=used, people_changes_per_hour=0) == "allowed"


def test_what_is_an_hour_old_is_forgotten() -> None:
    old = made(1, SCALE, at_s=1000.0)
    used = ledger(old, now_s=4600.0)
    assert not used.applied
    used = ledger(old, now_s=4599.0)
    assert used.count(["coordinator"], now_s=4599.0) == 1
    assert used.count(["coordinator"], now_s=4600.0) == 0


def test_a_change_is_counted_once_however_often_it_is_noted() -> None:
    one = made(1, SCALE)
    used = ledger(one, msgspec.structs.replace(one, state="kept"), msgspec.structs.replace(one, state="rolled_back"))
    assert used.count(["coordinator"], now_s=1000.0) == 1


@pytest.mark.parametrize("state", ["open", "suggested"])
def test_a_machine_does_not_pile_up_proposals(state: ProposalState) -> None:
    guard = Guard(GuardSettings(max_open=2))
    open_call = REGISTRY.understand(SCALE).call
    waiting = ledger(made(1, SCALE, state=state))
    assert guard.may_wait(open_call, COORDINATOR, waiting).rule == "duplicate"
    assert guard.may_wait(open_call, OPERATOR, waiting).allowed
    other = REGISTRY.understand(call("scale_model", model="writer", replicas=3)).call
    assert guard.may_wait(other, COORDINATOR, waiting).allowed
    waiting = ledger(made(1, SCALE, state="open"), made(2, call("set_routing_policy", policy="sticky"), state=state))
    assert guard.may_wait(other, COORDINATOR, waiting).rule == "pending"
    waiting.note(made(2, SCALE, state="denied"), 1000.0)
    assert guard.may_wait(other, COORDINATOR, waiting).allowed
    people = ledger(made(1, SCALE, state="open", actor=OPERATOR), made(2, SCALE, state="open", actor=OPERATOR))
    assert guard.may_wait(open_call, COORDINATOR, people).allowed


def test_a_roll_back_is_bound_by_what_it_brings_about() -> None:
    world = World()
    asked = call("scale_model", model="coder", replicas=4)
    proposal = made(1, asked, actor=OPERATOR)
    for name in ("coder-3", "coder-4"):
        world.replicas[name] = ("coder", "ready")
    undo = call("rollback", proposal_id="pr-1")
    assert rule(undo, world=world, proposals=(proposal,)) == "allowed"
    assert rule(undo, world=world, proposals=(proposal,), replicas_step=1) == "step"
    emptied = msgspec.structs.replace(
        proposal, diff=Diff(changes=(msgspec.structs.replace(proposal.diff.changes[0], before=0),))
    )
    world.bounds["coder"] = (0, 4)
    assert rule(undo, world=world, proposals=(emptied,), replicas_step=9) == "last_replica"


def test_settings_that_cannot_hold_are_refused() -> None:
    with pytest.raises(ConfigError, match="cooldown of scale_model is 3601"):
        GuardSettings(cooldown_s={"scale_model": 3601.0})
    with pytest.raises(ConfigError, match=r"parameter_factor is 0\.5"):
        GuardSettings(parameter_factor=0.5)
