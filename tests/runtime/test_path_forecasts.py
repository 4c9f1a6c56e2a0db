"""A call tells the router how long its workflow still takes, as long as somebody can say so in time."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from swarmx.core.forecast import Forecast, point
from swarmx.core.messages import AlertRaised, CallReady, Message, WorkflowEnded, WorkflowSubmitted
from swarmx.core.nouns import Call
from swarmx.neural.structure_live import WorkflowForecasts
from swarmx.runtime.path_forecasts import PathForecasts
from swarmx.runtime.reliance import Reliance
from tests.agents.worlds import FORECAST, a_call, finished

BUDGET_S, REST_S = 0.002, 30.0


class HandClock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.at_s = 100.0

    def now_s(self) -> float:
        return self.at_s


class Scripted(WorkflowForecasts):
    """Answers with what the test says, and takes as long."""

    def __init__(self, clock: HandClock) -> None:
        super().__init__()
        self._clock = clock
        self.answer: Any = point(20.0, unit="s")
        self.takes_s = 0.0
        self.asked = 0

    def path(self, workflow_id: str, now_s: float) -> Forecast | None:
        self.asked += 1
        self._clock.at_s += self.takes_s
        if isinstance(self.answer, Exception):
            raise self.answer
        answer: Forecast | None = self.answer
        return answer


class Bench:
    def __init__(self, workflows: WorkflowForecasts | None = None) -> None:
        self.clock = HandClock()
        self.scripted = Scripted(self.clock)
        self.posted: list[Message] = []
        self.faults: list[str] = []
        self.paths = PathForecasts(
            self.scripted if workflows is None else workflows,
            Reliance(
                "workflows",
                budget_s=BUDGET_S,
                clock=self.clock,
                post=self.posted.append,
                rest_s=REST_S,
                busy_s=self.clock.now_s,
                on_rest=self.faults.append,
            ),
        )


def of_workflow(call_id: str, workflow_id: str) -> Call:
    return msgspec.structs.replace(a_call(call_id), workflow_id=workflow_id)


def test_a_call_outside_workflows_has_no_path_and_nobody_is_asked() -> None:
    bench = Bench()
    assert bench.paths.of(of_workflow("c", "")) is None
    assert bench.scripted.asked == 0


def test_the_call_itself_counts_and_is_not_counted_again_when_it_is_heard() -> None:
    workflows = WorkflowForecasts()
    bench = Bench(workflows)
    for number in range(20):
        name = f"past{number}"
        workflows.hear(WorkflowSubmitted(workflow_id=name, kind="report"), 0.0)
        for position, at_s in enumerate((0.0, 30.0)):
            workflows.hear(CallReady(call=of_workflow(f"{name}/{position}", name), forecast=FORECAST), at_s)
            workflows.hear(finished(f"{name}/{position}"), at_s + 10.0)
        workflows.hear(WorkflowEnded(workflow_id=name, state="finished"), 40.0)
    workflows.hear(WorkflowSubmitted(workflow_id="w", kind="report"), bench.clock.at_s)
    call = of_workflow("w/0", "w")
    path = bench.paths.of(call)
    workflows.hear(CallReady(call=call, forecast=FORECAST, path=path), bench.clock.at_s)
    assert path is not None
    assert path.quantile(0.5) == pytest.approx(40.0, rel=0.2)
    assert path == workflows.path("w", bench.clock.at_s) == bench.paths.of(call)


def test_of_a_workflow_that_nobody_knows_there_is_no_word_and_no_fault() -> None:
    bench = Bench(WorkflowForecasts())
    assert [bench.paths.of(of_workflow(f"c{number}", "unknown")) for number in range(40)] == [None] * 40
    assert bench.faults == []


@pytest.mark.parametrize(
    ("answer", "fault"),
    [(ValueError("broken"), "raised"), (point(20.0, unit="tokens"), "unsound")],
)
def test_what_is_no_path_is_not_told_and_the_predictor_rests_when_it_happens_often(answer: Any, fault: str) -> None:
    bench = Bench()
    bench.scripted.answer = answer
    assert [bench.paths.of(a_call(f"c{number}")) for number in range(20)] == [None] * 20
    assert (bench.scripted.asked, bench.faults) == (8, [fault])
    assert bench.posted == [AlertRaised(kind="predictor_fallback", subject="workflows", value=REST_S)]
    bench.clock.at_s += REST_S
    bench.scripted.answer = point(20.0, unit="s")
    assert bench.paths.of(a_call("later")) == point(20.0, unit="s")


def test_a_path_that_takes_longer_than_the_budget_is_told_but_not_for_long() -> None:
    bench = Bench()
    bench.scripted.takes_s = 2.0 * BUDGET_S
    told = [bench.paths.of(a_call(f"c{number}")) for number in range(20)]
    assert [path is not None for path in told] == [True] * 8 + [False] * 12
    assert bench.faults == ["slow"]
