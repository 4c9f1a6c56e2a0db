"""target_tracking: as many replicas as keep so many calls on each."""

from dataclasses import dataclass
from typing import ClassVar

from swarmx.agents.scaling.speed import calls_at_once, check_at_least
from swarmx.core.scaling import ScaleView, Target


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetTracking:
    """As many replicas as keep `target_in_flight` calls on each, from the calls that are here now.

    What Kubernetes' HPA, KEDA and Ray Serve do with a concurrency target. A replica that holds fewer calls at once
    counts with those, so a serial server is wanted for every call.
    """

    name: ClassVar[str] = "target_tracking"
    target_in_flight: float = 16.0

    def __post_init__(self) -> None:
        check_at_least("target_in_flight", self.target_in_flight, 0.1)

    def target(self, view: ScaleView) -> Target:
        each = calls_at_once(view.profile, self.target_in_flight)
        calls = view.in_flight + view.waiting
        return Target(replicas=calls / each, terms={"calls": float(calls), "calls_a_replica": each})
