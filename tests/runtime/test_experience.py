"""What a record tells beside the outcome of its call."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.core.nouns import Candidates, Decision
from swarmx.core.records import CallRecord
from swarmx.runtime.experience import Positions, Sent
from tests.agents.worlds import FORECAST, a_call


def a_decision(*, cost_s: tuple[float | None, ...] | None) -> Decision:
    return Decision(
        call=a_call("c"),
        attempt=1,
        at_s=0.0,
        policy="least_work",
        parameters={},
        replica_id="b",
        runner_up="a",
        forecast=FORECAST,
        candidates=Candidates(
            total=2,
            replica_ids=("a", "b"),
            in_flight=(1, 7),
            remaining_work=(0.0, 0.0),
            context_tokens=(0.0, 0.0),
            signal_age_s=(None, None),
            cost_s=cost_s,
            terms_s={},
        ),
    )


def test_a_decision_tells_of_the_replica_that_it_chose() -> None:
    assert Sent.by(a_decision(cost_s=(1.0, 2.5))) == Sent(policy="least_work", ahead=7, expected_s=2.5)
    assert Sent.by(a_decision(cost_s=(1.0, None))).expected_s is None
    assert Sent.by(a_decision(cost_s=None)).expected_s is None


def test_without_a_decision_nothing_was_known() -> None:
    assert Sent.by(None) == Sent(policy="", ahead=None, expected_s=None)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans())))
def test_calls_are_numbered_from_one_within_each_workflow_until_it_ends(steps: list[tuple[str, bool]]) -> None:
    positions, counts = Positions(), Counter[str]()
    for workflow_id, ends in steps:
        if ends:
            positions.forget(workflow_id)
            del counts[workflow_id]
        else:
            counts[workflow_id] += 1
            assert positions.next(workflow_id) == counts[workflow_id]
        assert len(positions) == len(counts)


def test_the_workflow_that_was_silent_for_longest_makes_room_for_another() -> None:
    positions = Positions(limit=2)
    assert [positions.next(workflow_id) for workflow_id in ("a", "b", "a", "c")] == [1, 1, 2, 1]
    assert len(positions) == 2
    assert positions.next("a") == 3
    assert positions.next("b") == 1


def test_calls_without_a_workflow_are_not_counted() -> None:
    positions = Positions()
    assert [positions.next(""), positions.next("")] == [0, 0]
    assert len(positions) == 0


@pytest.mark.parametrize("name", CallRecord.__struct_fields__)
def test_a_field_of_a_record_is_explained(name: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "memory.md").read_text(encoding="utf-8")
    table = page.split("\n## A call\n")[1].split("\n## ")[0]
    assert any(f"`{name}`" in line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
