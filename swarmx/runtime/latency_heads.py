"""The latency heads in force, which say what a call would take on a replica: in the gateway, or beside a replica."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

from swarmx.core.errors import PredictorError
from swarmx.core.messages import ServiceCurvePublished, SignalReported
from swarmx.core.nouns import Replica
from swarmx.neural.checkpoint import load_head
from swarmx.neural.curves import service_curve
from swarmx.neural.facts import device_facts, model_facts
from swarmx.neural.head import Head
from swarmx.neural.heads.latency import COMPLETION, TTFT, Candidate, RuntimeState
from swarmx.runtime.latency_tracking import LatencyTracking

log = logging.getLogger(__name__)


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
