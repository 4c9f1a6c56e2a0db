from __future__ import annotations

import pytest

from swarmx.core.errors import NotFound
from swarmx.core.messages import CallCancelled, SignalReported
from swarmx.runtime.fleet_book import FleetBook
from tests.agents.worlds import changed
from tests.runtime.test_curves import a_curve


class SetClock:
    """Stands where it is put."""

    def __init__(self) -> None:
        self.at_s = 0.0

    def now_s(self) -> float:
        return self.at_s


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


@pytest.fixture
def book(clock: SetClock) -> FleetBook:
    book = FleetBook(clock)
    book.observe(changed("b", "ready"), 0.0)
    book.observe(changed("a", "starting"), 0.0)
    return book


def test_replicas_are_listed_by_model_and_id_with_their_state(book: FleetBook) -> None:
    book.observe(changed("c", "ready", model="another"), 0.0)
    assert [(s.model, s.replica_id, s.state) for s in book.statuses()] == [
        ("another", "c", "ready"),
        ("m", "a", "starting"),
        ("m", "b", "ready"),
    ]
    assert book.ready() == 2
    assert book.models() == {"m": "llm", "another": "llm"}


def test_a_replica_that_is_gone_stays_in_the_book(book: FleetBook) -> None:
    book.observe(changed("b", "gone"), 1.0)
    assert [s.state for s in book.statuses()] == ["starting", "gone"]
    assert book.ready() == 0
    assert "m" in book.models()


def test_utilisation_is_the_share_of_time_with_a_call_in_flight(book: FleetBook, clock: SetClock) -> None:
    book.attempt_started("b")
    clock.at_s = 1.0
    book.attempt_started("b")
    clock.at_s = 2.0
    book.attempt_ended("b")
    clock.at_s = 3.0
    book.attempt_ended("b")
    clock.at_s = 4.0
    status = book.statuses()[1]
    assert (status.utilisation, status.in_flight, status.calls) == (0.75, 0, 2)


def test_a_call_that_still_runs_counts_as_busy(book: FleetBook, clock: SetClock) -> None:
    clock.at_s = 5.0
    book.attempt_started("b")
    clock.at_s = 10.0
    assert book.statuses()[1].utilisation == 0.5


def test_what_a_replica_never_reported_is_unknown(book: FleetBook) -> None:
    status = book.statuses()[0]
    assert (status.running, status.waiting, status.kv_usage, status.signal_age_s) == (None, None, None, None)


def test_a_report_is_shown_with_its_age(book: FleetBook, clock: SetClock) -> None:
    book.observe(SignalReported(replica_id="a", running=2, waiting=1, kv_usage=0.5, measured_at_s=1.0), 1.0)
    clock.at_s = 3.0
    status = book.statuses()[0]
    assert (status.running, status.waiting, status.kv_usage, status.signal_age_s) == (2, 1, 0.5, 2.0)


def test_what_is_not_about_replicas_or_about_unknown_ones_is_ignored(book: FleetBook) -> None:
    before = book.statuses()
    book.observe(CallCancelled(call_id="c"), 0.0)
    book.observe(SignalReported(replica_id="x", running=2, waiting=1, kv_usage=0.5, measured_at_s=1.0), 1.0)
    assert book.statuses() == before


def elastic_book(clock: SetClock) -> FleetBook:
    """One replica of somebody else, and one that was started here."""
    book = FleetBook(clock, elastic=lambda replica_id: replica_id.startswith("own"))
    book.observe(changed("fixed", "ready"), 0.0)
    book.observe(changed("own", "ready"), 0.0)
    return book


def ids(book: FleetBook) -> list[str]:
    return [status.replica_id for status in book.statuses()]


def test_a_replica_that_was_started_here_is_elastic_also_once_it_is_gone(clock: SetClock) -> None:
    started = {"own"}
    book = FleetBook(clock, elastic=lambda replica_id: replica_id in started)
    book.observe(changed("own", "starting"), 0.0)
    book.observe(changed("fixed", "ready"), 0.0)
    started.clear()
    book.observe(changed("own", "gone"), 1.0)
    assert {status.replica_id: status.elastic for status in book.statuses()} == {"own": True, "fixed": False}


def test_an_elastic_replica_is_forgotten_ten_minutes_after_it_is_gone(clock: SetClock) -> None:
    book = elastic_book(clock)
    for name in ("fixed", "own"):
        book.observe(changed(name, "gone"), 100.0)
    clock.at_s = 700.0
    assert ids(book) == ["fixed", "own"]
    clock.at_s = 700.1
    assert ids(book) == ["fixed"]
    assert "m" in book.models()


def test_a_replica_that_is_back_is_not_forgotten(clock: SetClock) -> None:
    book = elastic_book(clock)
    book.observe(changed("own", "gone"), 100.0)
    book.observe(changed("own", "ready"), 200.0)
    clock.at_s = 10_000.0
    assert ids(book) == ["fixed", "own"]


def test_a_replica_with_a_call_in_flight_is_not_forgotten(clock: SetClock) -> None:
    book = elastic_book(clock)
    book.attempt_started("own")
    book.observe(changed("own", "gone"), 100.0)
    clock.at_s = 10_000.0
    assert ids(book) == ["fixed", "own"]
    book.attempt_ended("own")
    assert ids(book) == ["fixed"]


def test_the_book_stays_bounded_though_nobody_reads_it(clock: SetClock) -> None:
    book = FleetBook(clock, elastic=lambda replica_id: True)
    for number in range(1000):
        book.observe(changed(f"own-{number}", "ready"), number * 10.0)
        book.observe(changed(f"own-{number}", "gone"), number * 10.0)
    assert len(ids(book)) == 61


def test_the_last_service_curve_of_a_replica_is_kept_with_its_age_until_it_is_gone(
    book: FleetBook, clock: SetClock
) -> None:
    assert book.statuses()[1].service_curve is None
    book.observe(a_curve("b", at_s=1.0), 1.0)
    book.observe(a_curve("nobody"), 1.0)
    clock.at_s = 5.0
    shown = book.statuses()[1].service_curve
    assert shown is not None
    assert (shown.age_s, shown.version, shown.p50_s) == (4.0, "latency-1", 4.0)
    assert book.service_curve("b") == a_curve("b", at_s=1.0)
    book.observe(changed("b", "gone"), 6.0)
    assert book.statuses()[1].service_curve is None


@pytest.mark.parametrize("replica_id", ["a", "nobody"])
def test_a_curve_that_is_not_there_is_not_found(book: FleetBook, replica_id: str) -> None:
    with pytest.raises(NotFound, match=replica_id):
        book.service_curve(replica_id)
