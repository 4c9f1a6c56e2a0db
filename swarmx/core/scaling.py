"""What a scaling policy sees of a model's demand and capacity, and how a plan is remembered."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import msgspec

from swarmx.core.engine import EngineProfile

PlanReason = Literal[
    "steady",  # there are as many replicas as wanted
    "grow",
    "shrink",
    "requested",  # somebody asked for this many
    "threshold",  # the change is too small to be worth a start or a stop
    "cooldown",  # the last change is too recent
    "limit",  # the bounds, or the budget of the whole fleet, do not allow more
    "backoff",  # replicas of this model failed to start; the next try waits
]


class ScalePlan(msgspec.Struct, frozen=True, kw_only=True):
    """What the scaler decided about one model, and from which numbers.

    `have` replicas are ready or starting; the policy wanted `wanted` (in replicas of the group with the best price),
    the limits left `target`. `terms` are the policy's own numbers, their units in their names.
    """

    model: str
    at_s: float
    policy: str
    parameters: dict[str, float]
    have: float
    wanted: float
    target: int
    min_replicas: int
    max_replicas: int
    horizon_s: float
    terms: dict[str, float]
    deploys: tuple[str, ...]
    drains: tuple[str, ...]
    reason: PlanReason


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleView:
    """One model as a scaling policy sees it: demand summed over all routers, capacity in replicas.

    `arrivals_per_s` is the rate of calls over the last reports, `burst_per_s` over the very last one. `upcoming_mean`
    and `upcoming_p90` are calls that running workflows will make within `horizon_s` (the learned time to start a
    replica, plus one planning interval), `fresh_mean` those of workflows that are not submitted yet. `capacity`
    counts replicas that are ready or starting, each weighted by its speed relative to `profile`, that of the group with
    the best price for a call.
    """

    model: str
    now_s: float
    horizon_s: float
    in_flight: int
    waiting: int
    work_left: float
    work_per_call: float
    arrivals_per_s: float
    burst_per_s: float
    upcoming_mean: float
    upcoming_p90: float
    fresh_mean: float
    capacity: float
    profile: EngineProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A scaling policy's answer: replicas like `ScaleView.profile` (a fraction is rounded by the scaler), and why."""

    replicas: float
    terms: dict[str, float] = field(default_factory=dict)
