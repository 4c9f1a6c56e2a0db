"""From what is wanted of one model to the replicas to start and to end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from swarmx.agents.scaling.supply import Held, Measure, Supply
from swarmx.core.engine import EngineProfile
from swarmx.core.scaling import PlanReason

_CLOSE = 1e-6  # capacities are sums of ratios: what is this close to the wish is enough


class Bounds(NamedTuple):
    """How many replicas a model may have; operators move the first two between 0 and `limit`."""

    min_replicas: int
    max_replicas: int
    limit: int


def bounds_within(limit: int, least: int, most: int) -> Bounds:
    """The bounds that come closest to what is asked for."""
    most = min(max(0, most), limit)
    return Bounds(min_replicas=min(max(0, least), most), max_replicas=most, limit=limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is wanted of one model now.

    The policy wants `replicas` like `reference`, and wanted `most_lately` at most within the cooldown of shrinking; an
    `order` for a number of replicas overrules it. Changes below `threshold`, a share of what is there, can wait, and
    growth has to while `is_cooling`.
    """

    replicas: float
    most_lately: float
    order: int | None
    bounds: Bounds
    reference: EngineProfile
    measure: Measure
    threshold: float
    is_cooling: bool

    @property
    def wanted(self) -> float:
        return self.replicas if self.order is None else float(self.order)

    def is_small(self, change: float, have: float) -> bool:
        return change < min(1.0, self.threshold * have)


def ideal(supply: Supply, wish: Wish) -> int:
    """The number of replicas that the wish comes to, whatever the bounds are."""
    if wish.order is not None:
        return wish.order
    have, count = supply.capacity(wish.reference, wish.measure), supply.count()
    if wish.replicas > have + _CLOSE:
        return count + math.ceil(wish.replicas - have - _CLOSE)
    for held in supply.leavers(wish.measure):
        have -= wish.measure.speed(held.profile, wish.reference)
        if have + _CLOSE < wish.replicas:
            break
        count -= 1
    return count


def grow(supply: Supply, wish: Wish, start: Callable[[], EngineProfile | PlanReason]) -> PlanReason | None:
    """Start one replica after the other; returns what stands in the way where more are wanted.

    The least number is made up at once; anything beyond waits for cooldown and threshold.
    """
    least, most, _ = wish.bounds
    have, count = supply.capacity(wish.reference, wish.measure), supply.count()
    held_back: PlanReason | None = None
    if wish.order is None and wish.is_small(wish.replicas - have, have):
        held_back = "threshold"
    elif wish.order is None and wish.is_cooling:
        held_back = "cooldown"
    while True:
        if count >= least:
            if count >= wish.order if wish.order is not None else have + _CLOSE >= wish.replicas:
                return None
            if held_back is not None:
                return held_back
            if count >= most:
                return "limit"
        started = start()
        if isinstance(started, str):
            return started
        count, have = count + 1, have + wish.measure.speed(started, wish.reference)


def shrink(supply: Supply, wish: Wish) -> tuple[list[Held], PlanReason | None]:
    """Who is too many; and where more could go but for a rule, which rule.

    Beyond the most that the bounds allow, or by order, they go at once. Otherwise the wish must have stood for the
    whole cooldown, and nothing may be starting.
    """
    least, most, _ = wish.bounds
    have, count = supply.capacity(wish.reference, wish.measure), supply.count()
    leaving: list[Held] = []
    for held in supply.leavers(wish.measure):
        rest = have - wish.measure.speed(held.profile, wish.reference)
        if count <= most:
            if count <= least or (wish.order is not None and count <= wish.order):
                return leaving, None
            if wish.order is None:
                if rest + _CLOSE < wish.replicas:
                    return leaving, None
                if wish.is_small(have - wish.replicas, have):
                    return leaving, "threshold"
                if supply.is_starting() or rest + _CLOSE < wish.most_lately:
                    return leaving, "cooldown"
        leaving.append(held)
        count, have = count - 1, rest
    return leaving, None
