"""What the book of forecasts tells operators, and that it stays small."""

from __future__ import annotations

import pytest

from swarmx.core.forecast import Forecast, Source
from swarmx.core.messages import (
    AlertKind,
    AlertRaised,
    CallCancelled,
    CallFailed,
    CallFinished,
    CallReady,
    ForecastRefined,
    ForecastScored,
    Message,
    PredictorReady,
    RetrainEnded,
)
from swarmx.core.nouns import CallKind
from swarmx.neural.checkpoint import Card
from swarmx.runtime.forecast_book import ForecastBook
from tests.agents.worlds import a_call

CARD = Card(
    format=1,
    name="length",
    version="length-1",
    weights_sha256="",
    created_by="",
    licence="CC0-1.0",
    metrics={"pinball": 16.0},
    calibration={"0.9": 0.89},
    counts={"test": 7},
)


def a_forecast(scale: float = 1.0, source: Source = "neural") -> Forecast:
    """Ten times `scale` at the median, 90 at P90 and 99 at P99."""
    levels = (0.1, 0.5, 0.9, 0.99)
    quantiles = (scale, 10.0 * scale, 90.0 * scale, 99.0 * scale)
    return Forecast(levels=levels, quantiles=quantiles, unit="tokens", source=source)


def ready(call_id: str, forecast: Forecast | None = None, kind: CallKind = "llm") -> CallReady:
    return CallReady(call=a_call(call_id, kind=kind), forecast=forecast or a_forecast())


def finished(call_id: str, work_done: float) -> CallFinished:
    return CallFinished(call_id=call_id, attempt=1, prompt_tokens=1, cached_tokens=0, work_done=work_done)


def scored(prompt_class: str = "k/r", *, loss: float = 0.2, covered: bool = True) -> ForecastScored:
    return ForecastScored(
        head="length", version="length-1", prompt_class=prompt_class, device="", loss=loss, covered=covered
    )


def told(book: ForecastBook, *messages: Message) -> ForecastBook:
    for at_s, message in enumerate(messages):
        book.observe(message, float(at_s))
    return book


def test_outcomes_are_held_against_the_quantiles_by_source() -> None:
    book = ForecastBook()
    for number, work_done in enumerate((5.0, 50.0, 95.0, 200.0)):
        told(book, ready(f"c{number}"), finished(f"c{number}", work_done))
    told(book, ready("p", a_forecast(source="prior")), finished("p", 1.0))
    neural, prior = book.status().observed
    assert (neural.source, neural.calls, neural.at_p50, neural.at_p90, neural.at_p99) == ("neural", 4, 0.25, 0.5, 0.75)
    assert (prior.source, prior.calls, prior.at_p50) == ("prior", 1, 1.0)
    assert book.status().last == 5


def test_a_refined_forecast_is_the_one_that_counts() -> None:
    refined = ForecastRefined(call_id="c", forecast=a_forecast(10.0))
    book = told(ForecastBook(), ready("c"), refined, finished("c", 95.0))
    assert book.status().observed[0].at_p50 == 1.0
    told(book, ForecastRefined(call_id="stranger", forecast=a_forecast()), finished("stranger", 1.0))
    assert book.status().last == 1


@pytest.mark.parametrize(
    "messages",
    [
        (ready("c", kind="image"), finished("c", 1.0)),
        (ready("c"), finished("c", 0.0)),
        (ready("c"), CallCancelled(call_id="c"), finished("c", 1.0)),
        (ready("c"), CallFailed(call_id="c", attempt=1, reason="lost", retryable=False), finished("c", 1.0)),
        (finished("c", 1.0),),
    ],
)
def test_a_call_without_forecast_or_outcome_says_nothing(messages: tuple[Message, ...]) -> None:
    assert told(ForecastBook(), *messages).status().observed == ()


def test_a_call_that_is_retried_keeps_its_forecast() -> None:
    failed = CallFailed(call_id="c", attempt=1, reason="lost", retryable=True)
    assert told(ForecastBook(), ready("c"), failed, finished("c", 1.0)).status().last == 1


def test_classes_have_their_mean_loss_and_coverage_most_frequent_first() -> None:
    book = told(ForecastBook(), scored("rare/r"), scored(loss=0.1), scored(loss=0.3, covered=False))
    often, rare = book.status().classes
    assert (often.prompt_class, often.calls, often.covered) == ("k/r", 2, 0.5)
    assert often.loss == pytest.approx(0.2)
    assert rare.prompt_class == "rare/r"


def test_a_head_that_was_trained_again_is_in_force_until_it_is_rolled_back() -> None:
    book = ForecastBook(engine="neural", cards=[CARD])
    (head,) = book.status().heads
    assert (head.version, head.since_s, head.metrics, head.counts) == ("length-1", None, {"pinball": 16.0}, {"test": 7})
    better = RetrainEnded(
        retrain_id="r", head="length", outcome="better", version="length-2", loss_before=2.0, loss_after=1.0
    )
    told(book, better, PredictorReady(head="length", version="length-2", previous="length-1"))
    (head,) = book.status().heads
    assert (head.version, head.card_version, head.since_s) == ("length-2", "length-1", 1.0)
    in_force, ended = book.status().events
    assert (in_force.what, in_force.version, in_force.previous) == ("in_force", "length-2", "length-1")
    assert (ended.what, ended.outcome, ended.loss_before, ended.loss_after) == ("retraining", "better", 2.0, 1.0)
    told(book, PredictorReady(head="length", version="length-1", previous="length-2"))
    assert book.status().heads[0].since_s is None
    told(book, PredictorReady(head="unheard", version="u-1", previous=""))
    assert len(book.status().heads) == 1


@pytest.mark.parametrize(("kind", "kept"), [("forecast_drift", 1), ("predictor_fallback", 1), ("at_max", 0)])
def test_of_alerts_only_those_of_predictors_are_kept(kind: AlertKind, kept: int) -> None:
    assert len(told(ForecastBook(), AlertRaised(kind=kind, subject="s")).status().events) == kept


def test_who_stands_in_is_asked_when_it_is_told() -> None:
    resting = False
    book = ForecastBook(engine="neural", missing=["sentence"], resting=lambda: resting)
    assert (book.status().resting, book.status().missing) == (False, ("sentence",))
    resting = True
    assert book.status().resting


def test_nothing_in_the_book_grows_without_bound() -> None:
    book = ForecastBook(last=5, open_calls=3, classes=4, events=2)
    for number in range(50):
        told(book, ready(f"open{number}"), ready(f"c{number}"), finished(f"c{number}", 1.0), scored(f"k{number}/r"))
        told(book, AlertRaised(kind="forecast_drift", subject=f"s{number}"))
    status = book.status()
    assert (status.last, len(status.classes), len(status.events)) == (5, 4, 2)
    assert status.events[0].subject == "s49", "newest first"
    told(book, finished("open0", 1.0))
    assert book.status().last == 5
    assert len(book._open) <= 3
    assert {c.prompt_class for c in status.classes} == {f"k{number}/r" for number in range(46, 50)}
