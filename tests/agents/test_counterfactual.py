"""What another policy would have done: asked about the view that the decision log kept, and honest about its gaps."""

from __future__ import annotations

from itertools import islice
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmx.agents.counterfactual import explain_instead, instead
from swarmx.agents.kept_view import fixed_columns, keep, view_of
from swarmx.agents.policies import POLICIES
from swarmx.agents.router import RouterAgent
from swarmx.agents.router_settings import RouterSettings
from swarmx.core.errors import ConfigError
from swarmx.core.fleet import COLUMNS
from swarmx.core.messages import CallReady, DecisionMade, FirstToken, SignalReported, WorkflowEnded, WorkflowSubmitted
from swarmx.core.nouns import Decision
from tests.agents.worlds import FORECAST, a_call, a_profile, changed, finished, ready

DRAWS = {"random", "power_of_two", "swarmx_paper_repo"}  # or break ties by drawing, where there are any


def decisions(
    policy: str,
    *,
    replicas: int = 5,
    calls: int = 40,
    seed: int = 0,
    slots: int = 64,
    parameters: Any = None,
    **more: Any,
) -> list[Decision]:
    """A router at work: devices of several speeds, prompts of several lengths, sessions, signals."""
    rng = np.random.default_rng(seed)
    agent = RouterAgent(RouterSettings(policy=policy, parameters=parameters or {}, demand_every_s=0.0, **more))
    agent.handle(WorkflowSubmitted(workflow_id="w", kind="report", target_s=30.0), 0.0)
    for number in range(replicas):
        profile = a_profile(speed=1.0 + number % 3, max_batch=slots, kv_capacity_tokens=50_000)
        agent.handle(changed(f"r{number}", profile=profile), 0.0)
        if number % 2:
            signal = SignalReported(replica_id=f"r{number}", running=number, waiting=1, kv_usage=0.3, measured_at_s=0.1)
            agent.handle(signal, 0.1)
    made = list[Decision]()
    for number in range(calls):
        about = {
            "prompt_tokens": int(rng.integers(1, 5000)),
            "session": f"s{number % 4}",
            "prefix": (number % 3, 10 + number % 3),
        }
        outputs = agent.handle(ready(f"c{number}", **about), 0.3 * number)
        made += [output.decision for output in outputs if isinstance(output, DecisionMade)]
        if number % 3 == 0:
            agent.handle(FirstToken(call_id=f"c{number}", attempt=1), 0.3 * number + 0.1)
    return made


def stored(decision: Decision) -> Decision:
    """As it comes back from the store."""
    return msgspec.json.decode(msgspec.json.encode(decision), type=Decision)


@pytest.mark.parametrize("policy", [name for name in POLICIES if name not in DRAWS])
def test_the_policy_that_decided_would_do_the_same_again(policy: str) -> None:
    for decision in decisions(policy):
        again = instead(stored(decision), policy)
        if any("drew at random" in note for note in again.notes):
            continue
        assert again.replica_id == decision.replica_id
        assert again.notes == []
        if decision.candidates.cost_s is not None:
            assert again.cost_s == pytest.approx(decision.candidates.cost_s, rel=1e-4, abs=1e-6)


def decisions_on_known_kinds() -> list[Decision]:
    """Marginal at work where earlier workflows told how such ones go: some of these are late, and targets differ."""
    agent = RouterAgent(RouterSettings(policy="marginal", demand_every_s=0.0))
    for number in range(3):
        agent.handle(changed(f"r{number}", profile=a_profile(speed=1.0 + number, max_batch=64)), 0.0)
    made = list[Decision]()
    for number in range(30):
        workflow_id, call_id, learns = f"w{number}", f"c{number}", number < 10
        at_s = 10.0 * number if learns else 100.0 + 0.1 * number
        begun = WorkflowSubmitted(
            workflow_id=workflow_id,
            kind="report",
            target_s=(5.0, 60.0, 600.0)[number % 3],
            submitted_at_s=None if learns else at_s - 3.0 * (number % 5),
        )
        agent.handle(begun, at_s)
        call = msgspec.structs.replace(a_call(call_id, prompt_tokens=100 * number + 1), workflow_id=workflow_id)
        outputs = agent.handle(CallReady(call=call, forecast=FORECAST), at_s)
        if learns:
            agent.handle(finished(call_id), at_s + 0.3)
            agent.handle(WorkflowEnded(workflow_id=workflow_id, state="finished"), at_s + 5.0)
        else:
            made += [output.decision for output in outputs if isinstance(output, DecisionMade)]
    return made


def test_marginal_would_weigh_the_calls_of_known_kinds_the_same_again() -> None:
    made, weights = decisions_on_known_kinds(), set[float]()
    assert len(made) == 20
    differs = {"usual_s": 0, "usual_call_s": 0}
    for decision in made:
        kept = stored(decision)
        again = instead(kept, "marginal")
        assert (again.replica_id, again.notes) == (decision.replica_id, [])
        assert again.cost_s == pytest.approx(decision.candidates.cost_s, rel=1e-4, abs=1e-6)
        view = view_of(kept.candidates)
        assert view is not None
        busy = view.in_flight > 0
        weights.update(view.weight[busy] / view.in_flight[busy])
        assert kept.workflow is not None
        for name in differs:
            blind = msgspec.structs.replace(kept, workflow=msgspec.structs.replace(kept.workflow, **{name: 0.0}))
            differs[name] += instead(blind, "marginal").cost_s != again.cost_s
    assert max(weights) > 100.0 * min(weights)
    assert min(differs.values()) > 10


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("asked", POLICIES)
def test_every_policy_can_be_asked_about_the_decision_of_every_other(policy: str, asked: str) -> None:
    decision = stored(decisions(policy, calls=9)[-1])
    other = instead(decision, asked)
    assert other.replica_id in decision.candidates.replica_ids
    assert explain_instead(decision, other)


