"""The predictors beside the replicas: their service curves, where the weights of the latency heads are there."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from swarmx.config import PredictorSection
from swarmx.core.errors import PredictorError
from swarmx.core.forecast import LEVELS
from swarmx.core.messages import Message, ServiceCurvePublished, SignalReported
from swarmx.core.nouns import Replica
from swarmx.neural.checkpoint import load_head
from swarmx.neural.curves import service_curve
from swarmx.neural.facts import device_facts, model_facts
from swarmx.neural.head import Head
from swarmx.neural.heads.latency import COMPLETION, TTFT, Candidate, RuntimeState
from swarmx.neural.tracking import QuantileTracker
from swarmx.runtime.clock import Clock
from swarmx.runtime.curves import CurvePublisher
from swarmx.runtime.latency_tracking import LatencyTracking
from swarmx.wiring.predictors import weights_folder
from swarmx.wiring.tasks import running_task

log = logging.getLogger(__name__)


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


@dataclass(slots=True, kw_only=True)
class LatencyHeads:
    """The latency heads in force, and what corrects them by calls that end."""

    ttft: Head
    completion: Head
    tracking: LatencyTracking | None = None

    def curve(self, replica: Replica, signal: SignalReported | None, now_s: float) -> ServiceCurvePublished | None:
        """What a call would take there now; None for an image model, whose calls are not priced by tokens."""
        if replica.kind != "llm":
            return None
        candidate = Candidate(
            profile=replica.profile, device=device_facts(replica.device), model=model_facts(replica.model)
        )
        curve = service_curve(
            self.ttft,
            self.completion,
            candidate,
            _state(signal, now_s),
            replica_id=replica.replica_id,
            measured_at_s=now_s,
        )
        return curve if self.tracking is None else self.tracking.corrected(replica, curve)


def latency_heads(folder: Path) -> LatencyHeads | None:
    """Those in a folder of weights; None, and a line in the log, where they are missing or damaged."""
    try:
        return LatencyHeads(ttft=load_head(folder, TTFT)[0], completion=load_head(folder, COMPLETION)[0])
    except PredictorError as error:
        log.warning("there are no service curves: %s", error)
        return None


async def curves(
    wanted: PredictorSection, stack: AsyncExitStack, *, clock: Clock, post: Callable[[Message], None]
) -> Curves | None:
    """Publishing until `stack` closes, corrected by calls that end (`adapt`); None where nobody can compute curves."""
    heads = latency_heads(weights_folder(wanted)) if wanted.engine == "neural" else None
    if heads is None:
        return None
    if wanted.adapt:
        heads.tracking = LatencyTracking(QuantileTracker(LEVELS), post=post)
    publisher = CurvePublisher(heads.curve, post=post, clock=clock, every_s=wanted.curves_every_s)
    await stack.enter_async_context(running_task(publisher.run(), name="service curves"))
    return Curves(publisher=publisher, tracking=heads.tracking)


def _state(signal: SignalReported | None, now_s: float) -> RuntimeState:
    """One column. What only a router knows of its own calls is unknown here; so is all before the first signal."""
    unknown = math.nan
    return RuntimeState(
        in_flight=unknown,
        remaining_work=unknown,
        context_tokens=unknown,
        prefill_tokens=unknown,
        running=unknown if signal is None else signal.running,
        waiting=unknown if signal is None else signal.waiting,
        kv_usage=unknown if signal is None else signal.kv_usage,
        signal_age_s=unknown if signal is None else max(0.0, now_s - signal.measured_at_s),
    )
