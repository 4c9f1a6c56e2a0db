"""Prometheus metrics of the predictors: who forecasts, how fast, how often it stood aside, how right it was."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from swarmx.core.messages import CallReady, ForecastScored, Message, PredictorReady, RetrainEnded
from swarmx.core.records import CallRecord

_SECONDS = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.25, 1.0)


class PredictorMetrics:
    """Observes the switchboard; the forecaster and what is around it say the rest themselves.

    Labels are enums of the code, never words of clients.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"swarmx_predictor_{name}", text, labels, registry=registry)

        self._forecasts = counter("forecasts", "Forecasts that calls began with.", "source")
        self._fallbacks = counter("fallbacks", "Times that a predictor was replaced.", "reason")
        self._refined = counter("refined", "Prompts that a slow encoder was asked to read.", "outcome")
        self._outcomes = counter("outcomes", "Outcomes, at or below the 90 % quantile or not.", "source", "covered")
        self._loss = counter("loss", "Sum of the tail losses of neural forecasts.", "head")
        self._scored = counter("scored", "Neural forecasts that were scored.", "head")
        self._retrained = counter("retrained", "Retrainings that ended.", "head", "outcome")
        self._swapped = counter("swapped", "Times that other weights were put in force.", "head")
        self._seconds = Histogram(
            "swarmx_predictor_seconds",
            "To read a prompt and forecast.",
            ["source"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._resting = Gauge("swarmx_predictor_resting", "1 while plain statistics stand in.", registry=registry)

    def watch_resting(self, resting: Callable[[], bool]) -> None:
        """Where to read whether plain statistics stand in."""
        self._resting.set_function(resting)

    def observe(self, message: Message) -> None:
        """Follow forecasts, scores and retrainings."""
        if isinstance(message, CallReady):
            self._forecasts.labels(message.forecast.source).inc()
        elif isinstance(message, ForecastScored):
            self._scored.labels(message.head).inc()
            self._loss.labels(message.head).inc(message.loss)
        elif isinstance(message, RetrainEnded):
            self._retrained.labels(message.head, message.outcome).inc()
        elif isinstance(message, PredictorReady):
            self._swapped.labels(message.head).inc()

    def call_ended(self, record: CallRecord) -> None:
        """Count how often outcomes are where they should be nine times out of ten; an image's work is known before."""
        if record.state == "finished" and record.kind == "llm" and record.work_done > 0.0:
            covered = "yes" if record.work_done <= record.forecast_p90 else "no"
            self._outcomes.labels(record.forecast_source, covered).inc()

    def took(self, source: str, seconds: float) -> None:
        """A forecast was made."""
        self._seconds.labels(source).observe(max(0.0, seconds))

    def replaced(self, reason: str) -> None:
        """A predictor stands aside: it raised, was unsound or slow, or its weights are missing."""
        self._fallbacks.labels(reason).inc()

    def refined(self, outcome: str) -> None:
        """What became of a prompt that a slow encoder was asked to read."""
        self._refined.labels(outcome).inc()
