"""Prometheus metrics of the gateway and its agents; labels are models, states and policies, nothing unbounded."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from swarmx.core.control import Proposal
from swarmx.core.messages import AlertRaised, DecisionMade, DemandReported, Message, ScalePlanned
from swarmx.core.records import CallRecord
from swarmx.gateway.predictor_metrics import PredictorMetrics
from swarmx.runtime.fleet_book import FleetBook

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Telemetry:
    """Counts what passes by; the fleet's gauges are read from the book when asked for."""

    def __init__(self, book: FleetBook, *, faults: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self._book = book
        Gauge(
            "swarmx_agent_faults",
            "Messages that an agent failed on, and actions outside its set.",
            registry=self._registry,
        ).set_function(faults)
        self._calls = Counter("swarmx_calls", "Calls that ended.", ["model", "state"], registry=self._registry)
        self._refused = Counter(
            "swarmx_refusals", "Calls that were refused.", ["model", "reason"], registry=self._registry
        )
        self._call_s = Histogram(
            "swarmx_call_seconds", "From acceptance to end.", ["model"], buckets=_SECONDS, registry=self._registry
        )
        self._decisions = Counter("swarmx_decisions", "Routing decisions.", ["policy"], registry=self._registry)
        self._alerts = Counter("swarmx_alerts", "Alerts that agents raised.", ["kind"], registry=self._registry)
        self._waiting = Gauge("swarmx_waiting", "Calls that wait in the router.", ["model"], registry=self._registry)
        self._wanted = Gauge(
            "swarmx_replicas_wanted", "Replicas that the scaling policy wants.", ["model"], registry=self._registry
        )
        self._plans = Counter(
            "swarmx_scale_plans", "Plans of the scaler.", ["model", "reason"], registry=self._registry
        )
        self._proposals = Counter(
            "swarmx_proposals", "States that proposals came to.", ["tool", "state"], registry=self._registry
        )
        self._turns = Counter(
            "swarmx_coordinator_turns", "Turns of the coordinator.", ["source"], registry=self._registry
        )
        self._tokens = Counter(
            "swarmx_coordinator_tokens", "Tokens of the coordinator's model.", ["direction"], registry=self._registry
        )
        self._lost = Counter("swarmx_records_lost", "Records that could not be stored.", registry=self._registry)
        self.predictor = PredictorMetrics(self._registry)
        self._registry.register(self)

    def observe(self, message: Message, now_s: float) -> None:
        """Follow decisions, alerts, demand and plans; register as an observer of the switchboard."""
        self.predictor.observe(message)
        if isinstance(message, DecisionMade):
            self._decisions.labels(message.decision.policy).inc()
        elif isinstance(message, AlertRaised):
            self._alerts.labels(message.kind).inc()
        elif isinstance(message, DemandReported):
            self._waiting.labels(message.model).set(message.waiting)
        elif isinstance(message, ScalePlanned):
            self._wanted.labels(message.plan.model).set(message.plan.wanted)
            self._plans.labels(message.plan.model, message.plan.reason).inc()

    def proposal_changed(self, proposal: Proposal) -> None:
        """Count the state that a proposal came to."""
        self._proposals.labels(proposal.call.tool, proposal.state).inc()

    def turn_ended(self, source: str, prompt_tokens: int, output_tokens: int) -> None:
        """Count a turn of the coordinator, by who thought, and what its model read and wrote."""
        self._turns.labels(source).inc()
        self._tokens.labels("prompt").inc(prompt_tokens)
        self._tokens.labels("output").inc(output_tokens)

    def call_ended(self, record: CallRecord) -> None:
        """Count a call; a model that no replica ever served goes under "unknown", whatever clients call it."""
        model = record.model if record.model in self._book.models() else "unknown"
        self._calls.labels(model, record.state).inc()
        if record.state == "refused":
            self._refused.labels(model, (record.error or "").partition(":")[0]).inc()
        self._call_s.labels(model).observe(max(0.0, record.ended_at_s - record.ready_at_s))
        self.predictor.call_ended(record)

    def record_lost(self) -> None:
        self._lost.inc()

    def collect(self) -> Iterator[Metric]:
        """Gauges of the fleet, by model (called by prometheus_client)."""
        replicas = GaugeMetricFamily("swarmx_replicas", "Replicas.", labels=["model", "state"])
        in_flight = GaugeMetricFamily("swarmx_in_flight", "Calls at replicas.", labels=["model"])
        counts: dict[tuple[str, str], int] = {}
        loads: dict[str, int] = {}
        for row in self._book.statuses():
            counts[row.model, row.state] = counts.get((row.model, row.state), 0) + 1
            loads[row.model] = loads.get(row.model, 0) + row.in_flight
        for (model, state), count in counts.items():
            replicas.add_metric([model, state], count)
        for model, load in loads.items():
            in_flight.add_metric([model], load)
        yield replicas
        yield in_flight

    def text(self) -> bytes:
        """The exposition format of Prometheus."""
        return generate_latest(self._registry)
