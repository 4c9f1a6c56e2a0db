"""Everything that agents may do: one closed union; an agent declares which of these it can emit."""

from __future__ import annotations

from typing import Literal

import msgspec


class _Action(msgspec.Struct, frozen=True, kw_only=True, tag=True, gc=False):
    pass


class Dispatch(_Action, frozen=True, kw_only=True):
    """Send the call to the replica.

    `urgency` orders the calls inside an engine that looks at priorities: the lower one goes first, as in vLLM.
    """

    call_id: str
    attempt: int
    replica_id: str
    urgency: float = 0.0


class Cancel(_Action, frozen=True, kw_only=True):
    """Stop the attempt: close its connection, so that the engine frees its slot."""

    call_id: str
    attempt: int
    replica_id: str


RefusalReason = Literal["no_replica", "retries_exhausted", "failed", "budget", "overload", "deadline"]


class Refuse(_Action, frozen=True, kw_only=True):
    """Give the call up and tell its client.

    `budget`, `overload` and `deadline` are said before anything was tried. The same call would fit after
    `retry_after_s`, as things are; None where nobody can say, or it never would.
    """

    call_id: str
    reason: RefusalReason
    attempts: int
    detail: str
    retry_after_s: float | None = None


class StartTimer(_Action, frozen=True, kw_only=True):
    """Send me TimerFired(key) at `at_s`; a second timer with the same key replaces the first."""

    key: str
    at_s: float


class StopTimer(_Action, frozen=True, kw_only=True):
    """Forget the timer."""

    key: str


class Deploy(_Action, frozen=True, kw_only=True):
    """Start a replica of this name in the group; ReplicaChanged tells how it goes."""

    replica_id: str
    group_id: str


class Drain(_Action, frozen=True, kw_only=True):
    """Send the replica no more calls, let it finish those it has until `deadline_at_s`, then stop it."""

    replica_id: str
    deadline_at_s: float


class Cordon(_Action, frozen=True, kw_only=True):
    """Take the replica out of rotation, or (`cordoned` false) put it back; it keeps what it has."""

    replica_id: str
    cordoned: bool


class Retrain(_Action, frozen=True, kw_only=True):
    """Train the head again on what memory holds of these (prompt class, device) pairs; RetrainEnded tells the end."""

    retrain_id: str
    head: str
    keys: tuple[tuple[str, str], ...]


class UsePredictor(_Action, frozen=True, kw_only=True):
    """Put these weights of the head in force, new ones or, to roll back, old ones; PredictorReady says when."""

    head: str
    version: str


Action = Dispatch | Cancel | Refuse | StartTimer | StopTimer | Deploy | Drain | Cordon | Retrain | UsePredictor
