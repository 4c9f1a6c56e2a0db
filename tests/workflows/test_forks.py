"""A fork keeps what was before its node, and comes to the same end."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swarmx.core.errors import WorkflowError
from swarmx.core.failures import Failure
from swarmx.workflows.events import CancelRequested, Event, Finished, NodeFailed, NodeFinished, Submitted
from swarmx.workflows.forks import fork
from swarmx.workflows.plan import advance
from swarmx.workflows.retries import after_failure
from swarmx.workflows.spec import parse_workflow
from swarmx.workflows.state import Run
from tests.workflows.histories.record import CHAIN, LOOP, Recording, answer
from tests.workflows.test_run import bodies


def finished(events: list[Event]) -> set[str]:
    return {event.path for event in events if isinstance(event, NodeFinished)}


def end_of(events: list[Event]) -> Any:
    run = Run.rebuild(events)
    advance(run, now_s=0.0)
    while run.in_flight:
        path = next(iter(run.in_flight))
        advance(run, [NodeFinished(path=path, output=answer(path))], now_s=0.0)
    return run.end


def test_a_fork_keeps_what_was_before_its_node_and_nothing_of_what_came_after() -> None:
    recording = Recording(CHAIN).finish()
    begun = fork(recording.events, "each[0].draft", forked_from="wf-old")
    assert finished(begun) == {"plan", "each[1].draft", "each[1].check"}
    first = begun[0]
    assert isinstance(first, Submitted)
    assert (first.forked_from, first.fork_path) == ("wf-old", "each[0].draft")
    run = Run.rebuild(begun)
    assert [call.path for call in advance(run, now_s=0.0)[1]] == ["each[0].draft"]
    assert end_of(begun) == recording.run.end


def test_a_fork_from_a_loop_forgets_its_later_iterations() -> None:
    recording = Recording(LOOP).finish()
    begun = fork(recording.events, "poem[1].review", forked_from="wf-old")
    assert finished(begun) == {"poem[1].draft"}
    assert list(Run.rebuild(begun).nodes) == ["poem", "poem[1].draft", "poem[1].review"]


def test_a_fork_from_a_map_begins_it_again() -> None:
    begun = fork(Recording(CHAIN).finish().events, "each", forked_from="wf-old")
    assert finished(begun) == {"plan"}


def test_a_fork_of_a_failed_or_cancelled_run_does_what_failed_anew() -> None:
    for trouble in (NodeFailed(path="each[0].draft", error="x"), CancelRequested()):
        recording = Recording(CHAIN).answer("plan", "each[1].draft").take(trouble)
        begun = fork(recording.events, "each[0].check", forked_from="wf-old")
        assert finished(begun) == {"plan", "each[1].draft"}
        assert isinstance(end_of(begun), Finished)


def test_the_attempts_of_the_old_run_do_not_count_in_the_new_one() -> None:
    source = "{name: x, nodes: {a: {kind: llm, model: m, prompt: p, retry: {backoff_s: 0}}, " + (
        "b: {kind: llm, model: m, prompt: '{{ a.text }}'}}}"
    )
    recording = Recording(source)
    recording.take(after_failure(recording.run, "a", Failure(cause="timeout", error="x"), 0.0)).finish()
    run = Run.rebuild(fork(recording.events, "b", forked_from="wf-old"))
    assert (run.retries, run.nodes["a"].attempt, run.nodes["a"].state) == (0, 1, "finished")


def test_a_fork_has_a_deadline_of_its_own_and_the_pinned_definition() -> None:
    recording = Recording(CHAIN)
    first, old = fork(recording.events, "plan", forked_from="w", deadline_at_s=50.0)[0], recording.events[0]
    assert isinstance(first, Submitted)
    assert isinstance(old, Submitted)
    assert (first.deadline_at_s, first.spec, first.spec_sha256) == (50.0, old.spec, old.spec_sha256)


def test_a_node_that_the_run_does_not_have_is_refused() -> None:
    with pytest.raises(WorkflowError, match=r"no node 'each\[0\]\.draft'"):
        fork(Recording(CHAIN).events, "each[0].draft", forked_from="wf-old")


def test_a_definition_that_was_changed_in_the_database_is_not_run() -> None:
    first = Recording(CHAIN).events[0]
    assert isinstance(first, Submitted)
    changed = msgspec.structs.replace(first, spec=first.spec.replace("sober", "drunk"))
    with pytest.raises(WorkflowError, match="its hash has changed"):
        Run.rebuild([changed])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_a_fork_at_any_node_of_any_run_comes_to_the_same_end(data: st.DataObject) -> None:
    run, submitted = Run.start(parse_workflow({"name": "random", "nodes": data.draw(bodies("", 0))}), {})
    events: list[Event] = [submitted, *advance(run, now_s=0.0)[0]]
    while run.in_flight and not data.draw(st.sampled_from([False, False, False, True])):
        path = data.draw(st.sampled_from(list(run.in_flight)))
        events += advance(run, [NodeFinished(path=path, output=answer(path))], now_s=0.0)[0]
    path = data.draw(st.sampled_from(list(run.nodes)))
    begun = fork(events, path, forked_from="old")
    assert path not in finished(begun)
    assert finished(begun) <= finished(events)
    assert end_of(begun) == end_of(events if not run.ended else events[:1])
