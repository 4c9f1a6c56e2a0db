"""The scaler over time: any order of messages, constant demand, a flash crowd."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from swarmx.agents.demand import HORIZONS_S
from swarmx.agents.router import RouterAgent
from swarmx.agents.router_settings import RouterSettings
from swarmx.agents.scaler import ScalerAgent, ScalerSettings
from swarmx.agents.scaling import SCALING_POLICIES
from swarmx.core.actions import Deploy, Drain
from swarmx.core.messages import (
    AlertRaised,
    BoundsChanged,
    CallReady,
    ScalePlanned,
    ScaleRequested,
    ScalingPolicyChanged,
    TimerFired,
    WorkflowEnded,
    WorkflowSubmitted,
)
from swarmx.runtime.journal import MemoryJournal
from swarmx.runtime.switchboard import Switchboard
from swarmx.runtime.virtual import VirtualShell
from tests.agents.scaling_worlds import PLAN, SLOW, SlowStarts, a_group, demand, of_group
from tests.agents.worlds import FORECAST, a_call, a_profile, changed


@given(calls=st.integers(0, 200), start_s=st.floats(0.0, 30.0), policy=st.sampled_from(list(SCALING_POLICIES)))
@settings(max_examples=60, deadline=None)
def test_constant_demand_settles(calls: int, start_s: float, policy: str) -> None:
    groups = (a_group(start_s=start_s, min_replicas=1), a_group("dear", profile=SLOW))
    agent = ScalerAgent(ScalerSettings(groups=groups, policy=policy, down_cooldown_s=10.0))
    journal, world = MemoryJournal(), SlowStarts(groups, [start_s])
    shell = VirtualShell(Switchboard([agent], epoch=1, journal=journal), world)
    shell.post(PLAN)
    for tick in range(120):
        shell.post(demand(calls), at_s=2.0 * tick)
    shell.run(until_s=240.0)
    actions = [(e.at_s, o) for e in journal.entries for o in e.answered if isinstance(o, Deploy | Drain)]
    assert len(actions) <= 16
    assert not [at_s for at_s, _ in actions if at_s > 120.0]


GROUPS = (
    a_group("a", min_replicas=1, max_replicas=3, limit=4),
    a_group("b", profile=SLOW, max_replicas=2, limit=2),
    a_group("c", model="n", profile=a_profile(cost_weight=2.0), max_replicas=3, limit=3),
)
BY_ID = {group.group_id: group for group in GROUPS}


class AnyOrder(RuleBasedStateMachine):
    """Any order of messages; a bookkeeper beside the scaler checks each step."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.agent = ScalerAgent(
            ScalerSettings(groups=GROUPS, budget=6.0, start_floor_s=5.0, start_patience=1.0, down_cooldown_s=4.0)
        )
        self.ours: dict[str, str] = {}  # all that exist, with their state
        self.used: set[str] = set()
        self.leaving: set[str] = set()
        self.drained: dict[str, float] = {}
        self.fixed: dict[str, str] = {}
        self.failing: dict[str, tuple[int, float]] = {}  # group -> failures in a row, since when

    def say(self, *messages: Any) -> None:
        for message in messages:
            self.check(self.agent.handle(message, self.now_s))

    def count(self, model: str) -> int:
        own = [i for i, s in self.ours.items() if s in ("unheard", "starting", "ready") and i not in self.leaving]
        fixed = [i for i, s in self.fixed.items() if s in ("starting", "ready")]
        return sum(BY_ID[i[0]].model == model for i in own) + (len(fixed) if model == "m" else 0)

    def held(self) -> set[str]:
        return {i for m in ("m", "n") for i, h in self.agent._models[m].supply.held.items() if h.group is not None}

    def check(self, outputs: Any) -> None:
        self.leaving |= {output.replica_id for output in outputs if isinstance(output, Drain)}
        for replica_id in self.ours.keys() - self.held():
            assert self.ours.pop(replica_id) == "unheard", "forgets what is there"
            assert replica_id in self.leaving, "forgets what it wants"
        for output in outputs:
            if isinstance(output, AlertRaised) and output.kind == "replica_failed":
                self.fail(output.subject)
            if isinstance(output, Drain):
                assert output.replica_id in self.used, "drains what is not ours"
                assert self.now_s > self.drained.get(output.replica_id, -11.0) + 10.0, "drains twice within a moment"
                self.drained[output.replica_id] = self.now_s
            if isinstance(output, Deploy):
                group = BY_ID[output.group_id]
                failures, since_s = self.failing.get(output.group_id, (0, 0.0))
                assert not failures or self.now_s >= since_s + min(300.0, 2.0**failures), "does not wait"
                assert output.replica_id not in self.used | self.fixed.keys(), "uses an id twice"
                self.used.add(output.replica_id)
                self.ours[output.replica_id] = "unheard"
                assert sum(i[0] == output.group_id for i in self.ours) <= group.limit
                assert sum(BY_ID[i[0]].profile.cost_weight for i in self.ours) <= 6.0
                bounds = self.agent.bounds(group.model)
                assert bounds is not None
                assert self.count(group.model) <= bounds.max_replicas
            if isinstance(output, ScalePlanned):
                plan = output.plan
                assert plan.min_replicas <= plan.target <= plan.max_replicas
                assert not (plan.deploys and plan.drains)

    def fail(self, replica_id: str) -> None:
        failures, _ = self.failing.get(replica_id[0], (0, 0.0))
        self.failing[replica_id[0]] = (failures + 1, self.now_s)

    @rule(by_s=st.floats(0.0, 10.0))
    def a_plan_is_due(self, by_s: float) -> None:
        self.now_s += by_s
        self.say(PLAN)

    @rule(calls=st.integers(0, 100), model=st.sampled_from(["m", "n", "unknown"]), more=st.floats(0.0, 100.0))
    def a_router_reports(self, calls: int, model: str, more: float) -> None:
        self.say(demand(calls, model=model, fresh_mean=tuple(more * h for h in HORIZONS_S)))

    @rule(data=st.data(), state=st.sampled_from(["starting", "ready", "ready", "cordoned", "draining", "gone"]))
    def a_replica_changes(self, data: st.DataObject, state: Any) -> None:
        if not self.ours:
            return
        replica_id = data.draw(st.sampled_from(sorted(self.ours)))
        before = self.ours[replica_id]
        if state == "starting" and before != "unheard":
            return
        if state == "gone":
            del self.ours[replica_id]
            if before in ("unheard", "starting") and replica_id not in self.leaving:
                self.fail(replica_id)
            self.leaving.discard(replica_id)
        else:
            self.ours[replica_id] = state
            if state == "ready" and before in ("unheard", "starting") and replica_id not in self.leaving:
                self.failing.pop(replica_id[0], None)
        self.say(of_group(replica_id, state, BY_ID[replica_id[0]]))

    @rule(name=st.sampled_from(["a-3", "x-1"]), state=st.sampled_from(["ready", "cordoned", "gone"]))
    def somebody_elses_replica_changes(self, name: str, state: Any) -> None:
        if name in self.used:
            return
        self.fixed[name] = state
        self.say(changed(name, state))

    @rule(model=st.sampled_from(["m", "n"]), replicas=st.integers(-1, 20), hold_s=st.floats(0.0, 20.0))
    def somebody_orders(self, model: str, replicas: int, hold_s: float) -> None:
        self.say(ScaleRequested(model=model, replicas=replicas, hold_s=hold_s))

    @rule(model=st.sampled_from(["m", "n"]), least=st.integers(-1, 9), most=st.integers(-1, 9))
    def bounds_change(self, model: str, least: int, most: int) -> None:
        self.say(BoundsChanged(model=model, min_replicas=least, max_replicas=most))

    @rule(policy=st.sampled_from([*SCALING_POLICIES, "psychic"]))
    def the_policy_changes(self, policy: str) -> None:
        self.say(ScalingPolicyChanged(policy=policy, parameters={}))

    @rule(key=st.sampled_from(["demand", "", "answer:c"]))
    def another_timer_fires(self, key: str) -> None:
        assert self.agent.handle(TimerFired(key=key), self.now_s) == ()

    @invariant()
    def the_books_agree(self) -> None:
        assert self.held() == self.ours.keys()


