"""Everything that agents hear: one closed union of events, and the envelope that carries them."""

from __future__ import annotations

from typing import Literal

import msgspec

from swarmx.core.forecast import Forecast
from swarmx.core.nouns import Call, Decision, FailureReason, Replica, ReplicaState
from swarmx.core.scaling import ScalePlan

AlertKind = Literal[
    "breaker_opened",
    "breaker_closed",
    "policy_failed",
    "at_max",
    "replica_failed",
    "predictor_fallback",
    "forecast_drift",
]
RetrainOutcome = Literal["better", "worse", "failed"]


class _Event(msgspec.Struct, frozen=True, kw_only=True, tag=True, gc=False):
    pass


class CallReady(_Event, frozen=True, kw_only=True):
    """A call wants a replica. The forecast of its work comes along: a replay never runs a predictor.

    `path` is what the predictor of workflows says of the seconds from now to the end of the workflow's last call.
    """

    call: Call
    forecast: Forecast
    path: Forecast | None = None


class ForecastRefined(_Event, frozen=True, kw_only=True):
    """A slower predictor's word on a call that is waiting or running; it replaces the first forecast."""

    call_id: str
    forecast: Forecast


class FirstToken(_Event, frozen=True, kw_only=True):
    """The replica began to answer: from here on the call cannot be retried elsewhere."""

    call_id: str
    attempt: int


class TokensProgressed(_Event, frozen=True, kw_only=True):
    """The attempt has produced `work_done` so far (output tokens, or megapixel-steps)."""

    call_id: str
    attempt: int
    work_done: float


class CallFinished(_Event, frozen=True, kw_only=True):
    """The attempt answered in full."""

    call_id: str
    attempt: int
    prompt_tokens: int
    cached_tokens: int
    work_done: float


class CallFailed(_Event, frozen=True, kw_only=True):
    """The attempt will not answer. `retryable` is false once something was streamed or the request itself is wrong."""

    call_id: str
    attempt: int
    reason: FailureReason
    retryable: bool


class CallCancelled(_Event, frozen=True, kw_only=True):
    """The client or its workflow no longer wants the call."""

    call_id: str


class ReplicaChanged(_Event, frozen=True, kw_only=True):
    """A replica appeared, changed its state or is gone.

    `group_id` is told of one that an earlier life started on demand, when it is taken over.
    """

    replica: Replica
    state: ReplicaState
    group_id: str | None = None


class DrainNoticed(_Event, frozen=True, kw_only=True):
    """The machine of the replica is to go at `deadline_at_s`, None where nobody says when: a spot notice, say."""

    replica_id: str
    deadline_at_s: float | None


class SignalReported(_Event, frozen=True, kw_only=True):
    """The engine's own counters, read at `measured_at_s`."""

    replica_id: str
    running: int
    waiting: int
    kv_usage: float
    measured_at_s: float


class ServiceCurvePublished(_Event, frozen=True, kw_only=True):
    """What a call would take on this replica now, said by the predictor beside it.

    `completion_s` and `ttft_s` are quantiles, flattened: [work, uncached, levels] and [uncached, levels]; `work` are
    output tokens (or megapixel-steps), `uncached` prompt tokens that no cache holds. Between the points, interpolate.
    """

    replica_id: str
    work: tuple[float, ...]
    uncached: tuple[float, ...]
    levels: tuple[float, ...]
    completion_s: tuple[float, ...]
    ttft_s: tuple[float, ...]
    measured_at_s: float
    version: str


class ForecastScored(_Event, frozen=True, kw_only=True):
    """How the forecast of one call did: the news that adaptation lives on.

    `head` names the predictor, `version` its weights; the outcome belongs to `prompt_class` and `device` ("" for
    heads that know no device). `loss` is the tail pinball loss at level 0.9 of the logarithm (a relative error),
    `covered` whether the outcome was at or below the 90 % quantile.
    """

    head: str
    version: str
    prompt_class: str
    device: str
    loss: float
    covered: bool


class RetrainEnded(_Event, frozen=True, kw_only=True):
    """A retraining that was asked for has come to its end; losses are those of held-back records, before and after.

    Only "better" has a `version` that can be put in force.
    """

    retrain_id: str
    head: str
    outcome: RetrainOutcome
    version: str
    loss_before: float
    loss_after: float


class PredictorReady(_Event, frozen=True, kw_only=True):
    """These weights of the head are in force from now on; `previous` were until now."""

    head: str
    version: str
    previous: str


