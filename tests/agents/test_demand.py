from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmx.agents import demand
from swarmx.agents.demand import HORIZONS_S, DemandSketch, Load
from swarmx.core.actions import StartTimer
from swarmx.core.messages import DemandReported, WorkflowSubmitted
from swarmx.core.nouns import Call
from tests.agents.worlds import a_call

NO_LOAD: Mapping[str, Load] = {}


_NUMBERS = itertools.count()


def call_of(workflow_id: str, model: str = "m") -> Call:
    return msgspec.structs.replace(a_call(f"c{next(_NUMBERS)}", model=model), workflow_id=workflow_id)


def begun(workflow_id: str, kind: str, *, again: bool = False) -> WorkflowSubmitted:
    return WorkflowSubmitted(workflow_id=workflow_id, kind=kind, submitted_at_s=0.0 if again else None)


@dataclass(slots=True)
class Past:
    """Workflows of one kind that ran one after the other: each a list of (seconds after submission, model)."""

    sketch: DemandSketch
    now_s: float = 0.0
    made: int = 0

    def ran(self, *calls: tuple[float, str], kind: str = "report", lasting_s: float = 100.0, times: int = 1) -> None:
        for _ in range(times):
            self.made += 1
            workflow_id = f"past{self.made}"
            self.sketch.submitted(begun(workflow_id, kind), self.now_s)
            for offset_s, model in calls:
                self.sketch.arrived(call_of(workflow_id, model), 10.0, self.now_s + offset_s)
            self.now_s += lasting_s
            self.sketch.workflow_ended(workflow_id, finished=True, now_s=self.now_s)


def a_past() -> Past:
    return Past(DemandSketch(2.0))


def reported(sketch: DemandSketch, now_s: float, loads: Mapping[str, Load] = NO_LOAD) -> dict[str, DemandReported]:
    return {report.model: report for report in sketch.report(loads, now_s) if isinstance(report, DemandReported)}


def by_horizon(values: Iterable[float]) -> dict[float, float]:
    return dict(zip(HORIZONS_S, (pytest.approx(value) for value in values), strict=True))


def test_a_running_workflow_will_do_what_those_of_its_kind_did() -> None:
    past = a_past()
    past.ran((0.0, "a"), (3.0, "b"), (20.0, "b"), times=4)
    past.sketch.submitted(begun("w", "report"), past.now_s)
    past.sketch.arrived(call_of("w", "a"), 10.0, past.now_s)
    reports = reported(past.sketch, past.now_s)
    assert by_horizon(reports["b"].upcoming_mean) == by_horizon([0, 1, 1, 1, 2, 2, 2, 2])
    assert by_horizon(reports["a"].upcoming_mean) == by_horizon([0] * 8)
    assert reports["b"].upcoming_p90 == reports["b"].upcoming_mean


def test_a_workflow_that_has_called_nothing_yet_has_all_its_calls_before_it() -> None:
    past = a_past()
    past.ran((0.0, "a"), (3.0, "b"))
    past.sketch.submitted(begun("w", "report"), past.now_s)
    reports = reported(past.sketch, past.now_s)
    assert (reports["a"].upcoming_mean[0], reports["b"].upcoming_mean[1]) == (1.0, 1.0)


def test_time_that_has_passed_since_the_last_call_brings_the_next_one_nearer() -> None:
    past = a_past()
    past.ran((0.0, "a"), (30.0, "b"), times=3)
    past.sketch.submitted(begun("w", "report"), past.now_s)
    past.sketch.arrived(call_of("w", "a"), 10.0, past.now_s)
    assert by_horizon(reported(past.sketch, past.now_s + 27.0)["b"].upcoming_mean) == by_horizon(
        [0, 1, 1, 1, 1, 1, 1, 1]
    )


def test_a_workflow_that_is_quiet_for_longer_than_others_waited_between_calls_will_call_no_more() -> None:
    past = a_past()
    past.ran((0.0, "a"), (5.0, "a"), lasting_s=600.0)
    past.ran((0.0, "a"), lasting_s=600.0)
    past.sketch.submitted(begun("w", "report"), past.now_s)
    past.sketch.arrived(call_of("w", "a"), 10.0, past.now_s)
    assert reported(past.sketch, past.now_s + 1.0)["a"].upcoming_mean[-1] == 0.5
    assert reported(past.sketch, past.now_s + 60.0)["a"].upcoming_mean[-1] == 0.0


