"""What the router remembers of workflows: how old they are, what follows a call, and when they should end."""

from __future__ import annotations

import msgspec
import pytest

from swarmx.agents.workflow_book import MOST_CALLS, MOST_KINDS, MOST_RUNNING, MOST_STAGES, WorkflowBook
from swarmx.core.fleet import WorkflowView
from swarmx.core.forecast import point
from swarmx.core.messages import WorkflowSubmitted
from swarmx.core.nouns import Call
from tests.agents.worlds import a_call


def submit(
    book: WorkflowBook, workflow_id: str, now_s: float, *, kind: str = "k", submitted_at_s: float | None = None
) -> None:
    book.submitted(WorkflowSubmitted(workflow_id=workflow_id, kind=kind, submitted_at_s=submitted_at_s), now_s)


def call_of(workflow_id: str, call_id: str, *, role: str = "writer", kind: str = "k") -> Call:
    return msgspec.structs.replace(a_call(call_id, role=role), workflow_id=workflow_id, workflow_kind=kind)


def a_round(book: WorkflowBook, workflow_id: str, role: str, at_s: float, took_s: float, *, calls: int = 1) -> None:
    """So many calls of the role become ready together, and all are answered."""
    together = [call_of(workflow_id, f"{role}-{at_s:g}-{number}", role=role) for number in range(calls)]
    for call in together:
        book.call_ready(call, at_s)
    for call in together:
        book.call_ended(call, took_s, 10.0)


def before(book: WorkflowBook, workflow_id: str, role: str, now_s: float = 0.0) -> WorkflowView:
    """What a policy sees when a call of the role becomes ready."""
    return book.view(call_of(workflow_id, "next", role=role), None, now_s, now_s)


def a_book_of_coding() -> WorkflowBook:
    """Four coders, a reviewer, and one coder once more: 30 s in all."""
    book = WorkflowBook()
    submit(book, "w", 0.0)
    a_round(book, "w", "coder", 0.0, 5.0, calls=4)
    a_round(book, "w", "reviewer", 10.0, 3.0)
    a_round(book, "w", "coder", 14.0, 9.0)
    book.ended("w", finished=True, now_s=30.0)
    return book


def test_the_book_learns_what_is_left_after_each_call_of_a_role() -> None:
    book = WorkflowBook({"k": 50.0})
    submit(book, "w", 0.0)
    first, second = call_of("w", "c0"), call_of("w", "c1")
    book.call_ready(first, 0.0)
    book.call_ended(first, 4.0, 100.0)
    book.call_ready(second, 10.0)
    book.call_ready(second, 15.0)  # it was refused, and is offered again
    book.call_ended(second, 6.0, 50.0)
    assert book.view(second, None, 10.0, 20.0).attained_work == 150.0
    book.ended("w", finished=True, now_s=20.0)
    submit(book, "v", 100.0)
    view = book.view(call_of("v", "c0"), None, 100.0, 100.0)
    assert (view.remaining_s, view.usual_s, view.usual_call_s) == (20.0, 20.0, 4.0)
    book.call_ended(call_of("v", "c0"), 4.0, 100.0)
    view = book.view(call_of("v", "c1"), None, 108.0, 109.0)
    assert (view.remaining_s, view.usual_s, view.usual_call_s) == (10.0, 20.0, 6.0)
    assert (view.age_s, view.target_s, view.attained_s) == (9.0, 50.0, 4.0)
    assert view.slack_s == 31.0
    assert view.past_s.tolist() == [10.0]


@pytest.mark.parametrize("coders", [0, 1, 4, 9])
def test_what_follows_a_reviewer_does_not_depend_on_the_number_of_coders_before(coders: int) -> None:
    book = a_book_of_coding()
    submit(book, "v", 100.0)
    a_round(book, "v", "coder", 100.0, 5.0, calls=coders)
    view = before(book, "v", "reviewer", 110.0)
    assert (view.remaining_s, view.usual_call_s, view.calls) == (20.0, 3.0, coders)


@pytest.mark.parametrize(("coders", "remaining_s", "usual_call_s"), [(2, 30.0, 5.0), (4, 16.0, 9.0), (9, 16.0, 9.0)])
def test_of_a_round_that_nobody_reached_the_last_known_one_before_tells(
    coders: int, remaining_s: float, usual_call_s: float
) -> None:
    book = a_book_of_coding()
    submit(book, "v", 100.0)
    a_round(book, "v", "coder", 100.0, 5.0, calls=coders)
    view = before(book, "v", "coder", 110.0)
    assert (view.remaining_s, view.usual_call_s) == (remaining_s, usual_call_s)


def test_a_role_that_no_workflow_of_the_kind_had_is_followed_by_as_much_as_a_whole_one_takes() -> None:
    view = before(a_book_of_coding(), "", "painter")
    assert (view.remaining_s, view.usual_s, view.usual_call_s) == (30.0, 30.0, 0.0)


def test_a_call_that_waits_stays_at_the_stage_at_which_it_became_ready() -> None:
    book = a_book_of_coding()
    submit(book, "v", 100.0)
    waiting = call_of("v", "waiting", role="coder")
    book.call_ready(waiting, 100.0)
    a_round(book, "v", "coder", 100.0, 5.0, calls=4)
    assert book.view(waiting, None, 100.0, 110.0).remaining_s == 30.0
    assert before(book, "v", "coder", 110.0).remaining_s == 16.0


