"""What a simulated router is told of the rest of a workflow, and how long a workflow takes in an empty system."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from eval.sim.settings import PathName
from eval.workloads.plan import PlannedWorkflow
from swarmx.config import PredictorSection
from swarmx.core.engine import EngineProfile
from swarmx.core.forecast import Forecast, point
from swarmx.core.messages import Message
from swarmx.core.nouns import Replica
from swarmx.neural.structure_live import WorkflowForecasts
from swarmx.wiring.predictors import workflow_forecasts


def mean_profiles(fleet: Sequence[Replica]) -> dict[str, EngineProfile]:
    """For each model an engine whose times alone are the mean over its replicas: all that a call costs is linear."""
    by_model: dict[str, list[EngineProfile]] = {}
    for replica in fleet:
        by_model.setdefault(replica.model, []).append(replica.profile)
    names = [name for name in EngineProfile.__struct_fields__ if name.endswith("_s")]
    return {
        model: msgspec.structs.replace(
            profiles[0], **{name: float(np.mean([getattr(p, name) for p in profiles])) for name in names}
        )
        for model, profiles in by_model.items()
    }


@dataclass(frozen=True, slots=True)
class Unloaded:
    """A workflow in an empty system: `service_s` of each call, `tails_s` from its start to the workflow's end."""

    service_s: list[float]
    tails_s: list[float]
    total_s: float


def unloaded(workflow: PlannedWorkflow, profiles: Mapping[str, EngineProfile]) -> Unloaded:
    """By the truth, on idle devices of middling speed; nothing cached. Calls of unknown models take no time."""
    service_s = [
        profile.alone_s(call.prompt_tokens, call.work) if (profile := profiles.get(call.model)) is not None else 0.0
        for call in workflow.calls
    ]
    tails_s = list(service_s)
    for i in range(len(tails_s) - 1, -1, -1):
        behind_s = workflow.calls[i].gap_s + tails_s[i]
        for before in workflow.calls[i].after:
            tails_s[before] = max(tails_s[before], service_s[before] + behind_s)
    total_s = max(call.gap_s + tail_s for call, tail_s in zip(workflow.calls, tails_s, strict=True) if not call.after)
    return Unloaded(service_s, tails_s, total_s)


@dataclass(slots=True, kw_only=True)
class Rest:
    """The calls of one workflow that are due or under way: when each is, or was, ready."""

    unloaded: Unloaded
    ready_s: dict[int, float] = field(default_factory=dict)

    def path_s(self, now_s: float) -> float:
        """The critical path from now on; a call that is late is as if it were about to end."""
        tails_s, service_s = self.unloaded.tails_s, self.unloaded.service_s
        return max(max(at_s - now_s, -service_s[i]) + tails_s[i] for i, at_s in self.ready_s.items())


class Paths:
    """Asked about a workflow when one of its calls is ready; hears all messages before the router does."""

    def __init__(self, name: PathName, weights: Path | None) -> None:
        self._name = name
        self._forecasts: WorkflowForecasts | None = None
        if name == "neural":
            self._forecasts, _ = workflow_forecasts(PredictorSection(weights=weights))
        elif name == "means":
            self._forecasts = WorkflowForecasts()
        self.hears = self._forecasts is not None

    def hear(self, message: Message, now_s: float) -> None:
        if self._forecasts is not None:
            self._forecasts.hear(message, now_s)

    def of(self, workflow_id: str, rest: Rest, position: int, now_s: float) -> Forecast | None:
        """The seconds to the end of the workflow; None where the router is left to itself."""
        if self._forecasts is not None:
            remaining = self._forecasts.remaining(workflow_id, now_s)
            return None if remaining is None else remaining.path
        if self._name == "oracle":
            return point(rest.path_s(now_s), unit="s")
        if self._name == "oracle_call":
            return point(rest.unloaded.tails_s[position], unit="s")
        return None
