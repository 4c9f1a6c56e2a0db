"""Everything that agents hear: one closed union of events, and the envelope that carries them."""

from __future__ import annotations

from typing import Literal

import msgspec

from swarmx.core.forecast import Forecast
from swarmx.core.nouns import Call, Decision, FailureReason, Replica, ReplicaState


class _Event(msgspec.Struct, frozen=True, kw_only=True, tag=True, gc=False):
    pass


class CallReady(_Event, frozen=True, kw_only=True):
    """A call wants a replica. The forecast of its work comes along: a replay never runs a predictor."""

    call: Call
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
    """A replica appeared, changed its state or is gone."""

    replica: Replica
    state: ReplicaState


class SignalReported(_Event, frozen=True, kw_only=True):
    """The engine's own counters, read at `measured_at_s`."""

    replica_id: str
    running: int
    waiting: int
    kv_usage: float
    measured_at_s: float


class PolicyChanged(_Event, frozen=True, kw_only=True):
    """From now on route by this policy."""

    policy: str
    parameters: dict[str, float]


class TimerFired(_Event, frozen=True, kw_only=True):
    """A timer that an agent started has run out."""

    key: str


class DecisionMade(_Event, frozen=True, kw_only=True):
    """A router decided; goes to the decision log."""

    decision: Decision


class AlertRaised(_Event, frozen=True, kw_only=True):
    """Something an operator should know, as an enum and numbers; `subject` is an opaque id."""

    kind: Literal["breaker_opened", "breaker_closed", "policy_failed"]
    subject: str
    value: float = 0.0


Message = (
    CallReady
    | FirstToken
    | TokensProgressed
    | CallFinished
    | CallFailed
    | CallCancelled
    | ReplicaChanged
    | SignalReported
    | PolicyChanged
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
