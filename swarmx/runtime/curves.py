"""Service curves: what a call would take on each replica now, computed anew when its load has changed."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from swarmx.core.control import CurveStatus
from swarmx.core.messages import Message, PredictorReady, ReplicaChanged, ServiceCurvePublished, SignalReported
from swarmx.core.nouns import CallKind, Replica
from swarmx.runtime.clock import Clock

log = logging.getLogger(__name__)

Compute = Callable[[Replica, SignalReported | None, float], ServiceCurvePublished | None]

_SAME_KV_USAGE = 0.01
_REST = 20.0  # times as long as a curve took until the next: they share the loop with the calls
_COMPLAINS_EVERY_S = 60.0
# work, uncached
_TYPICAL: dict[CallKind, tuple[float, float]] = {"llm": (256.0, 1024.0), "image": (30.0, 0.0), "tool": (1.0, 0.0)}


@dataclass(slots=True)
class _Known:
    """A replica, its last signal, and what the last curve was computed from."""

    replica: Replica
    signal: SignalReported | None = None
    used: SignalReported | None = None
    has_changed: bool = True
    published_at_s: float = -math.inf


class CurvePublisher:
    """Observes the switchboard, and posts ServiceCurvePublished: for a replica every `every_s` at most, and only when
    its state, its load or a predictor has changed.

    `compute` gets the replica, its last signal (None before the first) and the time; it answers None for a replica
    that has no curve. One that raises costs that curve; the replica is tried again when it changes.
    """

    def __init__(self, compute: Compute, *, post: Callable[[Message], None], clock: Clock, every_s: float) -> None:
        self._compute = compute
        self._post = post
        self._clock = clock
        self._every_s = every_s
        self._known: dict[str, _Known] = {}
        self._complained_s = -math.inf

    def observe(self, message: Message, now_s: float) -> None:
        """Note what changes; nothing is computed here."""
        if isinstance(message, SignalReported):
            known = self._known.get(message.replica_id)
            if known is not None:
                known.signal = message
                known.has_changed = known.has_changed or _differs(message, known.used)
        elif isinstance(message, ReplicaChanged):
            self._changed(message)
        elif isinstance(message, PredictorReady):
            for known in self._known.values():
                known.has_changed = True

    def due(self) -> list[str]:
        """The replicas whose curve may and should be computed now; who has waited for longest comes first."""
        latest_s = self._clock.now_s() - self._every_s
        found = [name for name, known in self._known.items() if known.has_changed and known.published_at_s <= latest_s]
        return sorted(found, key=lambda name: self._known[name].published_at_s)

    def publish(self, replica_id: str) -> None:
        """Compute and post the curve of one replica."""
        known = self._known.get(replica_id)
        if known is None:
            return
        now_s = self._clock.now_s()
        known.published_at_s, known.used, known.has_changed = now_s, known.signal, False
        try:
            curve = self._compute(known.replica, known.signal, now_s)
        except Exception as error:  # noqa: BLE001  # a learned model behind it; routing goes on without curves
            self._complain(replica_id, error)
            return
        if curve is not None:
            self._post(curve)

    async def run(self) -> None:
        """Publish what is due until cancelled, one at a time; in a large fleet curves become less frequent."""
        while True:
            for replica_id in self.due():
                begun_s = self._clock.now_s()
                self.publish(replica_id)
                await asyncio.sleep(_REST * (self._clock.now_s() - begun_s))
            await asyncio.sleep(self._every_s / 4.0)

    def _changed(self, message: ReplicaChanged) -> None:
        replica = message.replica
        if message.state in ("gone", "starting"):
            self._known.pop(replica.replica_id, None)
            return
        known = self._known.get(replica.replica_id)
        if known is None:
            self._known[replica.replica_id] = _Known(replica)
        else:
            known.replica, known.has_changed = replica, True

    def _complain(self, replica_id: str, error: Exception) -> None:
        now_s = self._clock.now_s()
        if now_s - self._complained_s >= _COMPLAINS_EVERY_S:
            self._complained_s = now_s
            log.error("the service curve of %s could not be computed", replica_id, exc_info=error)


def curve_status(curve: ServiceCurvePublished, kind: CallKind, now_s: float) -> CurveStatus:
    """The curve at the point nearest to a typical call of the kind."""
    work, uncached = _TYPICAL[kind]
    w, u = _nearest(curve.work, work), _nearest(curve.uncached, uncached)
    row = (w * len(curve.uncached) + u) * len(curve.levels)
    return CurveStatus(
        age_s=now_s - curve.measured_at_s,
        version=curve.version,
        work=curve.work[w],
        uncached=curve.uncached[u],
        p50_s=curve.completion_s[row + _nearest(curve.levels, 0.5)],
        p90_s=curve.completion_s[row + _nearest(curve.levels, 0.9)],
    )


def _nearest(points: Sequence[float], wanted: float) -> int:
    return min(range(len(points)), key=lambda i: abs(points[i] - wanted))


def _differs(signal: SignalReported, used: SignalReported | None) -> bool:
    return (
        used is None
        or (signal.running, signal.waiting) != (used.running, used.waiting)
        or abs(signal.kv_usage - used.kv_usage) >= _SAME_KV_USAGE
    )
