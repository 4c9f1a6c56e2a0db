"""Forecasts of running workflows, kept by nothing but the messages that agents hear."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.core.errors import PredictorError
from swarmx.core.forecast import Forecast
from swarmx.core.messages import (
    CallCancelled,
    CallFailed,
    CallFinished,
    CallReady,
    DecisionMade,
    Message,
    WorkflowEnded,
    WorkflowSubmitted,
)
from swarmx.core.nouns import Candidates, Decision
from swarmx.neural.head import Head
from swarmx.neural.structure_live import Remaining, WorkflowForecasts
from tests.agents.worlds import FORECAST, a_call
from tests.neural.heads import a_head
from tests.neural.structures import random_heads


def submitted(workflow: str, kind: str = "report") -> WorkflowSubmitted:
    return WorkflowSubmitted(workflow_id=workflow, kind=kind)


def ready(workflow: str, call: str, model: str = "m") -> CallReady:
    called = msgspec.structs.replace(a_call(call, model=model), workflow_id=workflow)
    return CallReady(call=called, forecast=FORECAST)


def finished(call: str, tokens: float = 40.0) -> CallFinished:
    return CallFinished(call_id=call, attempt=1, prompt_tokens=100, cached_tokens=0, work_done=tokens)


def failed(call: str) -> CallFailed:
    return CallFailed(call_id=call, attempt=1, reason="timeout", retryable=True)


def decided(workflow: str, call: str) -> DecisionMade:
    seen = Candidates(
        total=1, replica_ids=("r",), in_flight=(0,), remaining_work=(0.0,), context_tokens=(0.0,),
        signal_age_s=(None,), cost_s=None, terms_s={},
    )  # fmt: skip
    return DecisionMade(
        decision=Decision(
            call=ready(workflow, call).call, attempt=2, at_s=0.0, policy="p", parameters={}, replica_id="r",
            runner_up=None, forecast=FORECAST, candidates=seen,
        )
    )  # fmt: skip


def ended(workflow: str, state: str = "finished") -> WorkflowEnded:
    return msgspec.convert({"type": "WorkflowEnded", "workflow_id": workflow, "state": state}, WorkflowEnded)


def play(forecasts: WorkflowForecasts, messages: Sequence[Message], *, from_s: float = 0.0) -> float:
    """One message a second."""
    now_s = from_s
    for message in messages:
        forecasts.hear(message, now_s)
        now_s += 1.0
    return now_s


def a_run(workflow: str, calls: int, *, kind: str = "report", models: Sequence[str] = ("m",)) -> list[Message]:
    messages: list[Message] = [submitted(workflow, kind)]
    for i in range(calls):
        messages += [ready(workflow, f"{workflow}/{i}", models[i % len(models)]), finished(f"{workflow}/{i}")]
    return [*messages, ended(workflow)]


def taught(calls: int, times: int = 30, models: Sequence[str] = ("m",)) -> WorkflowForecasts:
    forecasts = WorkflowForecasts()
    for i in range(times):
        play(forecasts, a_run(f"past{i}", calls, models=models))
    return forecasts


def of(forecasts: WorkflowForecasts, workflow: str, now_s: float = 0.0) -> Remaining:
    remaining = forecasts.remaining(workflow, now_s)
    assert remaining is not None
    return remaining


def every(remaining: Remaining) -> list[Forecast]:
    return [remaining.calls, remaining.work, remaining.path, *remaining.by_model.values()]


def test_a_workflow_that_is_not_running_has_no_forecast() -> None:
    forecasts = WorkflowForecasts()
    assert forecasts.remaining("w", 0.0) is None
    play(forecasts, a_run("w", 2))
    assert forecasts.remaining("w", 9.0) is None


def test_before_the_first_end_of_a_workflow_the_forecast_is_a_prior() -> None:
    forecasts = WorkflowForecasts()
    forecasts.hear(submitted("w"), 0.0)
    assert {forecast.source for forecast in every(of(forecasts, "w"))} == {"prior"}


def test_workflows_that_ended_tell_what_the_next_has_before_it() -> None:
    forecasts = taught(6)
    now_s = play(forecasts, a_run("w", 2)[:-1], from_s=100.0)
    remaining = of(forecasts, "w", now_s - 1.0)
    assert remaining.calls.source == "empirical"
    assert remaining.calls.quantile(0.5) == pytest.approx(4.0, abs=1.0)
    assert remaining.work.quantile(0.5) == pytest.approx(160.0, rel=0.3)
    assert remaining.path.quantile(0.5) == pytest.approx(8.0, rel=0.4)


def test_each_model_has_its_own_forecast_also_before_it_is_called() -> None:
    forecasts = taught(8, models=("big", "small", "small", "small"))
    forecasts.hear(submitted("w"), 0.0)
    by_model = of(forecasts, "w").by_model
    assert by_model["big"].quantile(0.5) == pytest.approx(2.0, abs=0.7)
    assert by_model["small"].quantile(0.5) == pytest.approx(6.0, abs=1.5)


def test_only_a_workflow_that_came_to_its_own_end_teaches() -> None:
    forecasts = WorkflowForecasts()
    for state in ("failed", "cancelled"):
        play(forecasts, [*a_run("w", 3)[:-1], ended("w", state)])
    assert len(forecasts.memory) == 0


def test_silence_shortens_the_path() -> None:
    forecasts = taught(6)
    now_s = play(forecasts, a_run("w", 2)[:-1])
    now, later = (of(forecasts, "w", now_s + silent_s).path for silent_s in (-1.0, 3.0))
    assert later.quantile(0.5) < now.quantile(0.5)
    assert all(q >= 0.0 for q in of(forecasts, "w", now_s + 1e6).path.quantiles)


def test_a_call_that_is_tried_again_has_not_failed() -> None:
    once, again = taught(6), taught(6)
    play(once, [submitted("w"), ready("w", "c")])
    play(again, [submitted("w"), ready("w", "c"), failed("c"), failed("c"), decided("w", "c")])
    assert of(once, "w").work == of(again, "w").work
    play(again, [failed("c")])
    assert of(once, "w").work != of(again, "w").work
    play(again, [finished("c"), finished("c")])
    play(once, [finished("c")])
    assert of(once, "w").calls == of(again, "w").calls


def test_a_call_that_was_cancelled_is_over() -> None:
    forecasts = taught(6)
    play(forecasts, [submitted("w"), ready("w", "c")])
    before = of(forecasts, "w").work
    play(forecasts, [CallCancelled(call_id="c"), CallCancelled(call_id="c")])
    assert of(forecasts, "w").work.mean < before.mean


@pytest.mark.parametrize("heads", [{}, random_heads()], ids=["memory", "heads"])
def test_the_path_alone_is_the_same_as_in_the_whole_forecast(heads: dict[str, Head]) -> None:
    forecasts = WorkflowForecasts(heads, taught(6).memory)
    now_s = play(
        forecasts, [submitted("w"), ready("w", "c"), finished("c"), ready("w", "d"), submitted("x", "unheard")]
    )
    for workflow in ("w", "x"):
        for later_s in (0.0, 5.0):
            path = forecasts.path(workflow, now_s + later_s)
            whole = of(forecasts, workflow, now_s + later_s).path
            assert path is not None
            assert (path.source, path.version, path.unit) == (whole.source, whole.version, "s")
            assert path.quantiles == pytest.approx(whole.quantiles, rel=1e-4)
    assert forecasts.path("unknown", now_s) is None


def test_a_call_that_was_announced_counts_once() -> None:
    announced, heard = taught(6), taught(6)
    for forecasts in (announced, heard):
        play(forecasts, [submitted("w")], from_s=100.0)
    announced.call_ready(ready("w", "c").call, 101.0)
    assert announced.path("w", 101.0) != heard.path("w", 101.0)
    for forecasts in (announced, heard):
        forecasts.hear(ready("w", "c"), 101.0)
    assert of(announced, "w", 102.0) == of(heard, "w", 102.0)


def test_a_workflow_that_goes_on_after_a_restart_is_forecast_but_teaches_no_half_of_itself() -> None:
    whole, half = taught(6), taught(6)
    play(whole, [submitted("w")], from_s=1000.0)
    play(half, [msgspec.structs.replace(submitted("w"), submitted_at_s=400.0)], from_s=1000.0)
    before = half.memory.recall("report", "m", 1, 0)
    for forecasts in (whole, half):
        play(forecasts, [ready("w", "c"), finished("c")], from_s=1001.0)
    assert of(half, "w", 1003.0) == of(whole, "w", 1003.0)
    for forecasts in (whole, half):
        forecasts.hear(ended("w"), 1003.0)
    assert half.memory.recall("report", "m", 1, 0) == before != whole.memory.recall("report", "m", 1, 0)


def test_what_the_prompt_and_the_answer_say_is_heard() -> None:
    forecasts = WorkflowForecasts(random_heads(), taught(6).memory)
    play(forecasts, [submitted("w"), ready("w", "c"), finished("c")])
    silent = of(forecasts, "w").calls
    forecasts.prompt_read("w", b"Thank you, goodbye!")
    told = of(forecasts, "w").calls
    assert told != silent
    forecasts.answer_read(ready("w", "c").call, ("search",), 2.0)
    assert of(forecasts, "w").calls != told
    forecasts.prompt_read("unknown", b"x")
    forecasts.answer_read(ready("unknown", "c").call, ("x",), 2.0)


def test_the_pause_of_a_workflow_that_waits_for_tools_is_learnt_and_shrinks() -> None:
    forecasts = WorkflowForecasts()
    call = ready("w", "c").call
    forecasts.hear(submitted("w"), 0.0)
    for turn in range(20):
        forecasts.answer_read(call, ("search",), 10.0 * turn)
        gap = forecasts.tools_returned(call, returns_tools=True, now_s=10.0 * turn + 4.0)
        assert gap is not None
        assert gap.gap_s == pytest.approx(4.0)
    assert of(forecasts, "w", 300.0).pause is None
    forecasts.answer_read(call, ("search",), 300.0)
    pause = of(forecasts, "w", 301.0).pause
    assert pause is not None
    assert pause.quantile(0.5) == pytest.approx(3.0)
    forecasts.hear(ended("w"), 302.0)
    assert forecasts.tools_returned(call, returns_tools=True, now_s=303.0) is None


def test_the_silent_workflow_makes_room() -> None:
    forecasts = WorkflowForecasts(limit=2)
    play(forecasts, [submitted("a"), submitted("b"), ready("a", "a1"), submitted("c")])
    assert forecasts.remaining("b", 9.0) is None
    assert len(forecasts) == 2
    play(forecasts, [ready("b", "b1"), finished("a1"), finished("b1")])
    assert forecasts.remaining("a", 9.0) is not None


def test_everything_is_forgotten_with_its_workflow() -> None:
    forecasts = WorkflowForecasts(limit=3)
    for i in range(50):
        play(forecasts, [submitted(f"w{i}"), *(ready(f"w{i}", f"w{i}/{j}") for j in range(400))])
    assert len(forecasts) == 3
    assert len(forecasts._workflow_of) <= 3 * 256
    for i in range(50):
        forecasts.hear(ended(f"w{i}", "cancelled"), 0.0)
    assert (len(forecasts), len(forecasts._workflow_of)) == (0, 0)


def test_the_network_is_not_asked_about_a_kind_that_nobody_has_seen() -> None:
    forecasts = WorkflowForecasts(random_heads(), taught(6).memory)
    play(forecasts, [submitted("w"), submitted("x", "unseen")])
    assert {of(forecasts, "w").calls.source, of(forecasts, "w").work.source} == {"neural"}
    assert {forecast.source for forecast in every(of(forecasts, "x"))} == {"prior"}


def test_a_head_for_other_features_is_refused() -> None:
    with pytest.raises(PredictorError, match="remaining calls needs"):
        WorkflowForecasts({"calls": a_head()})
    with pytest.raises(PredictorError, match="no quantity 'dinners'"):
        WorkflowForecasts().use("dinners", a_head())


@given(
    script=st.lists(
        st.tuples(
            st.sampled_from(["submit", "ready", "finish", "fail", "decide", "cancel", "end", "read"]),
            st.sampled_from(["v", "w"]),
            st.sampled_from(["1", "2", "3"]),
            st.floats(0.0, 1e7),
        ),
        max_size=40,
    ),
    seed=st.integers(0, 5),
)
def test_whatever_is_heard_the_forecasts_are_finite_and_monotone_and_the_same_again(
    script: list[tuple[str, str, str, float]], seed: int
) -> None:
    answers = []
    for _ in range(2):
        forecasts = WorkflowForecasts(random_heads(seed, size=2.0), taught(3).memory)
        for what, workflow, call, number in script:
            call_id = f"{workflow}/{call}"
            match what:
                case "submit":
                    forecasts.hear(submitted(workflow), number)
                case "ready":
                    forecasts.hear(ready(workflow, call_id, call), number)
                case "finish":
                    forecasts.hear(finished(call_id, number), number)
                case "fail":
                    forecasts.hear(failed(call_id), number)
                case "decide":
                    forecasts.hear(decided(workflow, call_id), number)
                case "cancel":
                    forecasts.hear(CallCancelled(call_id=call_id), number)
                case "end":
                    forecasts.hear(ended(workflow), number)
                case _:
                    forecasts.prompt_read(workflow, call)
        answers.append([forecasts.remaining(workflow, 1e7) for workflow in ("v", "w")])
    assert answers[0] == answers[1]
    for remaining in answers[0]:
        for forecast in [] if remaining is None else every(remaining):
            assert all(math.isfinite(q) and q >= 0.0 for q in forecast.quantiles)
            assert all(a <= b for a, b in itertools.pairwise(forecast.quantiles))