def test_a_workflow_that_is_slower_than_all_others_is_due_at_once() -> None:
    past = a_past()
    past.ran((0.0, "a"), (5.0, "b"), lasting_s=10.0)
    past.sketch.submitted(begun("w", "report"), past.now_s)
    past.sketch.arrived(call_of("w", "a"), 10.0, past.now_s)
    assert reported(past.sketch, past.now_s + 50.0)["b"].upcoming_mean[0] == 1.0


def test_a_call_that_is_offered_again_after_a_refusal_is_counted_once() -> None:
    def seen(*offered_at_s: float) -> list[dict[str, DemandReported]]:
        sketch = DemandSketch(2.0)
        sketch.submitted(begun("w", "report"), 0.0)
        call = call_of("w", "a")
        for at_s in offered_at_s:
            sketch.arrived(call, 10.0, at_s)
        sketch.arrived(call_of("w", "b"), 10.0, 5.0)
        sketch.workflow_ended("w", finished=True, now_s=6.0)
        first = reported(sketch, 6.0)
        sketch.submitted(begun("next", "report"), 7.0)
        return [first, reported(sketch, 8.0)]

    assert seen(1.0, 2.0, 3.0) == seen(1.0)


def test_calls_outside_workflows_are_never_taken_for_one_that_is_offered_again() -> None:
    past = a_past()
    call = call_of("unknown", "a")
    for number in range(3):
        past.sketch.arrived(call, 10.0, float(number))
    assert reported(past.sketch, 3.0)["a"].arrived == 3


def test_of_the_calls_that_might_come_again_only_the_latest_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demand, "MOST_REMEMBERED", 2)
    past = a_past()
    past.sketch.submitted(begun("w", "report"), 0.0)
    first, second, third = (call_of("w", "a") for _ in range(3))
    for call in (first, second, first, third, first, second):  # when the third came, the second was forgotten
        past.sketch.arrived(call, 10.0, 1.0)
    assert reported(past.sketch, 2.0)["a"].arrived == 4


def test_means_and_variances_of_independent_workflows_add() -> None:
    past = a_past()
    past.ran((0.0, "a"), (1.0, "b"), times=32)
    past.ran((0.0, "a"), times=32)
    for number in range(100):
        past.sketch.submitted(begun(f"w{number}", "report"), past.now_s)
        past.sketch.arrived(call_of(f"w{number}", "a"), 10.0, past.now_s)
    report = reported(past.sketch, past.now_s)["b"]
    assert report.upcoming_mean[0] == pytest.approx(50.0)
    assert report.upcoming_p90[0] == pytest.approx(50.0 + 1.2816 * 5.0, abs=0.01)


def test_only_those_that_made_as_many_calls_tell_what_comes_next() -> None:
    past = a_past()
    past.ran((0.0, "a"), times=9)
    past.ran((0.0, "a"), (1.0, "a"), (2.0, "b"))
    past.sketch.submitted(begun("w", "report"), past.now_s)
    for _ in range(2):
        past.sketch.arrived(call_of("w", "a"), 10.0, past.now_s)
    assert reported(past.sketch, past.now_s)["b"].upcoming_mean[-1] == 1.0


def test_another_kind_and_one_that_failed_teach_nothing() -> None:
    past = a_past()
    past.ran((0.0, "a"), (1.0, "b"), kind="other")
    past.sketch.submitted(begun("broken", "report"), past.now_s)
    past.sketch.arrived(call_of("broken", "b"), 10.0, past.now_s)
    past.sketch.workflow_ended("broken", finished=False, now_s=past.now_s)
    past.sketch.submitted(begun("w", "report"), past.now_s)
    assert reported(past.sketch, past.now_s)["b"].upcoming_mean == (0.0,) * len(HORIZONS_S)


