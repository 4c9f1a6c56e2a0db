"""What a tool shows is what it does; what it did, it takes back; what does not fit, it refuses by name."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from swarmx.core.actions import Cordon, Drain
from swarmx.core.control import Diff, Proposal, Scalar, ToolCall
from swarmx.core.errors import ConfigError, NotFound, Refused
from swarmx.core.messages import BoundsChanged, PolicyChanged, ScaleRequested, ScalingPolicyChanged
from swarmx.tools.registry import Registry, Understood, make_registry
from swarmx.tools.tool import ControlTool, ReadTool
from tests.tools.worlds import CATALOGUE, LIMIT, OPERATOR, WEIGHT, World, call, decision_about

REGISTRY = make_registry(CATALOGUE)
Facts = dict[tuple[str, str], Scalar | None]


def understood(asked: ToolCall, registry: Registry = REGISTRY) -> Understood:
    found = registry.understand(asked)
    assert isinstance(found.tool, ControlTool)
    return found


def refusal(world: World, asked: ToolCall, proposals: tuple[Proposal, ...] = ()) -> str:
    found = understood(asked)
    with pytest.raises(Refused) as refused:
        found.tool.check(found.args, world.view(proposals))
    return refused.value.rule


def do(world: World, asked: ToolCall, proposals: tuple[Proposal, ...] = ()) -> Diff:
    """Check, show and apply the call."""
    found = understood(asked)
    view = world.view(proposals)
    found.tool.check(found.args, view)
    diff = found.tool.diff(found.args, view)
    for output in found.tool.apply(found.args, view, world.at_s):
        world.do(output)
    return diff


def applied(asked: ToolCall, diff: Diff, *, state: str = "applied") -> Proposal:
    fields = {
        "proposal_id": "pr-1",
        "at_s": 1000.0,
        "expires_at_s": 1900.0,
        "actor": OPERATOR,
        "via": "cli",
        "call": REGISTRY.understand(asked).call,
        "diff": diff,
        "state": state,
    }
    return msgspec.convert(fields, Proposal)


def promised(before: Facts, diff: Diff) -> Facts:
    """The facts once the diff has come true."""
    facts = dict(before)
    for change in diff.changes:
        facts[change.subject, change.what] = change.after
    return {key: value for key, value in facts.items() if value is not None}


def concerned(facts: Facts, tool: str) -> Facts:
    """Without what the tool leaves open: which replicas a scaled model wins or loses; how many a drain leaves."""
    left_open = {"scale_model": "state", "drain_replica": "replicas", "cordon_replica": "replicas"}.get(tool)
    return {key: value for key, value in facts.items() if key[1] != left_open}


def try_to(world: World, asked: ToolCall) -> Diff | None:
    try:
        return do(world, asked)
    except Refused:
        return None


CALLS = st.one_of(
    st.builds(
        lambda m, n: call("scale_model", model=m, replicas=n), st.sampled_from(["coder", "writer"]), st.integers(1, 4)
    ),
    st.builds(
        lambda m, low, more: call("set_replica_bounds", model=m, min_replicas=low, max_replicas=low + more),
        st.sampled_from(["coder", "writer"]),
        st.integers(0, 3),
        st.integers(0, 3),
    ),
    st.builds(lambda r: call("drain_replica", replica_id=r), st.sampled_from(["coder-1", "writer-2", "painter-1"])),
    st.builds(
        lambda r, on: call("cordon_replica", replica_id=r, cordoned=on),
        st.sampled_from(["coder-1", "writer-2"]),
        st.booleans(),
    ),
    st.builds(
        lambda p, w: call("set_routing_policy", policy=p, parameters={} if p == "least_work" else {"weight": w}),
        st.sampled_from(["least_work", "sticky"]),
        st.floats(0.0, 8.0),
    ),
    st.builds(lambda p: call("set_scaling_policy", policy=p), st.sampled_from(["static", "tracking"])),
    st.builds(
        lambda p, v: call("set_policy_parameter", kind="scaling", parameter=p, value=v),
        st.sampled_from(["low", "high"]),
        st.floats(0.4, 0.8),
    ),
)


@given(st.lists(CALLS, max_size=6), CALLS)
def test_a_dry_run_says_exactly_what_applying_does(history: list[ToolCall], last: ToolCall) -> None:
    world = World()
    for earlier in history:
        try_to(world, earlier)
    before = world.facts()
    diff = try_to(world, last)
    assume(diff is not None)
    assert diff is not None
    assert all(before.get((change.subject, change.what)) == change.before for change in diff.changes)
    assert concerned(world.facts(), last.tool) == concerned(promised(before, diff), last.tool)


@given(st.lists(CALLS, max_size=6), CALLS)
def test_a_roll_back_restores_everything(history: list[ToolCall], last: ToolCall) -> None:
    world = World()
    for earlier in history:
        try_to(world, earlier)
    low, high = world.bounds.get(last.arguments.get("model", ""), (0, LIMIT))
    assume(last.tool != "scale_model" or low <= len(world.having(last.arguments["model"], "ready", "starting")) <= high)
    before = world.facts()
    diff = try_to(world, last)
    assume(diff is not None and diff.changes)
    assert diff is not None
    undo, proposals = call("rollback", proposal_id="pr-1"), (applied(last, diff),)
    if last.tool == "drain_replica":
        assert refusal(world, undo, proposals) == "irreversible"
    else:
        do(world, undo, proposals)
        assert concerned(world.facts(), last.tool) == concerned(before, last.tool)


def test_a_roll_back_is_refused_when_the_world_went_on() -> None:
    world = World()
    asked = call("set_replica_bounds", model="coder", min_replicas=2, max_replicas=4)
    proposal = applied(asked, do(world, asked))
    do(world, call("set_replica_bounds", model="coder", min_replicas=3, max_replicas=4))
    assert refusal(world, call("rollback", proposal_id="pr-1"), (proposal,)) == "stale"


@pytest.mark.parametrize("state", ["open", "suggested", "denied", "expired", "stale", "failed", "rolled_back"])
def test_only_what_is_in_force_is_rolled_back(state: str) -> None:
    world = World()
    asked = call("cordon_replica", replica_id="coder-1", cordoned=True)
    proposal = applied(asked, do(world, asked), state=state)
    assert refusal(world, call("rollback", proposal_id="pr-1"), (proposal,)) == "state"


def test_a_roll_back_of_a_roll_back_or_of_nothing_is_refused() -> None:
    world = World()
    asked = call("cordon_replica", replica_id="coder-1", cordoned=True)
    first = applied(asked, do(world, asked))
    undo = call("rollback", proposal_id="pr-1")
    second = applied(undo, do(world, undo, (first,)))
    assert refusal(world, undo, (second,)) == "irreversible"
    assert refusal(world, call("rollback", proposal_id="pr-9"), (first,)) == "unknown_target"


def test_switching_a_policy_and_back_restores_its_parameters() -> None:
    world = World()
    do(world, call("set_policy_parameter", kind="scaling", parameter="high", value=0.7))
    asked = call("set_scaling_policy", policy="static")
    proposal = applied(asked, do(world, asked))
    assert world.scaling.parameters == {}
    do(world, call("rollback", proposal_id="pr-1"), (proposal,))
    assert (world.scaling.policy, world.scaling.parameters) == ("tracking", {"low": 0.4, "high": 0.7})


@pytest.mark.parametrize(
    ("asked", "rule"),
    [
        (call("scale_model", model="coda", replicas=2), "unknown_target"),
        (call("scale_model", model="painter", replicas=2), "not_elastic"),
        (call("scale_model", model="coder", replicas=5), "bounds"),
        (call("scale_model", model="coder", replicas=0), "bounds"),
        (call("set_replica_bounds", model="coder", min_replicas=1, max_replicas=LIMIT + 1), "bounds"),
        (call("set_replica_bounds", model="painter", min_replicas=1, max_replicas=1), "not_elastic"),
        (call("drain_replica", replica_id="coder-9"), "unknown_target"),
        (call("cordon_replica", replica_id="coder-9", cordoned=True), "unknown_target"),
        (call("set_routing_policy", policy="lest_work"), "unknown_target"),
        (call("set_routing_policy", policy="sticky", parameters={"wait": 1.0}), "unknown_target"),
        (call("set_routing_policy", policy="sticky", parameters={"weight": 9.0}), "bounds"),
        (call("set_scaling_policy", policy="tracking", parameters={"low": 0.9, "high": 0.2}), "bounds"),
        (call("set_policy_parameter", kind="routing", parameter="weight", value=1.0), "unknown_target"),
        (call("set_policy_parameter", kind="scaling", parameter="high", value=1.1), "bounds"),
        (call("set_policy_parameter", kind="scaling", parameter="high", value=0.3), "bounds"),
    ],
)
def test_what_does_not_fit_the_world_is_refused_by_name(asked: ToolCall, rule: str) -> None:
    assert refusal(World(), asked) == rule


def test_replicas_that_are_gone_or_on_their_way_are_not_cordoned() -> None:
    world = World()
    world.put("coder-1", "gone")
    world.put("coder-2", "draining")
    assert refusal(world, call("drain_replica", replica_id="coder-1")) == "unknown_target"
    assert refusal(world, call("cordon_replica", replica_id="coder-2", cordoned=False)) == "state"


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        (call("scale_modell", model="coder", replicas=2), "Did you mean 'scale_model'"),
        (call("scale_model", model="coder"), "replicas: Field required"),
        (call("scale_model", model="coder", replicas="two"), "replicas: .*valid integer"),
        (call("scale_model", model="coder", replicas=2.5), "replicas: .*valid integer"),
        (call("scale_model", model="coder", replicas=True), "replicas: .*valid integer"),
        (call("scale_model", model="coder", replicas=-1), "replicas: .*greater than or equal to 0"),
        (call("scale_model", model="coder", replicas=1001), "replicas: .*less than or equal to 1000"),
        (call("scale_model", model="x" * 129, replicas=1), "model: .*at most 128"),
        (call("scale_model", model="coder", replicas=1, hold_s=float("nan")), "hold_s: "),
        (call("scale_model", model="coder", replicas=1, sudo=True), "sudo: Extra inputs"),
        (call("set_replica_bounds", model="coder", min_replicas=3, max_replicas=2), "min_replicas is 3, above"),
        (call("set_policy_parameter", kind="scaling", parameter="high", value=float("inf")), "value: "),
        (call("set_policy_parameter", kind="other", parameter="high", value=1.0), "kind: "),
        (call("set_routing_policy", policy="sticky", parameters={"weight": float("nan")}), "parameters.weight"),
        (call("no_op", why="so"), "why: Extra inputs"),
    ],
)
def test_arguments_that_do_not_fit_are_explained(asked: ToolCall, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        REGISTRY.understand(asked)


def test_complaints_about_huge_arguments_stay_short() -> None:
    with pytest.raises(ConfigError) as error:
        REGISTRY.understand(call("no_op", **{f"{'x' * 1000}{n}": "y" * 10_000 for n in range(100)}))
    assert len(str(error.value)) < 600
    assert "and 97 more" in str(error.value)


def test_a_reason_comes_along_and_is_no_argument() -> None:
    found = REGISTRY.understand(call("scale_model", model="coder", replicas=3, reason="crowd"))
    assert found.reason == "crowd"
    assert found.call.arguments == {"model": "coder", "replicas": 3, "hold_s": 300.0}
    assert REGISTRY.understand(call("no_op", reason={"not": "text"})).reason == ""


def test_what_goes_out_carries_the_arguments() -> None:
    world = World()

    def outputs(asked: ToolCall) -> object:
        found = understood(asked)
        (output,) = found.tool.apply(found.args, world.view(), world.at_s)
        return output

    assert outputs(call("scale_model", model="coder", replicas=3, hold_s=60.0)) == ScaleRequested(
        model="coder", replicas=3, hold_s=60.0
    )
    assert outputs(call("set_replica_bounds", model="coder", min_replicas=0, max_replicas=5)) == BoundsChanged(
        model="coder", min_replicas=0, max_replicas=5
    )
    assert outputs(call("drain_replica", replica_id="coder-1", deadline_s=30.0)) == Drain(
        replica_id="coder-1", deadline_at_s=1030.0
    )
    assert outputs(call("cordon_replica", replica_id="coder-1", cordoned=True)) == Cordon(
        replica_id="coder-1", cordoned=True
    )
    assert outputs(call("set_routing_policy", policy="sticky")) == PolicyChanged(
        policy="sticky", parameters={"weight": 0.5}
    )
    assert outputs(call("set_policy_parameter", kind="scaling", parameter="high", value=0.9)) == ScalingPolicyChanged(
        policy="tracking", parameters={"low": 0.4, "high": 0.9}
    )


def test_a_dry_run_predicts_cost_load_and_time() -> None:
    found = understood(call("scale_model", model="coder", replicas=4))
    predicted = {line.metric: line.value for line in found.tool.diff(found.args, World().view()).predicted}
    assert predicted == {"cost_rate": 7 * WEIGHT, "calls_per_replica": 1.0, "ready_in_s": 5.0}


@pytest.mark.parametrize(
    ("low", "high", "replicas_paid", "replicas"),
    [(4, 6, 9, 4), (1, 6, 9, 2), (4, 4, 7, 4), (1, 3, 5, 2), (0, 1, 4, 1)],
    ids=["both raised", "most raised", "least raised", "most lowered", "most lowered below"],
)
def test_bounds_predict_the_cost_of_what_they_newly_allow(
    low: int, high: int, replicas_paid: int, replicas: int
) -> None:
    found = understood(call("set_replica_bounds", model="coder", min_replicas=low, max_replicas=high))
    predicted = {line.metric: line.value for line in found.tool.diff(found.args, World().view()).predicted}
    assert predicted == {"cost_rate": replicas_paid * WEIGHT, "replicas": replicas}


def test_reading_shows_the_cluster_a_model_and_a_decision() -> None:
    world = World()
    decision = decision_about("call-7")
    view = world.view(decisions={"call-7": (decision,)})

    def read(asked: ToolCall) -> dict[str, object]:
        found = REGISTRY.understand(asked)
        assert isinstance(found.tool, ReadTool)
        return found.tool.read(found.args, view)

    cluster = read(call("inspect_cluster"))
    assert cluster["cost_rate"] == 5 * WEIGHT
    assert cluster["routing"] == {"policy": "least_work", "parameters": {}}
    model = read(call("inspect_model", model="coder"))
    assert [row["replica_id"] for row in model["replicas"]] == ["coder-1", "coder-2"]  # type: ignore[attr-defined]
    assert msgspec.json.encode([cluster, model])
    why = read(call("why_decision", call_id="call-7"))
    assert why["decisions"][0]["why"] == [f"call-7 went to {decision.replica_id}"]  # type: ignore[index]
    assert read(call("no_op")) == {}
    with pytest.raises(NotFound, match="Did you mean 'coder'"):
        read(call("inspect_model", model="codr"))
    with pytest.raises(NotFound, match="no decision"):
        read(call("why_decision", call_id="call-8"))


def test_only_reading_why_asks_for_decisions() -> None:
    wanted = {}
    for asked in (call("why_decision", call_id="call-7"), call("inspect_cluster"), call("no_op")):
        found = REGISTRY.understand(asked)
        assert isinstance(found.tool, ReadTool)
        wanted[asked.tool] = found.tool.calls(found.args)
    assert wanted == {"why_decision": ("call-7",), "inspect_cluster": (), "no_op": ()}
