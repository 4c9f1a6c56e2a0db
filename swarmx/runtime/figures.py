"""How models and workflows have fared of late: bounded rolling windows over what passes by."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from swarmx.core.control import AlertSeen
from swarmx.core.messages import AlertRaised, CallReady, DemandReported, Message, ReplicaChanged, ScalePlanned
from swarmx.core.nouns import CallKind
from swarmx.core.records import CallRecord, CallState
from swarmx.core.scaling import ScalePlan

_LAST = 50  # alerts and plans that are kept
_LEAST_S = 1.0  # a rate is taken over no less than this


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFigures:
    """One model over the last `window_s`.

    The window is shorter than asked for while the model is not known for that long, and when more calls came than are
    kept. Latencies are those of calls that finished; waits, from acceptance to the last dispatch, are those of all that
    ended. None: there were none.
    """

    window_s: float
    arrivals_per_s: float
    ended: int
    failed: int
    p50_s: float | None
    p95_s: float | None
    wait_p95_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkflowFigures:
    """Workflows that ended in the last `window_s`, which is shorter than asked for when more ended than are kept."""

    window_s: float
    ended: int
    p95_s: float | None


@dataclass(frozen=True, slots=True)
class _Ended:
    at_s: float
    latency_s: float
    wait_s: float
    state: CallState


@dataclass(slots=True, kw_only=True)
class _Model:
    kind: CallKind
    arrivals: deque[float]
    ended: deque[_Ended]
    since_s: float | None = None
    weights: dict[str, float] = field(default_factory=dict)
    demand: tuple[float, DemandReported] | None = None


class Figures:
    """Keeps the last `limit` arrivals and ends of each model, and ends of workflows; reads cover `window_s`.

    A model is known once a replica of it was announced, or from the start when it is in `models`; what is said of any
    other is dropped, because names of models come from clients.
    """

    def __init__(
        self, *, window_s: float = 120.0, limit: int = 5000, models: Mapping[str, CallKind] | None = None
    ) -> None:
        self._window_s = window_s
        self._limit = limit
        self._models: dict[str, _Model] = {}
        self._workflows: deque[tuple[float, float]] = deque(maxlen=limit)  # (ended at, latency)
        self._alerts: deque[AlertSeen] = deque(maxlen=_LAST)
        self._plans: deque[ScalePlan] = deque(maxlen=_LAST)
        for name, kind in (models or {}).items():
            self._models[name] = self._new(kind)

    def observe(self, message: Message, now_s: float) -> None:
        """Follow arrivals, replicas, demand, plans and alerts; register as an observer of the switchboard."""
        if isinstance(message, CallReady):
            model = self._heard_of(message.call.model, now_s)
            if model is not None:
                model.arrivals.append(now_s)
        elif isinstance(message, DemandReported):
            model = self._heard_of(message.model, now_s)
            if model is not None:
                model.demand = (now_s, message)
        elif isinstance(message, ReplicaChanged):
            self._replica_changed(message, now_s)
        elif isinstance(message, ScalePlanned):
            self._plans.append(message.plan)
        elif isinstance(message, AlertRaised):
            alert = AlertSeen(at_s=now_s, kind=message.kind, subject=message.subject, value=message.value)
            self._alerts.append(alert)

    def call_ended(self, record: CallRecord) -> None:
        """Take in what became of a call."""
        model = self._models.get(record.model)
        if model is None:
            return
        waited_until_s = record.ended_at_s if record.dispatched_at_s is None else record.dispatched_at_s
        model.ended.append(
            _Ended(
                record.ended_at_s,
                record.ended_at_s - record.ready_at_s,
                waited_until_s - record.ready_at_s,
                record.state,
            )
        )

    def workflow_ended(self, latency_s: float, now_s: float) -> None:
        """A workflow has ended that took so long."""
        self._workflows.append((now_s, latency_s))

    def models(self) -> dict[str, CallKind]:
        """The models that are known, with their kinds."""
        return {name: model.kind for name, model in self._models.items()}

    def model(self, name: str, now_s: float) -> ModelFigures:
        """A model's figures. Raises KeyError for one that is not known."""
        model = self._models[name]
        start_s, window_s = self._covered(
            max(
                now_s if model.since_s is None else model.since_s,
                model.arrivals[0] if len(model.arrivals) == self._limit else -np.inf,
                model.ended[0].at_s if len(model.ended) == self._limit else -np.inf,
            ),
            now_s,
        )
        ended = [call for call in model.ended if call.at_s >= start_s]
        latencies_s = [call.latency_s for call in ended if call.state == "finished"]
        return ModelFigures(
            window_s=window_s,
            arrivals_per_s=sum(at_s >= start_s for at_s in model.arrivals) / window_s,
            ended=len(ended),
            failed=sum(call.state in ("failed", "refused") for call in ended),
            p50_s=_quantile(latencies_s, 0.5),
            p95_s=_quantile(latencies_s, 0.95),
            wait_p95_s=_quantile([call.wait_s for call in ended], 0.95),
        )

    def workflows(self, now_s: float) -> WorkflowFigures:
        """The figures of workflows."""
        full = len(self._workflows) == self._limit
        start_s, window_s = self._covered(self._workflows[0][0] if full else -np.inf, now_s)
        latencies_s = [latency_s for at_s, latency_s in self._workflows if at_s >= start_s]
        return WorkflowFigures(window_s=window_s, ended=len(latencies_s), p95_s=_quantile(latencies_s, 0.95))

    def demand(self, name: str) -> tuple[float, DemandReported] | None:
        """The last report of the demand for a model, after the time at which it came."""
        model = self._models.get(name)
        return None if model is None else model.demand

    def cost_rate(self, name: str) -> float:
        """The sum of the cost weights of a model's replicas that are not gone."""
        model = self._models.get(name)
        return 0.0 if model is None else sum(model.weights.values())

    @property
    def alerts(self) -> Sequence[AlertSeen]:
        """The last alerts, oldest first."""
        return tuple(self._alerts)

    @property
    def plans(self) -> Sequence[ScalePlan]:
        """The last plans, oldest first."""
        return tuple(self._plans)

    def _covered(self, since_s: float, now_s: float) -> tuple[float, float]:
        """Where the window begins, given when what is kept begins, and how long it is."""
        start_s = now_s - self._window_s
        if since_s <= start_s:
            return start_s, self._window_s
        return since_s, max(_LEAST_S, now_s - since_s)

    def _heard_of(self, name: str, now_s: float) -> _Model | None:
        model = self._models.get(name)
        if model is not None and model.since_s is None:
            model.since_s = now_s
        return model

    def _replica_changed(self, message: ReplicaChanged, now_s: float) -> None:
        replica = message.replica
        model = self._heard_of(replica.model, now_s)
        if model is None:
            model = self._models[replica.model] = self._new(replica.kind, since_s=now_s)
        if message.state == "gone":
            model.weights.pop(replica.replica_id, None)
        else:
            model.weights[replica.replica_id] = replica.profile.cost_weight

    def _new(self, kind: CallKind, since_s: float | None = None) -> _Model:
        return _Model(kind=kind, since_s=since_s, arrivals=deque(maxlen=self._limit), ended=deque(maxlen=self._limit))


def _quantile(values: Sequence[float], level: float) -> float | None:
    return float(np.quantile(values, level)) if values else None
