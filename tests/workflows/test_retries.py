"""A failed attempt is made again as its author says, never beyond what node, workflow and clock allow."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.core.failures import PASSING, Cause, Failure
from swarmx.workflows.events import (
    Cancelled,
    CancelRequested,
    Event,
    Failed,
    Finished,
    NodeFailed,
    NodeFinished,
    NodeRetried,
    NodeStarted,
)
from swarmx.workflows.plan import advance, calls_in_flight, wake_at_s
from swarmx.workflows.retries import after_failure
from swarmx.workflows.spec import parse_workflow
from swarmx.workflows.state import Run
from swarmx.workflows.work import Start


def started(
    node: dict[str, Any], *, now_s: float = 100.0, deadline_at_s: float | None = None, **more: Any
) -> tuple[Run, list[Event], list[Start]]:
    spec = {"name": "x", "nodes": {"a": {"kind": "llm", "model": "m", "prompt": "p", **node}}, **more}
    run, submitted = Run.start(parse_workflow(spec), {}, deadline_at_s=deadline_at_s)
    events, calls = advance(run, now_s=now_s)
    return run, [submitted, *events], calls


def failed(run: Run, cause: Cause = "replica", *, now_s: float = 100.0, **more: Any) -> NodeRetried | NodeFailed:
    return after_failure(run, "a", Failure(cause=cause, error="broke", **more), now_s)


def test_without_a_retry_the_first_failure_is_the_last() -> None:
    run, _, _ = started({})
    assert failed(run) == NodeFailed(path="a", error="broke", reason="replica")


def test_attempts_rest_longer_and_longer_up_to_a_bound() -> None:
    run, _, calls = started({"retry": {"attempts": 4, "backoff_s": 2.0, "factor": 3.0, "max_s": 5.0, "jitter": 0.0}})
    now_s, rests, attempts = 100.0, [], [calls[0].attempt]
    while isinstance(event := failed(run, now_s=now_s), NodeRetried):
        rests.append(event.not_before_s - now_s)
        assert advance(run, [event], now_s=now_s)[1] == [], "it rests first"
        assert wake_at_s(run) == event.not_before_s
        now_s = event.not_before_s
        _, calls = advance(run, now_s=now_s)
        attempts.append(calls[0].attempt)
    assert rests == [2.0, 5.0, 5.0]
    assert attempts == [1, 2, 3, 4]
    assert event.error == "broke; it was attempted 4 times"


def test_a_replica_that_says_when_to_come_back_is_not_asked_before() -> None:
    run, _, _ = started({"retry": {"backoff_s": 1.0}})
    event = failed(run, retry_after_s=30.0)
    assert isinstance(event, NodeRetried)
    assert 130.0 <= event.not_before_s <= 130.5, "those that were told the same do not come back together"


def test_rests_are_spread_and_the_same_for_the_same_attempt_of_the_same_workflow() -> None:
    def rests(workflow_id: str, jitter: float) -> list[float]:
        spec = {"kind": "llm", "model": "m", "prompt": "p", "retry": {"backoff_s": 8.0, "jitter": jitter}}
        nodes = {f"n{i}": spec for i in range(40)}
        run, _ = Run.start(parse_workflow({"name": "x", "nodes": nodes}), {}, workflow_id=workflow_id)
        advance(run, now_s=0.0)
        found = [after_failure(run, path, Failure(cause="timeout", error="x"), 0.0) for path in nodes]
        return [event.not_before_s for event in found if isinstance(event, NodeRetried)]

    assert rests("wf-1", 0.5) == rests("wf-1", 0.5)
    assert not set(rests("wf-1", 0.5)) & set(rests("wf-2", 0.5))
    assert len(set(rests("wf-1", 0.5))) == 40
    assert all(4.0 < rest <= 8.0 for rest in rests("wf-1", 0.5))
    assert set(rests("wf-1", 0.0)) == {8.0}
    assert min(rests("wf-1", 1.0)) < 1.0, "a jitter of 1 may leave no rest at all"


@pytest.mark.parametrize("cause", ["rejected", "deadline", "defect"])
def test_causes_that_do_not_pass_are_not_retried(cause: Cause) -> None:
    run, _, _ = started({"retry": {}})
    assert failed(run, cause) == NodeFailed(path="a", error="broke", reason=cause)


def test_only_the_causes_that_are_named_are_retried() -> None:
    run, _, _ = started({"retry": {"on": ["timeout"]}})
    assert {cause for cause in PASSING if isinstance(failed(run, cause), NodeRetried)} == {"timeout"}


def test_a_retry_never_goes_beyond_the_deadline() -> None:
    run, _, _ = started({"retry": {"backoff_s": 10.0, "jitter": 0.0}}, deadline_at_s=109.0)
    event = failed(run)
    assert isinstance(event, NodeFailed)
    assert event.error == "broke; another attempt would come after the deadline"


def test_the_retry_budget_of_a_workflow_ends_a_storm() -> None:
    body = {"w": {"kind": "llm", "model": "m", "prompt": "p", "retry": {"attempts": 10, "backoff_s": 0.0}}}
    spec = {
        "name": "storm",
        "limits": {"retries": 7},
        "nodes": {"m": {"kind": "map", "over": "[1, 2, 3, 4]", "do": body}},
    }
    run, _ = Run.start(parse_workflow(spec), {})
    retried = 0
    advance(run, now_s=0.0)
    while not run.ended:
        path = next(iter(run.in_flight))
        event = after_failure(run, path, Failure(cause="replica", error="broke"), 0.0)
        retried += isinstance(event, NodeRetried)
        advance(run, [event], now_s=0.0)
    assert retried == 7
    assert run.end == Failed(error="broke; the workflow has used up its 7 retries", path=path)


def test_an_attempt_that_takes_too_long_is_given_up_and_the_next_has_as_long() -> None:
    run, events, calls = started({"timeout_s": 5.0, "retry": {"attempts": 2, "backoff_s": 0.0}})
    assert calls[0].timeout_at_s == 105.0
    assert events[-1] == NodeStarted(path="a", kind="llm", timeout_at_s=105.0)
    assert advance(run, now_s=104.9) == ([], [])
    recorded, calls = advance(run, now_s=105.0)
    assert [type(event) for event in recorded] == [NodeRetried, NodeStarted]
    assert (calls[0].attempt, calls[0].timeout_at_s) == (2, 110.0)
    advance(run, now_s=110.0)
    assert isinstance(run.end, Failed)
    assert run.end.error == "the attempt took longer than timeout_s, 5 s; it was attempted 2 times"


def test_a_restart_neither_extends_a_timeout_nor_shortens_a_rest() -> None:
    _, events, _ = started({"timeout_s": 5.0, "retry": {"backoff_s": 20.0, "jitter": 0.0}})
    again = Run.rebuild(events)
    assert calls_in_flight(again)[0].timeout_at_s == 105.0
    recorded, _ = advance(again, now_s=1000.0)
    rested = Run.rebuild([*events, *recorded])
    assert rested.resting == {"a": 1020.0}
    assert advance(rested, now_s=1019.0) == ([], [])
    assert advance(rested, now_s=1020.0)[1][0].attempt == 2


def test_of_two_that_are_late_at_once_only_as_many_are_made_again_as_there_are_retries() -> None:
    node = {"kind": "llm", "model": "m", "prompt": "p", "timeout_s": 5.0, "retry": {"backoff_s": 0.0}}
    spec = parse_workflow({"name": "x", "limits": {"retries": 1}, "nodes": {"a": node, "b": node}})
    run, _ = Run.start(spec, {})
    advance(run, now_s=0.0)
    events, calls = advance(run, now_s=5.0)
    assert [type(event) for event in events] == [NodeRetried, NodeFailed, Failed]
    assert calls == []
    assert run.retries == 1


def test_the_retries_of_a_workflow_are_those_of_its_sub_workflows_too() -> None:
    node = {"kind": "llm", "model": "m", "prompt": "p", "retry": {"backoff_s": 0.0}}
    spec = parse_workflow(
        {
            "name": "x",
            "limits": {"retries": 1},
            "workflows": {"w": {"nodes": {"a": node}}},
            "nodes": {"one": {"kind": "workflow", "use": "w"}, "two": {"kind": "workflow", "use": "w"}},
        }
    )
    run, _ = Run.start(spec, {})
    advance(run, now_s=0.0)
    broke = Failure(cause="replica", error="broke")
    assert isinstance(after_failure(run, "one.a", broke, 0.0), NodeRetried)
    advance(run, [after_failure(run, "one.a", broke, 0.0)], now_s=0.0)
    assert after_failure(run, "two.a", broke, 0.0) == NodeFailed(
        path="two.a", error="broke; the workflow has used up its 1 retries", reason="replica"
    )


def test_each_iteration_of_a_loop_has_all_its_attempts() -> None:
    node = {"kind": "llm", "model": "m", "prompt": "p", "retry": {"attempts": 2, "backoff_s": 0.0}}
    run, _ = Run.start(
        parse_workflow({"name": "x", "nodes": {"l": {"kind": "loop", "max_iterations": 2, "do": {"a": node}}}}), {}
    )
    advance(run, now_s=0.0)
    for path in ("l[1].a", "l[2].a"):
        event = after_failure(run, path, Failure(cause="invalid", error="x"), 0.0)
        assert isinstance(event, NodeRetried)
        _, calls = advance(run, [event], now_s=0.0)
        assert [(call.path, call.attempt) for call in calls] == [(path, 2)]
        advance(run, [NodeFinished(path=path, output=1)], now_s=0.0)
    assert isinstance(run.end, Finished)


def test_an_attempt_is_late_at_its_own_time_not_at_that_of_one_before_it() -> None:
    run, _, _ = started({"timeout_s": 5.0, "retry": {"backoff_s": 0.0}})
    advance(run, [failed(run, now_s=104.0)], now_s=104.0)
    assert run.timeouts == {"a": 109.0}
    assert advance(run, now_s=105.0) == ([], [])
    assert wake_at_s(run) == 109.0


def test_a_cancel_ends_a_rest() -> None:
    run, _, _ = started({"retry": {"backoff_s": 3600.0}})
    advance(run, [failed(run)], now_s=100.0)
    advance(run, [CancelRequested()], now_s=101.0)
    assert run.end == Cancelled()
    assert wake_at_s(run) is None


def test_an_answer_while_others_rest_is_taken() -> None:
    spec = "{name: x, nodes: {a: {kind: llm, model: m, prompt: p, retry: {}}, b: {kind: llm, model: m, prompt: p}}}"
    run, _ = Run.start(parse_workflow(spec), {})
    advance(run, now_s=0.0)
    advance(run, [after_failure(run, "a", Failure(cause="timeout", error="late"), 0.0)], now_s=0.0)
    advance(run, [NodeFinished(path="b", output=1)], now_s=0.5)
    advance(run, now_s=1.0)
    advance(run, [NodeFinished(path="a", output=2)], now_s=1.1)
    assert run.end == Finished(outputs={"b": 1})


@given(
    attempts=st.integers(1, 10),
    budget=st.integers(0, 12),
    causes=st.lists(st.sampled_from([*PASSING, "rejected"]), max_size=20),
)
def test_no_run_retries_more_than_it_may(attempts: int, budget: int, causes: list[Cause]) -> None:
    run, events, _ = started({"retry": {"attempts": attempts, "backoff_s": 0.0}}, limits={"retries": budget})
    for cause in causes:
        if run.ended:
            break
        more, _ = advance(run, [failed(run, cause)], now_s=100.0)
        events += more
    assert run.retries <= min(attempts - 1, budget)
    assert run.nodes["a"].attempt == run.retries + 1
    assert Run.rebuild(events) == run
