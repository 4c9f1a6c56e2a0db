"""The snapshot: every number of it, from the books that it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import pytest

from swarmx.core.control import Actor, ControlView, Diff, ModelStatus, PolicyStatus, Proposal, ToolCall
from swarmx.core.messages import AlertRaised
from swarmx.core.nouns import Decision
from swarmx.runtime.figures import Figures
from swarmx.runtime.fleet_book import FleetBook
from swarmx.runtime.overview import Overview
from tests.agents.worlds import a_profile, changed, ready
from tests.runtime.test_experience import a_decision
from tests.runtime.test_figures import ended, planned, reported

ROUTING = PolicyStatus(policy="least_work", parameters={"x": 1.0})
SCALING = PolicyStatus(policy="static", parameters={})


@dataclass
class Clock:
    at_s: float = 1000.0

    def now_s(self) -> float:
        return self.at_s


def a_proposal(proposal_id: str, at_s: float) -> Proposal:
    return Proposal(
        proposal_id=proposal_id,
        at_s=at_s,
        expires_at_s=at_s + 900.0,
        actor=Actor(type="key", name="olga", role="operator"),
        via="rest",
        call=ToolCall(tool="no_op", arguments={}),
        diff=Diff(changes=()),
        state="open",
    )


@dataclass
class World:
    """The real books, and what agents and store would say."""

    clock: Clock = field(default_factory=Clock)
    bounds: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    startups: dict[str, float] = field(default_factory=dict)
    proposals: list[Proposal] = field(default_factory=list)
    log: dict[str, list[Decision]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.book = FleetBook(self.clock)
        self.figures = Figures(models={"idle": "image"})

    def hear(self, *messages: object) -> None:
        for message in messages:
            self.book.observe(message, self.clock.at_s)  # type: ignore[arg-type]
            self.figures.observe(message, self.clock.at_s)  # type: ignore[arg-type]

    async def view(self, call_ids: Sequence[str] = ()) -> ControlView:
        async def proposals() -> Sequence[Proposal]:
            return self.proposals

        async def decisions(call_id: str) -> Sequence[Decision]:
            return self.log.get(call_id, [])

        overview = Overview(
            clock=self.clock,
            book=self.book,
            figures=self.figures,
            routing=lambda: ROUTING,
            scaling=lambda: SCALING,
            bounds=self.bounds.get,
            startup_s=self.startups.get,
            next_cost={"m": 0.5}.get,
            last_plan={plan.model: plan for plan in self.figures.plans}.get,
            proposals=proposals,
            decisions=decisions,
            workflows_running=lambda: 3,
        )
        return await overview.view(call_ids)


@pytest.fixture
def world() -> World:
    return World()


async def test_a_model_is_shown_with_its_replicas_its_load_and_how_its_calls_fared(world: World) -> None:
    world.bounds["m"], world.startups["m"] = (1, 4, 8), 42.0
    cheap = a_profile(cost_weight=0.5)
    world.hear(
        changed("a"),
        changed("b", profile=cheap),
        changed("c", "starting", profile=cheap),
        changed("d", "cordoned", profile=cheap),
        changed("e", "draining", profile=cheap),
        changed("f", "gone"),
        changed("z", model="other"),
        planned(wanted=2.5),
    )
    world.clock.at_s += 60.0
    for replica_id in ("a", "b", "b", "e", "z"):
        world.book.attempt_started(replica_id)
    world.hear(*[ready(f"c{i}") for i in range(30)], reported(waiting=7))
    for latency_s in (1.0, 2.0, 3.0):
        world.figures.call_ended(ended(world.clock.at_s, latency_s=latency_s, wait_s=0.5, work=100.0))
    world.figures.call_ended(ended(world.clock.at_s, state="failed", latency_s=9.0, wait_s=0.5, work=0.0))
    assert (await world.view()).models["m"] == ModelStatus(
        model="m",
        kind="llm",
        ready=2,
        starting=1,
        cordoned=1,
        draining=1,
        in_flight=4,
        waiting=7,
        window_s=60.0,
        arrivals_per_s=0.5,
        ended=4,
        failed=1,
        p50_s=2.0,
        p95_s=pytest.approx(2.9),
        wait_p95_s=0.5,
        cost_rate=3.0,
        min_replicas=1,
        max_replicas=4,
        limit=8,
        wanted=2.5,
        start_s=42.0,
        next_cost=0.5,
    )


async def test_a_model_that_has_no_replica_yet_is_shown(world: World) -> None:
    world.bounds["idle"] = (0, 2, 2)
    idle = (await world.view()).models["idle"]
    assert (idle.kind, idle.ready, idle.waiting, idle.cost_rate, idle.max_replicas) == ("image", 0, 0, 0.0, 2)
    assert (idle.p95_s, idle.wanted, idle.start_s) == (None, None, None)


async def test_a_model_that_cannot_be_scaled_has_no_bounds(world: World) -> None:
    world.hear(changed("a"))
    shown = (await world.view()).models["m"]
    assert (shown.min_replicas, shown.max_replicas, shown.limit) == (None, None, None)


@pytest.mark.parametrize(
    ("age_s", "busy", "waiting"), [(9.0, False, 7), (10.0, False, 0), (10.0, True, 7), (9.0, True, 7)]
)
async def test_an_old_report_counts_only_while_the_model_is_busy(
    world: World, age_s: float, busy: bool, waiting: int
) -> None:
    world.hear(changed("a"), reported(waiting=7))
    if busy:
        world.book.attempt_started("a")
    world.clock.at_s += age_s
    assert (await world.view()).models["m"].waiting == waiting


async def test_the_whole_is_shown(world: World) -> None:
    alert = AlertRaised(kind="at_max", subject="m", value=5.0)
    world.hear(changed("a"), changed("f", "gone"), alert, planned(at_s=1.0), planned("other", at_s=2.0))
    for latency_s in (1.0, 2.0, 3.0):
        world.figures.workflow_ended(latency_s, world.clock.at_s)
    world.proposals = [a_proposal("newer", 900.0), a_proposal("older", 800.0)]
    view = await world.view()
    assert (view.at_s, view.window_s) == (1000.0, 120.0)
    assert (view.routing, view.scaling, view.workflows_running) == (ROUTING, SCALING, 3)
    assert (view.workflows_ended, view.workflow_p95_s) == (3, pytest.approx(2.9))
    assert {name: row.state for name, row in view.replicas.items()} == {"a": "ready", "f": "gone"}
    assert sorted(view.models) == ["idle", "m"]
    assert [seen.kind for seen in view.alerts] == ["at_max"]
    assert [plan.at_s for plan in view.plans] == [1.0, 2.0]
    assert [proposal.proposal_id for proposal in view.proposals] == ["older", "newer"]


async def test_only_the_decisions_that_were_asked_for_are_shown(world: World) -> None:
    decision = a_decision(cost_s=None)
    world.log = {"c": [decision], "d": [decision, decision]}
    assert (await world.view()).decisions == {}
    assert (await world.view(["c", "nobody"])).decisions == {"c": (decision,), "nobody": ()}


async def test_a_view_can_be_sent(world: World) -> None:
    world.hear(changed("a"), planned())
    world.proposals = [a_proposal("p", 900.0)]
    view = await world.view()
    assert msgspec.json.decode(msgspec.json.encode(view), type=ControlView) == view
