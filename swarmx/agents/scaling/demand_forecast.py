"""demand_forecast: as many replicas as the demand will need by the time that a new one is ready."""

from dataclasses import dataclass
from typing import ClassVar

from swarmx.agents.scaling.speed import call_s, calls_at_once, check_at_least
from swarmx.core.scaling import ScaleView, Target


@dataclass(frozen=True, slots=True, kw_only=True)
class DemandForecast:
    """As many replicas as the demand will need by the time that a new one is ready.

    With horizon H, target n of calls on a replica, and T the seconds of an average call among n on `view.profile`,
    Little's law (calls there = rate * T) gives the calls that are there at once, averaged over the horizon:

        now      = in flight + waiting
        backlog  = min(now, work left * (seconds of a unit of work) / H)
        upcoming = (mean + tail_weight * (P90 - mean)) * min(1, T / H)     calls of workflows that are running
        fresh    = mean * min(1, T / H)                                    calls of workflows still to be submitted
        replicas = max(now, backlog + upcoming + fresh) / n

    A call that takes longer than the horizon counts once, since it is there at its end.
    """

    name: ClassVar[str] = "demand_forecast"
    target_in_flight: float = 16.0
    tail_weight: float = 0.5

    def __post_init__(self) -> None:
        check_at_least("target_in_flight", self.target_in_flight, 0.1)
        check_at_least("tail_weight", self.tail_weight, 0.0)

    def target(self, view: ScaleView) -> Target:
        each = calls_at_once(view.profile, self.target_in_flight)
        one_s = call_s(view.profile, each, view.work_per_call)
        share = min(1.0, one_s / view.horizon_s)
        now = float(view.in_flight + view.waiting)
        calls_left = view.work_left / view.work_per_call if view.work_per_call > 0.0 else now
        backlog = min(now, calls_left * one_s / view.horizon_s)
        upcoming = (view.upcoming_mean + self.tail_weight * (view.upcoming_p90 - view.upcoming_mean)) * share
        fresh = view.fresh_mean * share
        return Target(
            replicas=max(now, backlog + upcoming + fresh) / each,
            terms={
                "now_replicas": now / each,
                "backlog_replicas": backlog / each,
                "upcoming_replicas": upcoming / each,
                "fresh_replicas": fresh / each,
                "calls_a_replica": each,
                "call_s": one_s,
            },
        )