def test_fresh_calls_are_the_rate_of_submissions_times_what_such_workflows_call_within_the_horizon() -> None:
    past = a_past()
    past.ran((0.0, "a"), (10.0, "b"), lasting_s=10.0)
    for number in range(2000):  # one a second, in steady state; each is over before the report
        past.now_s += 1.0
        past.sketch.submitted(begun(f"w{number}", "report"), past.now_s)
        past.sketch.arrived(call_of(f"w{number}", "a"), 10.0, past.now_s)
        past.sketch.arrived(call_of(f"w{number}", "b"), 10.0, past.now_s + 10.0)
        past.sketch.workflow_ended(f"w{number}", finished=True, now_s=past.now_s + 10.0)
        if number % 2:
            reports = reported(past.sketch, past.now_s)
    expected = {"a": [2, 4, 8, 16, 32, 64, 128, 256], "b": [0, 0, 0, 6, 22, 54, 118, 246]}
    for model, fresh in expected.items():
        assert list(reports[model].fresh_mean) == pytest.approx(fresh, rel=1e-6, abs=1e-6)


def test_workflows_that_go_on_after_a_restart_are_no_new_demand() -> None:
    def fresh(*, again: bool) -> float:
        past = a_past()
        past.ran((0.0, "a"))
        for number in range(100):
            past.sketch.submitted(begun(f"w{number}", "report", again=again), past.now_s)
        return reported(past.sketch, past.now_s)["a"].fresh_mean[0]

    assert fresh(again=True) < 1.0 < fresh(again=False)


def test_calls_without_a_workflow_are_expected_at_their_rate() -> None:
    sketch = DemandSketch(2.0)
    for number in range(1000):
        sketch.arrived(call_of("nobody"), 10.0, float(number))
        if number % 2:
            report = reported(sketch, float(number))["m"]
    assert list(report.fresh_mean) == pytest.approx([1.0 * horizon_s for horizon_s in HORIZONS_S], rel=1e-6)
    assert report.upcoming_mean == (0.0,) * len(HORIZONS_S)


def test_calls_of_a_kind_that_nobody_knows_yet_count_like_calls_without_a_workflow() -> None:
    sketch = DemandSketch(2.0)
    sketch.submitted(begun("w", "report"), 0.0)
    sketch.arrived(call_of("w"), 10.0, 1.0)
    assert reported(sketch, 2.0)["m"].fresh_mean[0] > 0.0


def test_calls_of_a_kind_are_not_expected_twice_once_its_shape_is_known() -> None:
    sketch = DemandSketch(2.0)
    for second in range(120):
        now_s = float(second)
        sketch.submitted(begun(f"w{second}", "report"), now_s)
        for _ in range(5):
            sketch.arrived(call_of(f"w{second}"), 10.0, now_s)
        if second >= 60:
            sketch.workflow_ended(f"w{second - 60}", finished=True, now_s=now_s)
        if second % 2:
            report = reported(sketch, now_s)["m"]
            expected = report.fresh_mean[5] + report.upcoming_mean[5]  # within 64 s
            assert expected <= 1.1 * 5.0 * 64.0, f"after {second} s"


def test_a_rate_fades_while_nothing_happens() -> None:
    sketch = DemandSketch(2.0)
    sketch.arrived(call_of("nobody"), 10.0, 1.0)
    lively = reported(sketch, 2.0)["m"].fresh_mean[0]
    reported(sketch, 4.0)
    sketch.submitted(begun("w", "report"), 64.0)
    assert reported(sketch, 66.0)["m"].fresh_mean[0] == pytest.approx(lively * 2.718281828 ** (-64.0 / 30.0))


def test_the_last_report_expects_nothing_and_stops_the_timer() -> None:
    sketch = DemandSketch(2.0)
    assert sketch.arrived(call_of("nobody"), 10.0, 1.0) == [StartTimer(key="demand", at_s=3.0)]
    assert StartTimer(key="demand", at_s=5.0) in sketch.report(NO_LOAD, 3.0)
    (last,) = sketch.report(NO_LOAD, 5.0)
    assert isinstance(last, DemandReported)
    assert not any(last.fresh_mean)
    assert sketch.report(NO_LOAD, 7.0) == []


