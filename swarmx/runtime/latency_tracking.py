"""How long calls took against the service curve of their replica: corrects the curves to come, device by device."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from swarmx.core.forecast import LEVELS
from swarmx.core.messages import (
    CallCancelled,
    CallFailed,
    CallFinished,
    DecisionMade,
    ForecastScored,
    Message,
    ReplicaChanged,
    ServiceCurvePublished,
)
from swarmx.core.nouns import Replica
from swarmx.neural.curves import moved, read_curve
from swarmx.neural.head import Floats
from swarmx.neural.heads.latency import COMPLETION
from swarmx.neural.tracking import QuantileTracker

_HIGH = LEVELS.index(0.9)
_SHORTEST_S = 1e-4


@dataclass(frozen=True, slots=True)
class _Sent:
    """A call at a replica, when it was sent and what the uncorrected curve was then."""

    replica: Replica
    attempt: int
    at_s: float
    curve: ServiceCurvePublished


class LatencyTracking:
    """Observes the switchboard: what a call took, given its true length, against the curve of when it was sent.

    `tracker` learns for each (model, device); `corrected` hands out curves with what it has learnt. A device that has
    become slower is noticed by all its replicas at once. Every outcome is posted as ForecastScored of the head
    "completion", with the model as its class. At most `most_per_s` outcomes a second are looked at, and `limit`
    calls are remembered at a time: reading a curve takes a tenth of a millisecond of the loop.
    """

    def __init__(
        self,
        tracker: QuantileTracker,
        *,
        post: Callable[[Message], None],
        most_per_s: float = 20.0,
        limit: int = 4096,
    ) -> None:
        self._tracker = tracker
        self._post = post
        self._gap_s = 1.0 / most_per_s
        self._limit = limit
        self._latest: dict[str, tuple[Replica, ServiceCurvePublished]] = {}
        self._sent: OrderedDict[str, _Sent] = OrderedDict()
        self._next_s = -math.inf

    def corrected(self, replica: Replica, curve: ServiceCurvePublished) -> ServiceCurvePublished:
        """The curve as it should have been, if calls go on as of late."""
        self._latest[replica.replica_id] = replica, curve
        return moved(curve, lambda log_s: self._tracker.correct(replica.model, replica.device, log_s))

    def observe(self, message: Message, now_s: float) -> None:
        """Follow calls from their dispatch to their end."""
        match message:
            case DecisionMade():
                decision = message.decision
                if (known := self._latest.get(decision.replica_id)) is not None:
                    self._sent[decision.call.call_id] = _Sent(known[0], decision.attempt, now_s, known[1])
                    if len(self._sent) > self._limit:
                        self._sent.popitem(last=False)
            case CallFinished():
                sent = self._sent.pop(message.call_id, None)
                if (
                    sent is not None
                    and sent.attempt == message.attempt
                    and now_s >= self._next_s
                    and message.work_done > 0.0
                ):
                    self._next_s = now_s + self._gap_s
                    uncached = max(0, message.prompt_tokens - message.cached_tokens)
                    self._learn(sent, message.work_done, uncached, now_s - sent.at_s)
            case CallFailed() | CallCancelled():
                self._sent.pop(message.call_id, None)
            case ReplicaChanged() if message.state == "gone":
                self._latest.pop(message.replica.replica_id, None)
            case _:
                pass

    def _learn(self, sent: _Sent, work: float, uncached: float, seconds: float) -> None:
        model, device = sent.replica.model, sent.replica.device
        said: Floats = np.log(np.maximum(read_curve(sent.curve, work, uncached)[0], _SHORTEST_S))
        took = math.log(max(seconds, _SHORTEST_S))
        served = self._tracker.correct(model, device, said)
        self._tracker.observe(model, device, said, took)
        over = took - float(served[_HIGH])
        self._post(
            ForecastScored(
                head=COMPLETION.name,
                version=sent.curve.version,
                prompt_class=model,
                device=device,
                loss=max(0.9 * over, -0.1 * over),
                covered=over <= 0.0,
            )
        )
