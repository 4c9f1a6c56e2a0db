"""Rolling figures, against an oracle that keeps everything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.core.control import AlertSeen
from swarmx.core.messages import AlertRaised, DemandReported, ScalePlanned
from swarmx.core.records import CallRecord, CallState
from swarmx.core.scaling import ScalePlan
from swarmx.runtime.figures import Figures, ModelFigures
from tests.agents.worlds import a_profile, changed, ready


def ended(
    at_s: float,
    *,
    model: str = "m",
    state: CallState = "finished",
    latency_s: float = 1.0,
    wait_s: float | None = 0.25,
    work: float = 10.0,
) -> CallRecord:
    """The record of a call that ended then; without `wait_s` it was never dispatched."""
    ready_at_s = at_s - latency_s
    return CallRecord(
        call_id="c",
        tenant="t",
        workflow_id="w",
        workflow_kind="k",
        node="n",
        role="r",
        kind="llm",
        model=model,
        state=state,
        attempts=1,
        replica_id="a",
        device="cpu",
        prompt_key="00",
        prompt_bytes=9,
        prompt_tokens=3,
        work_done=work,
        forecast_p50=4.0,
        forecast_p90=8.0,
        forecast_source="prior",
        ready_at_s=ready_at_s,
        dispatched_at_s=None if wait_s is None else ready_at_s + wait_s,
        first_token_at_s=None,
        ended_at_s=at_s,
    )


def reported(model: str = "m", *, waiting: int = 0) -> DemandReported:
    return DemandReported(
        model=model,
        window_s=2.0,
        arrived=0,
        arrived_work=0.0,
        finished=0,
        in_flight=0,
        waiting=waiting,
        work_left=0.0,
        work_per_call=0.0,
        horizons_s=(),
        upcoming_mean=(),
        upcoming_p90=(),
        fresh_mean=(),
    )


def planned(model: str = "m", *, at_s: float = 0.0, wanted: float = 1.0) -> ScalePlanned:
    return ScalePlanned(
        plan=ScalePlan(
            model=model,
            at_s=at_s,
            policy="static",
            parameters={},
            have=1.0,
            wanted=wanted,
            target=1,
            min_replicas=0,
            max_replicas=4,
            horizon_s=10.0,
            terms={},
            deploys=(),
            drains=(),
            reason="steady",
        )
    )


def known(**settings: Any) -> Figures:
    """Figures that have known the model for long."""
    figures = Figures(**settings)
    figures.observe(changed("a"), -1e6)
    return figures


def quantile(values: Sequence[float], level: float) -> float | None:
    """Linear between the order statistics."""
    if not values:
        return None
    ranked = sorted(values)
    place = level * (len(ranked) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (ranked[high] - ranked[low]) * (place - low)


@dataclass
class Oracle:
    """Keeps everything, and looks through all of it."""

    window_s: float
    arrivals: list[float] = field(default_factory=list)
    calls: list[CallRecord] = field(default_factory=list)
    workflows: list[tuple[float, float]] = field(default_factory=list)

    def model(self, now_s: float) -> ModelFigures:
        calls = [call for call in self.calls if now_s - self.window_s <= call.ended_at_s <= now_s]
        finished_s = [call.ended_at_s - call.ready_at_s for call in calls if call.state == "finished"]
        waits_s = [
            (call.ended_at_s if call.dispatched_at_s is None else call.dispatched_at_s) - call.ready_at_s
            for call in calls
        ]
        arrived = [at_s for at_s in self.arrivals if now_s - self.window_s <= at_s <= now_s]
        return ModelFigures(
            window_s=self.window_s,
            arrivals_per_s=len(arrived) / self.window_s,
            ended=len(calls),
            failed=len([call for call in calls if call.state in ("failed", "refused")]),
            p50_s=quantile(finished_s, 0.5),
            p95_s=quantile(finished_s, 0.95),
            wait_p95_s=quantile(waits_s, 0.95),
        )


def same(figures: ModelFigures, expected: ModelFigures) -> None:
    for name in ModelFigures.__dataclass_fields__:
        assert getattr(figures, name) == pytest.approx(getattr(expected, name)), name


SECONDS = st.integers(min_value=0, max_value=40).map(lambda quarters: quarters / 4.0)
STATES: list[CallState] = ["finished", "failed", "refused", "cancelled"]
CALLS = st.builds(
    lambda latency_s, share, state, work: {
        "latency_s": latency_s,
        "wait_s": None if share is None else share * latency_s,
        "state": state,
        "work": work,
    },
    SECONDS,
    st.one_of(st.none(), st.sampled_from([0.0, 0.5, 1.0])),
    st.sampled_from(STATES),
    st.integers(min_value=0, max_value=500).map(float),
)
STEPS = st.lists(st.tuples(SECONDS, st.one_of(st.just("arrival"), st.just("workflow"), CALLS)), min_size=1, max_size=60)


@given(steps=STEPS, window_s=st.sampled_from([1.0, 10.0, 60.0]), later_s=SECONDS)
def test_figures_are_those_of_everything_in_the_window(
    steps: list[tuple[float, Any]], window_s: float, later_s: float
) -> None:
    figures, oracle, now_s = known(window_s=window_s), Oracle(window_s), 0.0
    for pause_s, what in steps:
        now_s += pause_s
        if what == "arrival":
            figures.observe(ready("c"), now_s)
            oracle.arrivals.append(now_s)
        elif what == "workflow":
            figures.workflow_ended(pause_s, now_s)
            oracle.workflows.append((now_s, pause_s))
        else:
            record = ended(now_s, **what)
            figures.call_ended(record)
            oracle.calls.append(record)
        same(figures.model("m", now_s), oracle.model(now_s))
    now_s += later_s
    same(figures.model("m", now_s), oracle.model(now_s))
    latencies_s = [latency_s for at_s, latency_s in oracle.workflows if at_s >= now_s - window_s]
    workflows = figures.workflows(now_s)
    assert (workflows.window_s, workflows.ended) == (window_s, len(latencies_s))
    assert workflows.p95_s == pytest.approx(quantile(latencies_s, 0.95))


@given(st.lists(st.integers(min_value=0, max_value=8).map(lambda quarters: quarters / 4.0), min_size=10, max_size=60))
def test_when_more_came_than_is_kept_the_figures_are_those_of_the_shorter_time_that_is_kept(
    pauses_s: list[float],
) -> None:
    figures, times, now_s = known(window_s=120.0, limit=10), [], 0.0
    for pause_s in pauses_s:
        now_s += pause_s
        figures.observe(ready("c"), now_s)
        figures.call_ended(ended(now_s))
        figures.workflow_ended(1.0, now_s)
        times.append(now_s)
    kept = times[-10:]
    found = figures.model("m", now_s)
    assert found.window_s == pytest.approx(max(1.0, now_s - kept[0]))
    assert found.ended == len(kept)
    assert found.arrivals_per_s == pytest.approx(10 / found.window_s)
    workflows = figures.workflows(now_s)
    assert (workflows.window_s, workflows.ended) == (found.window_s, 10)


def test_arrivals_alone_or_ends_alone_shorten_the_time_that_is_kept() -> None:
    for event in ("arrival", "end"):
        figures = known(window_s=120.0, limit=10)
        for second in range(20):
            if event == "arrival":
                figures.observe(ready("c"), float(second))
            else:
                figures.call_ended(ended(float(second)))
        assert figures.model("m", 20.0).window_s == 10.0


def test_a_model_that_is_new_has_a_window_as_long_as_it_is_known() -> None:
    figures = Figures(window_s=120.0)
    figures.observe(changed("a"), 1000.0)
    for _ in range(20):
        figures.observe(ready("c"), 1005.0)
    found = figures.model("m", 1010.0)
    assert (found.window_s, found.arrivals_per_s) == (10.0, 2.0)
    assert figures.model("m", 1000.0).window_s == 1.0
    assert figures.model("m", 1120.0).window_s == figures.model("m", 1121.0).window_s == 120.0


def test_a_model_of_the_settings_is_known_before_it_has_a_replica() -> None:
    figures = Figures(models={"m": "image"})
    assert figures.models() == {"m": "image"}
    figures.observe(ready("c"), 1000.0)
    figures.call_ended(ended(1004.0, state="refused", wait_s=None, latency_s=4.0))
    found = figures.model("m", 1010.0)
    assert (found.window_s, found.arrivals_per_s, found.failed, found.wait_p95_s) == (10.0, 0.1, 1, 4.0)


def test_a_model_that_no_replica_serves_leaves_no_trace() -> None:
    figures = known()
    for name in ("whatever", "a client", "says"):
        figures.observe(ready("c", model=name), 0.0)
        figures.observe(reported(name), 0.0)
        figures.observe(planned(name), 0.0)
        figures.call_ended(ended(0.0, model=name))
        assert figures.demand(name) is None
        assert figures.cost_rate(name) == 0.0
        with pytest.raises(KeyError):
            figures.model(name, 0.0)
    assert figures.models() == {"m": "llm"}


def test_a_model_whose_last_replica_is_gone_is_still_known() -> None:
    figures = known()
    figures.observe(changed("a", "gone"), 0.0)
    assert figures.models() == {"m": "llm"}


def test_models_do_not_share_their_figures() -> None:
    figures = known()
    figures.observe(changed("b", model="other"), -1e6)
    figures.observe(ready("c", model="other"), 0.0)
    figures.call_ended(ended(0.0, model="other"))
    assert (figures.model("m", 0.0).ended, figures.model("other", 0.0).ended) == (0, 1)
    assert figures.model("m", 0.0).arrivals_per_s == 0.0


def test_a_fleet_costs_what_its_replicas_cost_until_they_are_gone() -> None:
    figures = Figures()
    figures.observe(changed("a", "starting", profile=a_profile(cost_weight=2.0)), 0.0)
    figures.observe(changed("b", "ready", profile=a_profile(cost_weight=0.5)), 0.0)
    assert figures.cost_rate("m") == 2.5
    for state in ("ready", "cordoned", "draining"):
        figures.observe(changed("a", state, profile=a_profile(cost_weight=2.0)), 0.0)  # type: ignore[arg-type]
        assert figures.cost_rate("m") == 2.5
    figures.observe(changed("a", "gone"), 0.0)
    figures.observe(changed("never seen", "gone"), 0.0)
    assert figures.cost_rate("m") == 0.5


def test_the_last_alerts_and_plans_are_kept_oldest_first() -> None:
    figures = known()
    for number in range(60):
        figures.observe(AlertRaised(kind="at_max", subject="m", value=float(number)), 100.0 + number)
        figures.observe(planned(at_s=float(number)), 100.0 + number)
    assert figures.alerts[0] == AlertSeen(at_s=110.0, kind="at_max", subject="m", value=10.0)
    assert [alert.value for alert in figures.alerts] == [float(number) for number in range(10, 60)]
    assert [plan.at_s for plan in figures.plans] == [float(number) for number in range(10, 60)]


def test_the_last_word_on_a_model_is_kept_with_its_time() -> None:
    figures = known()
    assert figures.demand("m") is None
    for number in range(3):
        figures.observe(reported(waiting=number), 10.0 + number)
    assert figures.demand("m") == (12.0, reported(waiting=2))