def test_the_two_are_set_side_by_side() -> None:
    decision = decisions("round_robin", calls=2)[-1]
    other = instead(decision, "least_work")
    assert (decision.replica_id, other.replica_id) == ("r1", "r2")
    first, second = explain_instead(decision, other)
    assert first == "least_work would have sent it to r2 instead of r1."
    assert second.startswith("By its own measure: ")
    assert " for r2, " in second
    assert second.endswith(" for r1.")
    same = instead(decision, "round_robin")
    assert explain_instead(decision, same) == ["round_robin would have sent it to r1 as well."]


def test_a_policy_in_force_is_asked_with_its_own_parameters_and_another_with_its_defaults() -> None:
    decision = decisions("marginal", parameters={"externality": 0.25})[0]
    assert instead(decision, "marginal").parameters["externality"] == 0.25
    assert instead(decision, "sglang_cache_aware").parameters["cache_threshold"] == 0.3


def test_candidates_that_were_not_kept_are_told() -> None:
    other = instead(decisions("least_work", replicas=50)[0], "marginal")
    assert other.notes[0] == "Of 50 candidates 32 were kept, the best by least_work; it saw no others."


def test_a_policy_that_draws_is_said_to_have_drawn() -> None:
    other = instead(decisions("least_work")[0], "random")
    assert other.notes == ["random drew at random, here from a fixed seed: another draw may end elsewhere."]
    assert other == instead(decisions("least_work")[0], "random")


def test_a_policy_that_holds_calls_back_is_told_what_it_could_not_see() -> None:
    other = instead(decisions("least_work")[0], "marginal")
    assert "No candidate without room was kept, so marginal could not hold the call for one." in other.notes


def test_what_a_policy_that_waits_was_shown_is_told_by_the_candidates_and_not_by_its_name() -> None:
    crowded = next(
        d
        for d in decisions("marginal", replicas=3, calls=12, slots=2)
        if (view_of(d.candidates).room == 0).any()  # type: ignore[union-attr]
    )
    renamed = msgspec.structs.replace(crowded, policy="of_another_version", parameters={})
    assert instead(renamed, "least_work").notes[0].startswith("least_work holds no call back: it was shown the ")


def test_where_calls_go_to_full_replicas_as_well_nobody_would_have_held_one() -> None:
    decision = decisions("least_work", replicas=2, calls=9, slots=2, late_binding=False)[-1]
    assert (view_of(decision.candidates).room == 0).all()  # type: ignore[union-attr]
    assert not instead(decision, "marginal").hold


def test_a_policy_that_lets_no_call_wait_is_shown_the_candidates_with_room() -> None:
    made = decisions("marginal", replicas=3, calls=12, slots=2)
    crowded = next(d for d in made if (view_of(d.candidates).room == 0).any())  # type: ignore[union-attr]
    other = instead(crowded, "least_work")
    assert other.notes[0].startswith("least_work holds no call back: it was shown the ")
    assert other.cost_s is not None
    assert None in other.cost_s


def test_a_decision_that_an_older_version_stored_is_told_to_say_too_little() -> None:
    decision = decisions("least_work")[0]
    raw = msgspec.to_builtins(decision)
    del raw["candidates"]["view"], raw["workflow"], raw["waited_s"], raw["ahead"], raw["home"]
    old = msgspec.convert(raw, Decision)
    other = instead(old, "marginal")
    assert (other.replica_id, other.cost_s) == (None, None)
    (note,) = explain_instead(old, other)
    assert note == "This decision was stored without all that a policy looks at, by another version of SwarmX."


@pytest.mark.parametrize("field", ["chosen", "moving", "fixed", "which"])
def test_columns_of_another_shape_are_not_misread(field: str) -> None:
    seen = decisions("least_work")[0].candidates
    assert seen.view is not None
    cut = msgspec.structs.replace(seen.view, **{field: getattr(seen.view, field)[:-1]})
    assert view_of(msgspec.structs.replace(seen, view=cut)) is None


def test_columns_that_were_kept_before_calls_had_weights_are_not_misread() -> None:
    seen = decisions("least_work")[0].candidates
    assert seen.view is not None
    fewer = msgspec.structs.replace(seen.view, moving=seen.view.moving[: -4 * len(seen.replica_ids)])
    assert view_of(msgspec.structs.replace(seen, view=fewer)) is None


def test_an_unknown_policy_is_named_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'least_work'"):
        instead(decisions("least_work")[0], "least_wrok")


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), replicas=st.integers(1, 40))
def test_a_view_survives_the_store_to_seven_digits(seed: int, replicas: int) -> None:
    decision = next(islice(reversed(decisions("least_work", seed=seed, replicas=replicas, calls=6)), 1))
    view = view_of(decision.candidates)
    back = view_of(stored(decision).candidates)
    assert view is not None
    assert back is not None
    kept = keep(view, slice(None), fixed_columns([b"1234" * 10] * len(view)))
    assert len(kept.fixed) == 40
    for name in COLUMNS:
        np.testing.assert_allclose(getattr(back, name), getattr(view, name), rtol=1e-6)
