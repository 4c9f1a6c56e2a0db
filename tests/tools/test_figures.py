"""A change stays unless the figures say that it made things worse, and not the crowd."""

from __future__ import annotations

import pytest

from swarmx.core.control import Evidence, ToolCall
from swarmx.core.messages import PolicyChanged
from swarmx.tools.figures import figures_of
from swarmx.tools.registry import make_registry
from swarmx.tools.tool import ControlTool, Verification
from tests.tools.worlds import CATALOGUE, Load, World, call

REGISTRY = make_registry(CATALOGUE)

GROW = call("scale_model", model="coder", replicas=3)
SHRINK = call("scale_model", model="coder", replicas=1)
ROUTE = call("set_routing_policy", policy="sticky")
TUNE = call("set_policy_parameter", kind="scaling", parameter="high", value=0.9)
SCALING = call("set_scaling_policy", policy="static")


def verify(
    asked: ToolCall, *, seen: tuple[Evidence, ...] = (), world: World | None = None, **after: Load
) -> Verification:
    """Verify the call when the models' loads become `after`."""
    world = world or World()
    understood = REGISTRY.understand(asked)
    assert isinstance(understood.tool, ControlTool)
    diff = understood.tool.diff(understood.args, world.view())
    before = figures_of(diff, world.view())
    world.loads |= after
    return understood.tool.verify(diff, (*seen, *before), figures_of(diff, world.view()))


@pytest.mark.parametrize("asked", [GROW, call("set_replica_bounds", model="coder", min_replicas=2, max_replicas=4)])
def test_growth_stays_whatever_the_latency(asked: ToolCall) -> None:
    found = verify(asked, coder=Load(p95_s=400.0, waiting=50, arrivals_per_s=20.0))
    assert found == Verification(kept=True, metric="p95_s", before=4.0, after=400.0)


@pytest.mark.parametrize(
    "asked",
    [
        SHRINK,
        call("set_replica_bounds", model="coder", min_replicas=1, max_replicas=2),
        call("set_replica_bounds", model="coder", min_replicas=0, max_replicas=5),
        call("cordon_replica", replica_id="coder-1", cordoned=True),
        call("drain_replica", replica_id="coder-1"),
    ],
)
def test_less_capacity_is_judged_by_waiting_and_latency(asked: ToolCall) -> None:
    assert verify(asked, coder=Load(p95_s=4.9)).kept
    slower = verify(asked, coder=Load(p95_s=5.1))
    assert (slower.kept, slower.metric, slower.before, slower.after) == (False, "p95_s", 4.0, 5.1)
    waiting = verify(asked, coder=Load(waiting=3, arrivals_per_s=50.0))
    assert (waiting.kept, waiting.metric, waiting.before, waiting.after) == (False, "waiting", 0.0, 3.0)


def test_a_crowd_is_not_blamed_on_less_capacity() -> None:
    assert not verify(SHRINK, coder=Load(p95_s=9.0, arrivals_per_s=2.5)).kept
    assert verify(SHRINK, coder=Load(p95_s=9.0, arrivals_per_s=2.6)).kept


def test_putting_a_replica_back_is_growth() -> None:
    world = World()
    world.put("coder-1", "cordoned")
    asked = call("cordon_replica", replica_id="coder-1", cordoned=False)
    assert verify(asked, world=world, coder=Load(p95_s=9.0, waiting=9)).kept


@pytest.mark.parametrize("asked", [ROUTE, SCALING, TUNE])
def test_a_policy_is_judged_by_the_latency_of_comparable_load(asked: ToolCall) -> None:
    assert verify(asked, coder=Load(p95_s=4.5)).kept
    assert not verify(asked, coder=Load(p95_s=9.0)).kept
    assert verify(asked, coder=Load(p95_s=9.0, arrivals_per_s=4.0)).kept
    assert verify(asked, coder=Load(p95_s=9.0, ended=9)).kept


def test_models_count_by_their_calls() -> None:
    assert verify(ROUTE, coder=Load(p95_s=9.0, ended=12)).kept
    found = verify(ROUTE, coder=Load(p95_s=9.0), writer=Load(p95_s=1.0))
    assert found.kept
    assert found.after == pytest.approx((9.0 + 1.0 + 4.0) / 3)
    assert found.before == 4.0


def test_a_policy_under_which_calls_fail_is_worse() -> None:
    found = verify(ROUTE, coder=Load(failed=120, p95_s=None))
    assert (found.kept, found.metric, found.before) == (False, "failed_share", 0.0)
    assert found.after == pytest.approx(1 / 3)
    assert verify(ROUTE, coder=Load(failed=30)).kept


def test_calls_that_wait_speak_against_a_scaling_policy_only() -> None:
    assert verify(ROUTE, coder=Load(waiting=5)).kept
    assert not verify(SCALING, coder=Load(waiting=5)).kept
    assert not verify(TUNE, coder=Load(waiting=5)).kept
    assert verify(SCALING, coder=Load(waiting=5, arrivals_per_s=9.0)).kept
    crowded = World()
    crowded.loads["coder"] = Load(waiting=5)
    assert verify(SCALING, world=crowded).kept


def test_a_parameter_of_routing_is_judged_as_routing() -> None:
    world = World()
    world.do(PolicyChanged(policy="sticky", parameters={"weight": 0.5}))
    asked = call("set_policy_parameter", kind="routing", parameter="weight", value=0.6)
    assert verify(asked, world=world, coder=Load(waiting=5)).kept


def test_without_calls_there_is_nothing_to_hold_against_a_change() -> None:
    quiet = World(loads={name: Load(p95_s=None, ended=0) for name in ("coder", "writer", "painter")})
    for asked in (SHRINK, ROUTE, SCALING):
        found = verify(asked, world=quiet)
        assert (found.kept, found.before, found.after) == (True, None, None)


def test_the_proposers_own_evidence_does_not_count() -> None:
    claimed = Evidence(metric="p95_s", subject="coder", value=100.0)
    assert not verify(SHRINK, seen=(claimed,), coder=Load(p95_s=9.0)).kept


def test_idle_models_are_left_out_of_a_fleets_figures() -> None:
    world = World()
    world.loads["painter"] = Load(ended=0, p95_s=None)
    understood = REGISTRY.understand(ROUTE)
    assert isinstance(understood.tool, ControlTool)
    diff = understood.tool.diff(understood.args, world.view())
    assert {line.subject for line in figures_of(diff, world.view())} == {"coder", "writer"}
