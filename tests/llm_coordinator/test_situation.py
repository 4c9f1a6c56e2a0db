"""The vector of a situation: fixed size, length one, blind to names and order, and alike for what is alike."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.core.control import ControlView
from swarmx.llm_coordinator.situation import DIMENSION, TRIGGERS, Trigger, embed, facts
from swarmx.llm_coordinator.snapshot import snapshot
from tests.llm_coordinator.views import WORDS, a_model, a_replica, a_view, an_alert


def vector(view: ControlView, trigger: Trigger = "timer") -> tuple[float, ...]:
    return embed(snapshot(view, trigger, WORDS)[0])


def likeness(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def test_stored_vectors_have_this_many_numbers() -> None:
    assert DIMENSION == 31
    assert len(vector(a_view())) == 31


@given(
    numbers=st.lists(st.integers(0, 10**9), min_size=4, max_size=4),
    times=st.lists(st.none() | st.floats(allow_nan=True, allow_infinity=True), min_size=3, max_size=3),
    trigger=st.sampled_from(TRIGGERS),
)
def test_whatever_the_numbers_it_is_finite_and_of_length_one(numbers: Any, times: Any, trigger: Any) -> None:
    ready, in_flight, waiting, ended = numbers
    model = a_model(
        "m", ready=ready % 100, in_flight=in_flight, waiting=waiting, ended=ended, p95_s=times[0], wanted=times[1]
    )
    found = vector(a_view(model, workflow_p95_s=times[2], models={"m": model}), trigger)
    assert all(map(math.isfinite, found))
    assert math.sqrt(sum(x * x for x in found)) == pytest.approx(1.0)


def test_an_empty_system_has_a_vector_too() -> None:
    empty = a_view(models={}, replicas={}, workflows_running=0, workflow_p95_s=None)
    assert vector(empty)[TRIGGERS.index("timer")] == pytest.approx(1.0)


def test_names_and_order_do_not_matter() -> None:
    one = a_view(a_model("a", waiting=5), a_model("b", in_flight=9))
    other = a_view(a_model("x", in_flight=9), a_model("y", waiting=5))
    assert vector(one) == pytest.approx(vector(other))


def test_every_feature_is_seen() -> None:
    base = a_view()
    rows = base.replicas
    busy = {**rows, "coder-0": a_replica("coder-0", "coder", in_flight=40)}
    full = {**rows, "coder-0": a_replica("coder-0", "coder", kv_usage=1.0)}
    changed = [
        *(
            a_view(a_model("coder", **{field: value}), replicas=rows)
            for field, value in {
                "ready": 3,
                "starting": 3,
                "cordoned": 2,
                "draining": 2,
                "in_flight": 40,
                "waiting": 7,
                "arrivals_per_s": 9.0,
                "p50_s": 9.0,
                "p95_s": 40.0,
                "wait_p95_s": 9.0,
                "failed": 90,
                "wanted": 6.0,
                "max_replicas": 6,
                "limit": 30,
                "cost_rate": 9.0,
            }.items()
        ),
        a_view(workflows_running=30),
        a_view(workflow_p95_s=90.0),
        a_view(replicas=busy),
        a_view(replicas=full),
        *(a_view(alerts=(an_alert(kind, "x"),)) for kind in ("breaker_opened", "policy_failed", "at_max")),
    ]
    assert all(likeness(vector(view), vector(base)) < 0.9999 for view in changed)
    assert all(likeness(vector(base, trigger), vector(base)) < 0.9999 for trigger in ("replica_failed", "at_max"))  # type: ignore[arg-type]


def test_a_like_situation_is_nearer_than_another() -> None:
    crowd = a_view(a_model("coder", waiting=40, in_flight=60, arrivals_per_s=12.0, p95_s=40.0, wanted=7.0))
    again = a_view(a_model("chat", waiting=55, in_flight=50, arrivals_per_s=15.0, p95_s=35.0, wanted=6.0))
    calm = a_view(a_model("coder", waiting=0, in_flight=1, arrivals_per_s=0.1, p95_s=2.0, wanted=0.4))
    assert likeness(vector(crowd, "at_max"), vector(again, "at_max")) > 0.98
    assert likeness(vector(crowd, "at_max"), vector(calm)) < 0.9


def test_facts_are_numbers_and_the_trigger() -> None:
    situation, _ = snapshot(a_view(a_model("coder", waiting=3), a_model("chat")), "at_max", WORDS)
    kept = facts(situation)
    assert (kept["trigger"], kept["models"], kept["waiting"], kept["workflow_p95_s"]) == ("at_max", 2, 3, 21.5)
    assert [key for key, value in kept.items() if isinstance(value, str)] == ["trigger"]
    unknown, _ = snapshot(a_view(workflow_p95_s=None), "timer", WORDS)
    assert "workflow_p95_s" not in facts(unknown)
