"""What a simulated router is told of the work of a call: the trained predictor, plain statistics, or the truth."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol, assert_never

import msgspec
import numpy as np

from eval.sim.settings import ForecastName
from eval.workloads.plan import PlannedCall, PlannedWorkflow, Workload, forecast_of
from swarmx.core.forecast import LEVELS, Forecast, from_samples, point
from swarmx.neural.leader import FollowTheLeader

PRIOR_TOKENS = 256.0
HISTORY = 200

_Key = tuple[str, str, str]


class CallForecasts(Protocol):
    """Forecasts the work of calls as they become ready, and learns from those that finished."""

    def of(self, workflow: PlannedWorkflow, call: PlannedCall) -> Forecast: ...

    def finished(self, workflow: PlannedWorkflow, call: PlannedCall) -> None: ...


def call_forecasts(name: ForecastName, workload: Workload) -> CallForecasts:
    """The forecaster of that name."""
    match name:
        case "neural":
            return _Followed(workload)
        case "oracle":
            return _Told(lambda call: point(call.work, unit="tokens" if call.kind == "llm" else "work"))
        case "role_means":
            return _RoleMeans(workload)
        case "role_quantiles":
            return _RoleQuantiles(workload)
        case _:
            assert_never(name)


class _Told:
    """Knows beforehand."""

    def __init__(self, of: Callable[[PlannedCall], Forecast]) -> None:
        self._of = of

    def of(self, workflow: PlannedWorkflow, call: PlannedCall) -> Forecast:
        return self._of(call)

    def finished(self, workflow: PlannedWorkflow, call: PlannedCall) -> None:
        pass


class _Followed:
    """What the trained predictor said, or what was heard of such calls by now where that did better, as when live."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._leader = FollowTheLeader(LEVELS)

    def of(self, workflow: PlannedWorkflow, call: PlannedCall) -> Forecast:
        said = forecast_of(self._workload, call)
        if call.kind != "llm":
            return said
        chosen = self._leader.choose(_class_of(workflow, call), np.array(said.quantiles))
        return msgspec.structs.replace(said, quantiles=tuple(np.minimum(chosen, call.work_limit).tolist()))

    def finished(self, workflow: PlannedWorkflow, call: PlannedCall) -> None:
        if call.kind == "llm":
            self._leader.observe(
                _class_of(workflow, call), self._workload.quantiles[call.forecast].astype(float), call.work
            )


def _class_of(workflow: PlannedWorkflow, call: PlannedCall) -> str:
    return f"{call.recorded or call.model}|{workflow.kind}/{call.role}"


class _RoleMeans:
    """The running mean of the role; where the request tells the work (images), that."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._means = dict(workload.role_means)

    def of(self, workflow: PlannedWorkflow, call: PlannedCall) -> Forecast:
        if call.kind != "llm":
            return forecast_of(self._workload, call)
        _, mean = self._means.get((workflow.kind, call.role, call.recorded or call.model), (0, PRIOR_TOKENS))
        return point(mean, unit="tokens")

    def finished(self, workflow: PlannedWorkflow, call: PlannedCall) -> None:
        if call.kind == "llm":
            key = (workflow.kind, call.role, call.recorded or call.model)
            count, mean = self._means.get(key, (0, 0.0))
            self._means[key] = (count + 1, mean + (call.work - mean) / (count + 1))


class _RoleQuantiles:
    """The quantiles of the role's last calls; where the request tells the work (images), that."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._past: dict[_Key, deque[float]] = {}
        self._made: dict[_Key, Forecast] = {}

    def of(self, workflow: PlannedWorkflow, call: PlannedCall) -> Forecast:
        if call.kind != "llm":
            return forecast_of(self._workload, call)
        key = (workflow.kind, call.role, call.recorded or call.model)
        if (made := self._made.get(key)) is None:
            past = self._past.get(key)
            made = point(PRIOR_TOKENS, unit="tokens") if past is None else from_samples(past, unit="tokens")
            self._made[key] = made
        return made

    def finished(self, workflow: PlannedWorkflow, call: PlannedCall) -> None:
        if call.kind == "llm":
            key = (workflow.kind, call.role, call.recorded or call.model)
            self._past.setdefault(key, deque(maxlen=HISTORY)).append(call.work)
            self._made.pop(key, None)
