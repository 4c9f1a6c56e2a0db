"""The predictors beside the replicas: their service curves, where the weights of the latency heads are there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

from swarmx.config import PredictorSection
from swarmx.core.forecast import LEVELS
from swarmx.core.messages import Message, ServiceCurvePublished, SignalReported
from swarmx.core.nouns import Replica
from swarmx.neural.tracking import QuantileTracker
from swarmx.runtime.clock import Clock
from swarmx.runtime.curves import CurvePublisher
from swarmx.runtime.latency_heads import latency_heads
from swarmx.runtime.latency_tracking import LatencyTracking
from swarmx.wiring.predictors import weights_folder
from swarmx.wiring.tasks import running_task


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """Who publishes curves, and who follows how they did."""

    publisher: CurvePublisher
    tracking: LatencyTracking | None

    def observe(self, message: Message, now_s: float) -> None:
        """Register as an observer of the switchboard."""
        self.publisher.observe(message, now_s)
        if self.tracking is not None:
            self.tracking.observe(message, now_s)


async def curves(
    wanted: PredictorSection,
    stack: AsyncExitStack,
    *,
    clock: Clock,
    post: Callable[[Message], None],
    is_beside: Callable[[str], bool] = lambda replica_id: False,
) -> Curves | None:
    """Publishing until `stack` closes, corrected by calls that end (`adapt`); None where nobody can compute curves.

    Replicas that have a predictor of their own beside them (`is_beside`) get none from here.
    """
    heads = latency_heads(weights_folder(wanted)) if wanted.engine == "neural" else None
    if heads is None:
        return None
    if wanted.adapt:
        heads.tracking = LatencyTracking(QuantileTracker(LEVELS), post=post)

    def compute(replica: Replica, signal: SignalReported | None, now_s: float) -> ServiceCurvePublished | None:
        return None if is_beside(replica.replica_id) else heads.curve(replica, signal, now_s)

    publisher = CurvePublisher(compute, post=post, clock=clock, every_s=wanted.curves_every_s)
    await stack.enter_async_context(running_task(publisher.run(), name="service curves"))
    return Curves(publisher=publisher, tracking=heads.tracking)