def test_the_means_are_over_all_workflows_of_the_kind_and_none_of_another() -> None:
    book = WorkflowBook()
    for workflow_id, kind, took_s in (("a", "k", 10.0), ("b", "k", 20.0), ("c", "other", 90.0)):
        submit(book, workflow_id, 0.0, kind=kind)
        a_round(book, workflow_id, "writer", 0.0, took_s / 2.0)
        book.ended(workflow_id, finished=True, now_s=took_s)
    view = before(book, "", "writer")
    assert (view.usual_s, view.remaining_s, view.usual_call_s) == (15.0, 15.0, 7.5)


def test_how_long_a_call_takes_is_unknown_while_none_of_its_stage_was_answered() -> None:
    book = WorkflowBook()
    submit(book, "w", 0.0)
    book.call_ready(call_of("w", "c"), 4.0)  # refused, and the workflow did without
    book.ended("w", finished=True, now_s=10.0)
    view = before(book, "", "writer")
    assert (view.remaining_s, view.usual_call_s) == (6.0, 0.0)


def test_the_word_of_the_predictor_goes_before_that_of_the_book() -> None:
    book = a_book_of_coding()
    view = book.view(call_of("", "c", role="reviewer"), point(7.0, unit="s"), 3.0, 5.0)
    assert (view.remaining_s, view.usual_s, view.usual_call_s) == (7.0, 30.0, 0.0)


def test_a_call_of_no_workflow_is_one_of_its_own_that_began_when_it_was_ready() -> None:
    view = WorkflowBook({"chat": 8.0}).view(call_of("", "c", kind="chat"), None, 3.0, 5.0)
    assert (view.age_s, view.target_s, view.calls, view.usual_s) == (2.0, 8.0, 0, 0.0)


def test_a_workflow_without_a_target_should_take_twice_what_its_kind_takes() -> None:
    book = WorkflowBook()
    submit(book, "w", 0.0)
    book.ended("w", finished=True, now_s=30.0)
    assert before(book, "", "writer", 50.0).target_s == 60.0


def test_a_workflow_that_goes_on_after_a_restart_is_as_old_as_it_is_and_tells_only_of_the_whole() -> None:
    book = WorkflowBook()
    submit(book, "w", 100.0, submitted_at_s=40.0)
    assert before(book, "w", "writer", 110.0).age_s == 70.0
    a_round(book, "w", "writer", 100.0, 5.0)
    book.ended("w", finished=True, now_s=120.0)
    view = before(book, "", "writer", 200.0)
    assert (view.usual_s, view.target_s, view.remaining_s) == (80.0, 160.0, 80.0)
    assert (view.usual_call_s, len(view.past_s)) == (0.0, 0)


def test_a_workflow_that_failed_tells_nothing() -> None:
    book = WorkflowBook()
    submit(book, "w", 0.0)
    a_round(book, "w", "writer", 0.0, 5.0)
    book.ended("w", finished=False, now_s=30.0)
    assert len(book) == 0
    view = before(book, "", "writer", 50.0)
    assert (view.usual_s, view.usual_call_s, len(view.past_s)) == (0.0, 0.0, 0)


def test_a_workflow_of_any_number_of_calls_and_roles_takes_up_no_more_than_a_large_one() -> None:
    book = WorkflowBook()
    submit(book, "w", 0.0)
    for number in range(3 * MOST_CALLS):
        a_round(book, "w", f"role {number}", float(number), 1.0)
    running = book._running["w"]
    assert running.calls == 3 * MOST_CALLS
    assert len(running.ready_at_s) == len(running.service_s) == len(running.rounds) == MOST_CALLS


def test_of_too_many_roles_of_a_kind_the_one_seen_longest_ago_is_forgotten() -> None:
    book = WorkflowBook()

    def once(role: str) -> None:
        submit(book, role, 0.0)
        a_round(book, role, role, 0.0, 2.0)
        book.ended(role, finished=True, now_s=10.0)

    for number in range(MOST_STAGES):
        once(f"role {number}")
    once("role 0")
    once("another role")
    assert before(book, "", "another role").usual_call_s == 2.0
    assert before(book, "", "role 0").usual_call_s == 2.0
    assert before(book, "", "role 1").usual_call_s == 0.0


def test_of_too_many_kinds_the_one_that_ended_longest_ago_is_forgotten() -> None:
    book = WorkflowBook()
    for number in (*range(MOST_KINDS), 0, MOST_KINDS):
        submit(book, "w", 0.0, kind=f"kind {number}")
        book.ended("w", finished=True, now_s=10.0)
    usual_s = [book.view(call_of("", "c", kind=f"kind {n}"), None, 0.0, 0.0).usual_s for n in (0, 1, 2, MOST_KINDS)]
    assert usual_s == [10.0, 0.0, 10.0, 10.0]


def test_of_too_many_workflows_the_first_is_forgotten() -> None:
    book = WorkflowBook()
    for number in range(MOST_RUNNING + 1):
        submit(book, f"w{number}", 0.0)
    assert len(book) == MOST_RUNNING
    assert [before(book, f"w{number}", "writer", 5.0).age_s for number in (0, 1)] == [0.0, 5.0]
