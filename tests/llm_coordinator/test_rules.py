"""The rules: each one applies where it should, in their order, and not over and over."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from swarmx.core.control import ProposalState
from swarmx.llm_coordinator.rules import QUIET_S, choose, evidence_about
from tests.llm_coordinator.views import (
    PERSON,
    REGISTRY,
    a_model,
    a_plan,
    a_proposal,
    a_replica,
    a_view,
    an_alert,
)

OPENED = tuple(an_alert("breaker_opened", "coder-0", ago_s=ago_s) for ago_s in (100.0, 60.0, 20.0))
FULL = a_model("coder", waiting=5, wanted=3.2)
IDLE = a_model("coder", ready=1, max_replicas=8, wanted=1.0)
LONG = tuple(a_plan("coder", ago_s=ago_s, wanted=1.0) for ago_s in (2000.0, 600.0, 10.0))
BURST = a_plan("coder", ago_s=3000.0, wanted=7.0)


def chosen(*models: Any, step: int = 2, **changes: Any) -> tuple[str, dict[str, Any]]:
    choice = choose(a_view(*models, **changes), step=step)
    assert choice.reason
    assert choice.evidence
    REGISTRY.understand(choice.call)
    return choice.call.tool, choice.call.arguments


def test_a_replica_that_fails_again_and_again_is_cordoned() -> None:
    assert chosen(alerts=OPENED) == ("cordon_replica", {"replica_id": "coder-0", "cordoned": True})


@pytest.mark.parametrize(
    "change",
    [
        {"alerts": OPENED[1:]},
        {"alerts": (an_alert("breaker_opened", "coder-0", ago_s=130.0), *OPENED[1:])},
        {"replicas": {"coder-0": a_replica("coder-0", "coder", state="cordoned")}},
        {"models": {"coder": a_model("coder", ready=1)}},
        {"alerts": tuple(msgspec.structs.replace(alert, subject="unknown") for alert in OPENED)},
    ],
    ids=["too few", "one too old", "out already", "the last one", "unknown"],
)
def test_a_replica_stays_when(change: dict[str, Any]) -> None:
    assert chosen(**({"alerts": OPENED} | change))[0] == "no_op"


def test_after_a_policy_failed_the_router_goes_back_to_the_one_that_cannot() -> None:
    failed = (an_alert("policy_failed", "least_work"),)
    assert chosen(alerts=failed) == ("set_routing_policy", {"policy": "least_outstanding"})


def test_a_policy_that_failed_long_ago_or_is_not_in_force_is_left_alone() -> None:
    assert chosen(alerts=(an_alert("policy_failed", "round_robin"),))[0] == "no_op"
    assert chosen(alerts=(an_alert("policy_failed", "least_work", ago_s=121.0),))[0] == "no_op"


def test_a_model_that_waits_at_its_bound_gets_a_higher_one() -> None:
    assert chosen(FULL) == ("set_replica_bounds", {"model": "coder", "min_replicas": 1, "max_replicas": 4})


def test_a_bound_moves_by_no_more_than_a_step_and_not_beyond_the_limit() -> None:
    hungry = a_model("coder", waiting=5, wanted=100.0)
    assert chosen(hungry, step=3)[1]["max_replicas"] == 5
    assert chosen(msgspec.structs.replace(hungry, limit=3), step=3)[1]["max_replicas"] == 3


def test_an_alert_is_enough_and_says_how_many() -> None:
    asked = (an_alert("at_max", "coder", value=3.0),)
    assert chosen(alerts=(an_alert("at_max", "coder", value=3.0, ago_s=121.0),), step=4)[0] == "no_op"
    assert chosen(alerts=asked, step=4)[1] == {"model": "coder", "min_replicas": 1, "max_replicas": 3}


@pytest.mark.parametrize(
    "model",
    [
        a_model("coder", waiting=5, limit=2),
        a_model("coder", waiting=5, ready=1),
        a_model("coder", waiting=5, min_replicas=None, max_replicas=None, limit=None, wanted=None),
        a_model("coder", waiting=0, wanted=2.0),
    ],
    ids=["at the limit", "below its bound", "cannot be scaled", "content"],
)
def test_a_bound_stays_when_the_model_is(model: Any) -> None:
    assert chosen(model)[0] == "no_op"


def test_the_longest_queue_comes_first() -> None:
    assert chosen(FULL, a_model("chat", waiting=50))[1]["model"] == "chat"


def test_a_bound_that_was_far_too_high_for_long_is_lowered() -> None:
    assert chosen(IDLE, plans=LONG, step=3)[1] == {"model": "coder", "min_replicas": 1, "max_replicas": 5}
    assert chosen(IDLE, plans=LONG, step=7)[1]["max_replicas"] == 2
    assert chosen(IDLE, plans=(BURST, *LONG), step=7)[1]["max_replicas"] == 2


@pytest.mark.parametrize(
    ("model", "plans"),
    [
        (IDLE, LONG[1:]),
        (IDLE, ()),
        (IDLE, (*LONG, a_plan("coder", ago_s=5.0, wanted=4.0))),
        (IDLE, (BURST, *LONG[1:])),
        (msgspec.structs.replace(IDLE, waiting=1), LONG),
        (msgspec.structs.replace(IDLE, max_replicas=4), LONG),
    ],
    ids=["watched too briefly", "never watched", "wanted once", "wanted when it began", "waits", "hardly wide"],
)
def test_a_wide_bound_stays_when(model: Any, plans: Any) -> None:
    assert chosen(model, plans=plans)[0] == "no_op"


def test_a_change_that_is_not_verified_yet_is_not_made_again_but_for_a_raise_that_was_too_small() -> None:
    before = a_proposal("set_routing_policy", "applied", policy="least_outstanding")
    assert chosen(alerts=(an_alert("policy_failed", "least_work"),), proposals=(before,))[0] == "no_op"
    raised = a_proposal("set_replica_bounds", "applied", model="coder", min_replicas=1, max_replicas=3)
    assert chosen(FULL, proposals=(raised,))[0] == "set_replica_bounds"


def test_the_rules_have_an_order() -> None:
    failed = an_alert("policy_failed", "least_work")
    assert chosen(FULL, alerts=(*OPENED, failed))[0] == "cordon_replica"
    assert chosen(FULL, alerts=(failed,))[0] == "set_routing_policy"
    assert (
        chosen(
            FULL,
            a_model("chat", ready=1, max_replicas=8, wanted=1.0),
            plans=(a_plan("chat", ago_s=2000.0, wanted=1.0),),
        )[1]["model"]
        == "coder"
    )


@pytest.mark.parametrize(
    ("state", "ago_s", "quiet"),
    [
        ("open", 800.0, True),
        ("applied", 800.0, False),
        ("denied", QUIET_S - 1.0, True),
        ("denied", QUIET_S + 1.0, False),
        ("rolled_back", 60.0, True),
        ("suggested", 60.0, True),
        ("kept", 60.0, False),
    ],
)
def test_a_change_that_waits_or_came_to_nothing_is_not_proposed_again(
    state: ProposalState, ago_s: float, quiet: bool
) -> None:
    before = a_proposal("set_replica_bounds", state, ago_s=ago_s, model="coder", min_replicas=1, max_replicas=3)
    assert (chosen(FULL, proposals=(before,))[0] == "no_op") is quiet


def test_what_people_or_other_models_had_changed_does_not_keep_the_rules_quiet() -> None:
    others = (
        a_proposal("set_replica_bounds", "denied", actor=PERSON, model="coder", min_replicas=1, max_replicas=3),
        a_proposal("set_replica_bounds", "denied", model="chat", min_replicas=1, max_replicas=3),
        a_proposal("scale_model", "denied", model="coder", replicas=3),
    )
    assert chosen(FULL, proposals=others)[0] == "set_replica_bounds"


def test_evidence_is_about_the_model_of_the_call() -> None:
    view = a_view(FULL, alerts=OPENED)
    cordon = choose(view, step=2)
    assert {e.metric: e.value for e in cordon.evidence}["breaker_opened"] == 3
    about = {e.metric: (e.subject, e.value) for e in evidence_about(view, cordon.call)}
    assert about["waiting"] == ("coder", 5)
    idle = choose(a_view(), step=2)
    assert {e.metric: e.value for e in evidence_about(view, idle.call)} == {"workflow_p95_s": 21.5, "waiting": 5}


def test_the_figures_of_a_model_tell_the_window_that_they_are_over() -> None:
    new = msgspec.structs.replace(FULL, window_s=7.0)
    choice = choose(a_view(new), step=2)
    assert {e.metric: e.window_s for e in choice.evidence if e.window_s is not None} == {
        "arrivals_per_s": 7.0,
        "p95_s": 7.0,
    }


def test_a_suggestion_is_not_made_again_while_it_stands() -> None:
    call = choose(a_view(FULL), step=2).call
    made = a_proposal(call.tool, "suggested", ago_s=QUIET_S + 60.0, **call.arguments)
    assert chosen(FULL, proposals=(made,))[0] == "no_op"