class PolicyChanged(_Event, frozen=True, kw_only=True):
    """From now on route by this policy."""

    policy: str
    parameters: dict[str, float]


class WorkflowSubmitted(_Event, frozen=True, kw_only=True):
    """A workflow was accepted. `kind` groups workflows that look alike; it is the client's word and never shown.

    It should end within `target_s`; None where nobody said so. `submitted_at_s`, on the clock that agents are told, is
    when it was accepted: given where it goes on after a restart, None for now.
    """

    workflow_id: str
    kind: str
    target_s: float | None = None
    submitted_at_s: float | None = None


class WorkflowEnded(_Event, frozen=True, kw_only=True):
    """A workflow reached its one terminal state, or is `left`: this server runs it no more, another one may."""

    workflow_id: str
    state: Literal["finished", "failed", "cancelled", "left"]


class DemandReported(_Event, frozen=True, kw_only=True):
    """What one router saw of the demand for one model in the last `window_s`, and what it expects next.

    `arrived` calls brought `arrived_work` of expected work (output tokens, or megapixel-steps), `finished` ended.
    Now `in_flight` are at replicas and `waiting` in the router, with `work_left` between them; a call brings
    `work_per_call` on average. The workflows that are running will make between them, within `horizons_s[i]`,
    `upcoming_mean[i]` more calls (`upcoming_p90[i]` at P90), and workflows that are not submitted yet, at the rate
    of late, `fresh_mean[i]`; all three have shape [horizons].
    """

    model: str
    window_s: float
    arrived: int
    arrived_work: float
    finished: int
    in_flight: int
    waiting: int
    work_left: float
    work_per_call: float
    horizons_s: tuple[float, ...]
    upcoming_mean: tuple[float, ...]
    upcoming_p90: tuple[float, ...]
    fresh_mean: tuple[float, ...]


class BoundsChanged(_Event, frozen=True, kw_only=True):
    """The scaler keeps the model's replicas between these from now on."""

    model: str
    min_replicas: int
    max_replicas: int


class ScaleRequested(_Event, frozen=True, kw_only=True):
    """An operator or the coordinator wants the model to have this many replicas, whatever the policy says."""

    model: str
    replicas: int
    hold_s: float


class ScalingPolicyChanged(_Event, frozen=True, kw_only=True):
    """From now on scale by this policy."""

    policy: str
    parameters: dict[str, float]


class ScalePlanned(_Event, frozen=True, kw_only=True):
    """The scaler decided; goes to the operators, and to the audit log with what it led to."""

    plan: ScalePlan


class TimerFired(_Event, frozen=True, kw_only=True):
    """A timer that an agent started has run out."""

    key: str


class DecisionMade(_Event, frozen=True, kw_only=True):
    """A router decided; goes to the decision log."""

    decision: Decision


class AlertRaised(_Event, frozen=True, kw_only=True):
    """Something an operator should know, as an enum and numbers; `subject` names what it is about.

    `at_max`: a model wants `value` replicas, more than its bounds allow. `replica_failed`: one did not become ready.
    `predictor_fallback`: plain statistics stand in for `value` seconds. `forecast_drift`: `value` is the tail loss.
    """

    kind: AlertKind
    subject: str
    value: float = 0.0


Message = (
    CallReady
    | ForecastRefined
    | FirstToken
    | TokensProgressed
    | CallFinished
    | CallFailed
    | CallCancelled
    | ReplicaChanged
    | DrainNoticed
    | SignalReported
    | ServiceCurvePublished
    | ForecastScored
    | RetrainEnded
    | PredictorReady
    | PolicyChanged
    | WorkflowSubmitted
    | WorkflowEnded
    | DemandReported
    | BoundsChanged
    | ScaleRequested
    | ScalingPolicyChanged
    | ScalePlanned
    | TimerFired
    | DecisionMade
    | AlertRaised
)

WIRE_VERSION = 1


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """A message on its way: who sent it, in which of the sender's lives, as the how-manieth, because of which message.

    `cause` is "sender/epoch/seq" of the message that led to this one, or empty for input from outside. Unknown
    fields of a newer version are ignored; fields that an older version did not have take their defaults.
    """

    sender: str
    epoch: int
    seq: int
    message: Message
    cause: str = ""
    version: int = WIRE_VERSION

    @property
    def ref(self) -> str:
        """How later messages name this one as their cause."""
        return f"{self.sender}/{self.epoch}/{self.seq}"