TestAnyOrderOfMessages = AnyOrder.TestCase
TestAnyOrderOfMessages.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def flash_crowd(policy: str) -> list[tuple[float, str]]:
    """Twenty workflows teach their shape: a call of another model, then four calls of "m". Then sixty come at once."""
    group = a_group(start_s=10.0, max_replicas=8)
    scaler = ScalerAgent(
        ScalerSettings(
            groups=(group,), policy=policy, parameters={} if policy == "static" else {"target_in_flight": 8.0}
        )
    )
    world = SlowStarts([group], [10.0])
    switchboard = Switchboard([RouterAgent(RouterSettings(models=["m"])), scaler], epoch=1, journal=MemoryJournal())
    shell = VirtualShell(switchboard, world)
    shell.post(changed("front", model="front"))
    shell.post(changed("fixed"))
    shell.post(PLAN)
    starts_s = [*(10.0 * n for n in range(20)), *[400.0 + 0.01 * n for n in range(60)]]
    for number, at_s in enumerate(starts_s):
        workflow_id = f"w{number}"
        shell.post(WorkflowSubmitted(workflow_id=workflow_id, kind="report"), at_s=at_s)
        for step, (offset_s, model) in enumerate([(0.0, "front"), *((15.0, "m") for _ in range(4))]):
            call = msgspec.structs.replace(a_call(f"c{number}-{step}", model=model), workflow_id=workflow_id)
            shell.post(CallReady(call=call, forecast=FORECAST), at_s=at_s + offset_s)
        shell.post(WorkflowEnded(workflow_id=workflow_id, state="finished"), at_s=at_s + 20.0)
    shell.run(until_s=450.0)
    assert switchboard.faults == 0
    return [deploy for deploy in world.deploys if deploy[0] >= 400.0]


def test_the_forecast_starts_replicas_before_the_calls_of_a_flash_crowd_are_there() -> None:
    forecast, tracking = flash_crowd("demand_forecast"), flash_crowd("target_tracking")
    assert flash_crowd("static") == []
    assert forecast[0][0] <= 405.0
    assert tracking[0][0] >= 415.0
