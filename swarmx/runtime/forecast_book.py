"""What operators see of the predictors: heads in force, how forecasts did of late, drift, retraining and stand-ins."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence

import msgspec

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
    RetrainOutcome,
)
from swarmx.neural.checkpoint import Card

_LEVELS = (0.5, 0.9, 0.99)
_ALERTS: tuple[AlertKind, ...] = ("predictor_fallback", "forecast_drift")


class HeadInForce(msgspec.Struct, frozen=True, kw_only=True):
    """Weights that forecast now; `metrics` and `calibration` are those of the card of the weights at the start.

    `since_s` is when they were put in force, None for those of the start; then `card_version` is their own.
    """

    name: str
    version: str
    card_version: str
    since_s: float | None
    metrics: dict[str, float]
    calibration: dict[str, float]
    counts: dict[str, int]


class Observed(msgspec.Struct, frozen=True, kw_only=True):
    """Of the last forecasts by `source`: the share of outcomes at or below three quantiles."""

    source: Source
    calls: int
    at_p50: float
    at_p90: float
    at_p99: float


class ClassScore(msgspec.Struct, frozen=True, kw_only=True):
    """Neural forecasts of one prompt class since the start: how many, their mean tail loss, the share within P90."""

    head: str
    prompt_class: str
    device: str
    calls: int
    loss: float
    covered: float


class Happened(msgspec.Struct, frozen=True, kw_only=True):
    """Something that adaptation did: an alert (by its kind), a "retraining" that ended, weights "in_force".

    `subject` is a head, a class or a predictor; `outcome` and losses are those of a retraining.
    """

    at_s: float
    what: str
    subject: str
    version: str = ""
    previous: str = ""
    outcome: RetrainOutcome | None = None
    loss_before: float | None = None
    loss_after: float | None = None


class PredictorStatus(msgspec.Struct, frozen=True, kw_only=True):
    """`engine` is what the settings ask for, `missing` what of it cannot be had, `resting` whether plain statistics
    stand in now. `last` is over how many forecasts `observed` looks back; `events` are newest first."""

    engine: str
    resting: bool
    missing: tuple[str, ...]
    heads: tuple[HeadInForce, ...]
    last: int
    observed: tuple[Observed, ...]
    classes: tuple[ClassScore, ...]
    events: tuple[Happened, ...]


class ForecastBook:
    """Observes the switchboard; everything that it keeps is bounded.

    `last` outcomes are looked back on, `open_calls` forecasts wait for theirs, `classes` keys are counted, the oldest
    forgotten first. `cards` are those of the weights at the start.
    """

    def __init__(
        self,
        *,
        engine: str = "empirical",
        cards: Sequence[Card] = (),
        in_force: Mapping[str, str] | None = None,
        missing: Sequence[str] = (),
        resting: Callable[[], bool] = lambda: False,
        last: int = 2000,
        open_calls: int = 20_000,
        classes: int = 500,
        events: int = 50,
    ) -> None:
        self._engine = engine
        self._missing = tuple(missing)
        self._resting = resting
        versions = in_force or {}
        self._heads = {card.name: _in_force(card, versions.get(card.name, card.version)) for card in cards}
        self._open: OrderedDict[str, Forecast] = OrderedDict()
        self._most_open = open_calls
        self._outcomes: deque[tuple[Source, tuple[bool, ...]]] = deque(maxlen=last)
        self._classes: OrderedDict[tuple[str, str, str], tuple[int, float, int]] = OrderedDict()
        self._most_classes = classes
        self._events: deque[Happened] = deque(maxlen=events)

    def observe(self, message: Message, now_s: float) -> None:
        """Follow forecasts to their outcomes, scores, retrainings and alerts."""
        match message:
            case CallReady():
                if message.call.kind == "llm":
                    self._waits(message.call.call_id, message.forecast)
            case ForecastRefined():
                if message.call_id in self._open:
                    self._waits(message.call_id, message.forecast)
            case CallFinished():
                self._came(message)
            case CallCancelled():
                self._open.pop(message.call_id, None)
            case CallFailed():
                if not message.retryable:
                    self._open.pop(message.call_id, None)
            case ForecastScored():
                self._scored(message)
            case RetrainEnded():
                self._events.append(
                    Happened(
                        at_s=now_s,
                        what="retraining",
                        subject=message.head,
                        version=message.version,
                        outcome=message.outcome,
                        loss_before=message.loss_before,
                        loss_after=message.loss_after,
                    )
                )
            case PredictorReady():
                self._put_in_force(message, now_s)
            case AlertRaised():
                if message.kind in _ALERTS:
                    self._events.append(Happened(at_s=now_s, what=message.kind, subject=message.subject))
            case _:
                pass

    def status(self) -> PredictorStatus:
        """All of it as it is now."""
        return PredictorStatus(
            engine=self._engine,
            resting=self._resting(),
            missing=self._missing,
            heads=tuple(self._heads.values()),
            last=len(self._outcomes),
            observed=self._observed(),
            classes=tuple(
                ClassScore(
                    head=head,
                    prompt_class=prompt_class,
                    device=device,
                    calls=calls,
                    loss=loss / calls,
                    covered=covered / calls,
                )
                for (head, prompt_class, device), (calls, loss, covered) in sorted(
                    self._classes.items(), key=lambda item: -item[1][0]
                )
            ),
            events=tuple(reversed(self._events)),
        )

    def _waits(self, call_id: str, forecast: Forecast) -> None:
        self._open[call_id] = forecast
        if len(self._open) > self._most_open:
            self._open.popitem(last=False)

    def _came(self, message: CallFinished) -> None:
        forecast = self._open.pop(message.call_id, None)
        if forecast is not None and message.work_done > 0.0:
            covered = tuple(message.work_done <= forecast.quantile(level) for level in _LEVELS)
            self._outcomes.append((forecast.source, covered))

    def _scored(self, message: ForecastScored) -> None:
        key = (message.head, message.prompt_class, message.device)
        calls, loss, covered = self._classes.pop(key, (0, 0.0, 0))
        self._classes[key] = (calls + 1, loss + message.loss, covered + message.covered)
        if len(self._classes) > self._most_classes:
            self._classes.popitem(last=False)

    def _put_in_force(self, message: PredictorReady, now_s: float) -> None:
        self._events.append(
            Happened(
                at_s=now_s,
                what="in_force",
                subject=message.head,
                version=message.version,
                previous=message.previous,
            )
        )
        head = self._heads.get(message.head)
        if head is not None:
            since_s = None if message.version == head.card_version else now_s
            self._heads[message.head] = msgspec.structs.replace(head, version=message.version, since_s=since_s)

    def _observed(self) -> tuple[Observed, ...]:
        found: dict[Source, list[tuple[bool, ...]]] = {}
        for source, covered in self._outcomes:
            found.setdefault(source, []).append(covered)
        return tuple(
            Observed(source=source, calls=len(rows), at_p50=p50, at_p90=p90, at_p99=p99)
            for source, rows in sorted(found.items())
            for p50, p90, p99 in [(sum(each) / len(rows) for each in zip(*rows, strict=True))]
        )


def _in_force(card: Card, version: str) -> HeadInForce:
    return HeadInForce(
        name=card.name,
        version=version,
        card_version=card.version,
        since_s=None,
        metrics=card.metrics,
        calibration=card.calibration,
        counts=card.counts,
    )