def test_the_work_of_a_call_is_a_mean_at_first_and_follows_later() -> None:
    sketch = DemandSketch(2.0)
    for work in (10.0, 20.0, 60.0):
        sketch.arrived(call_of("nobody"), work, 0.0)
    assert reported(sketch, 2.0)["m"].work_per_call == pytest.approx(30.0)
    for _ in range(500):
        sketch.arrived(call_of("nobody"), 100.0, 3.0)
    assert reported(sketch, 4.0)["m"].work_per_call == pytest.approx(100.0)


def test_without_reports_nothing_is_kept() -> None:
    sketch = DemandSketch(0.0)
    assert sketch.submitted(begun("w", "report"), 0.0) == []
    assert sketch.arrived(call_of("w"), 10.0, 0.0) == []
    assert sketch.report(NO_LOAD, 2.0) == []
    assert not sketch._models
    assert not sketch._running


def test_memory_is_bounded_whatever_clients_name_things(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demand, "MOST_RUNNING", 50)
    sketch = DemandSketch(2.0)
    for number in range(400):
        sketch.submitted(begun(f"w{number}", f"kind{number}"), float(number))
        for _ in range(100):
            sketch.arrived(call_of(f"w{number}"), 10.0, float(number))
        if number % 2:
            sketch.workflow_ended(f"w{number}", finished=True, now_s=float(number))
    past = Past(sketch, now_s=400.0)
    past.ran((0.0, "m"), times=100)
    assert len(sketch._running) == 49  # full, and the last one has ended
    assert len(sketch._kinds) == demand.MOST_KINDS
    assert len(sketch._kinds["report"].shapes().calls) == demand.MOST_HISTORY
    assert max(len(workflow.offsets_s) for workflow in sketch._running.values()) == demand.MOST_CALLS
    assert "w0" not in sketch._running


def test_the_kind_that_was_submitted_longest_ago_is_forgotten_first() -> None:
    past = a_past()
    past.ran((0.0, "a"), (1.0, "b"), kind="old")
    for number in range(demand.MOST_KINDS - 1):
        past.ran((0.0, "a"), kind=f"kind{number}")
    past.ran((0.0, "a"), (1.0, "b"), kind="old")
    past.ran((0.0, "a"), kind="new")
    past.sketch.submitted(begun("w", "old"), past.now_s)
    assert reported(past.sketch, past.now_s)["b"].upcoming_mean[0] == 1.0


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["submit", "call", "finish", "fail", "end", "report"]),
        st.sampled_from(["w0", "w1", "w2", ""]),
        st.sampled_from(["m", "other"]),
        st.floats(0.0, 50.0),
    ),
    max_size=60,
)


@settings(deadline=None)
@given(steps=STEPS)
def test_any_history_gives_sound_reports_and_the_same_ones_again(steps: list[tuple[str, str, str, float]]) -> None:
    def run() -> list[Any]:
        sketch, now_s, said = DemandSketch(2.0), 0.0, []
        for step, workflow_id, model, by_s in steps:
            now_s += by_s
            match step:
                case "submit":
                    sketch.submitted(begun(workflow_id, f"kind of {workflow_id}"), now_s)
                case "call":
                    sketch.arrived(call_of(workflow_id, model), by_s, now_s)
                case "finish" | "fail":
                    sketch.workflow_ended(workflow_id, finished=step == "finish", now_s=now_s)
                case "end":
                    sketch.ended(model)
                case _:
                    said += sketch.report({"m": Load(1, 0, by_s)}, now_s)
        return said

    said = run()
    assert run() == said
    for report in said:
        if isinstance(report, DemandReported):
            for values in (report.upcoming_mean, report.upcoming_p90, report.fresh_mean):
                assert len(values) == len(HORIZONS_S)
                assert all(value >= 0.0 for value in values)
                assert list(values) == sorted(values)
            assert all(p90 >= mean for mean, p90 in zip(report.upcoming_mean, report.upcoming_p90, strict=True))
            assert report.window_s >= 0.0
