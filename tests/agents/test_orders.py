"""The orders in which calls wait, and the memory of workflows behind them."""

from __future__ import annotations

import numpy as np
import pytest

from swarmx.agents.gittins import gittins_index
from swarmx.agents.orders import ORDERS
from swarmx.agents.workflow_book import WorkflowBook
from swarmx.core.fleet import WorkflowView
from swarmx.core.forecast import point
from swarmx.core.messages import WorkflowSubmitted


def a_workflow(**about: float) -> WorkflowView:
    known = {"age_s": 10.0, "target_s": 60.0, "remaining_s": 20.0, "attained_s": 5.0, "attained_work": 0.0} | about
    return WorkflowView(kind="k", calls=1, past_s=np.zeros(0), **known)  # type: ignore[arg-type]


def submit(book: WorkflowBook, workflow_id: str, now_s: float, *, submitted_at_s: float | None = None) -> None:
    book.submitted(WorkflowSubmitted(workflow_id=workflow_id, kind="k", submitted_at_s=submitted_at_s), now_s)


def first_of(order: str, *workflows: WorkflowView, now_s: float = 100.0) -> int:
    keys = [ORDERS[order](workflow, now_s) for workflow in workflows]  # type: ignore[index]
    return keys.index(min(keys))


def test_each_order_prefers_what_it_says() -> None:
    assert first_of("workflow", a_workflow(age_s=1.0), a_workflow(age_s=30.0)) == 1
    assert first_of("deadline", a_workflow(target_s=60.0), a_workflow(target_s=50.0)) == 1
    assert first_of("slack", a_workflow(remaining_s=20.0), a_workflow(remaining_s=40.0)) == 1
    assert first_of("attained", a_workflow(attained_s=30.0), a_workflow(attained_s=1.0)) == 1


def test_a_workflow_that_was_starved_goes_before_one_that_got_less() -> None:
    assert first_of("attained", a_workflow(attained_s=3.0), a_workflow(attained_s=40.0, age_s=400.0)) == 1


def test_the_gittins_index_of_a_known_job_is_one_over_its_rest() -> None:
    assert gittins_index(np.array([10.0]), 4.0) == pytest.approx(1.0 / 6.0)


def test_the_gittins_index_finds_the_best_time_to_stop() -> None:
    # half of them take 1 s, half 100 s: to serve for 1 s ends half of them
    past = np.array([1.0, 100.0])
    assert gittins_index(past, 0.0) == pytest.approx(0.5)
    assert gittins_index(past, 2.0) == pytest.approx(1.0 / 98.0)


def test_a_job_that_outran_all_others_is_expected_to_go_on_for_as_long_again() -> None:
    assert gittins_index(np.array([1.0, 2.0]), 8.0) == pytest.approx(1.0 / 8.0)


def test_the_book_learns_what_is_left_after_each_number_of_calls() -> None:
    book = WorkflowBook({"k": 50.0})
    submit(book, "w", 0.0)
    book.call_ready("w", "c0", 0.0)
    book.call_ended("w", 4.0, 100.0)
    book.call_ready("w", "c1", 10.0)
    book.call_ready("w", "c1", 15.0)  # it was refused, and is offered again
    book.call_ended("w", 6.0, 50.0)
    assert book.view("w", "k", None, 10.0, 20.0).attained_work == 150.0
    book.ended("w", finished=True, now_s=20.0)
    submit(book, "v", 100.0)
    assert book.view("v", "k", None, 100.0, 100.0).remaining_s == 20.0
    book.call_ended("v", 4.0, 100.0)
    view = book.view("v", "k", None, 108.0, 109.0)
    assert (view.remaining_s, view.age_s, view.target_s, view.attained_s) == (10.0, 9.0, 50.0, 4.0)
    assert view.slack_s == 31.0
    assert view.past_s.tolist() == [10.0]


def test_the_word_of_the_predictor_goes_before_that_of_the_book() -> None:
    book = WorkflowBook()
    assert book.view("", "k", point(7.0, unit="s"), 3.0, 5.0).remaining_s == 7.0


def test_a_call_of_no_workflow_is_one_of_its_own_that_began_when_it_was_ready() -> None:
    view = WorkflowBook({"chat": 8.0}).view("", "chat", None, 3.0, 5.0)
    assert (view.age_s, view.target_s, view.calls) == (2.0, 8.0, 0)


def test_a_workflow_without_a_target_should_take_twice_what_its_kind_takes() -> None:
    book = WorkflowBook()
    submit(book, "w", 0.0)
    book.ended("w", finished=True, now_s=30.0)
    assert book.view("", "k", None, 50.0, 50.0).target_s == 60.0


def test_a_workflow_that_goes_on_after_a_restart_is_as_old_as_it_is_and_tells_only_of_the_whole() -> None:
    book = WorkflowBook()
    submit(book, "w", 100.0, submitted_at_s=40.0)
    assert book.view("w", "k", None, 100.0, 110.0).age_s == 70.0
    book.call_ready("w", "c", 100.0)
    book.call_ended("w", 5.0, 10.0)
    book.ended("w", finished=True, now_s=120.0)
    view = book.view("", "k", None, 200.0, 200.0)
    assert (view.target_s, view.remaining_s, len(view.past_s)) == (160.0, 80.0, 0)


def test_a_workflow_that_failed_tells_nothing() -> None:
    book = WorkflowBook()
    submit(book, "w", 0.0)
    book.ended("w", finished=False, now_s=30.0)
    assert len(book) == 0
    assert len(book.view("", "k", None, 50.0, 50.0).past_s) == 0
