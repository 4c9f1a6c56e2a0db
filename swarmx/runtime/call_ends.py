"""How a call ends for whoever asked: with the answer or with the refusal, and what either is to a workflow's node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from swarmx.core.actions import RefusalReason, Refuse
from swarmx.core.failures import Cause, Failure
from swarmx.core.records import CallRecord, ModelResult
from swarmx.runtime.upstream import AttemptFailed

_STATUS: dict[RefusalReason, int] = {"no_replica": 503, "overload": 503, "deadline": 503, "budget": 429}
_CAUSES: dict[RefusalReason, Cause] = {
    "no_replica": "refused",
    "overload": "refused",
    "budget": "refused",
    "deadline": "deadline",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the client gets: the replica's own bytes. `record` is there where the caller keeps it."""

    body: bytes
    decoded: dict[str, Any]
    call_id: str
    replica_id: str
    attempts: int
    record: CallRecord | None = None

    @property
    def result(self) -> ModelResult:
        """The answer as a workflow's node takes it."""
        return ModelResult(
            call_id=self.call_id,
            replica_id=self.replica_id,
            attempts=self.attempts,
            answer=self.decoded,
            record=self.record,
        )


class CallRefused(Exception):
    """The call was given up. `status` and `body` are the replica's own where it refused the request itself.

    The same call might fit after `retry_after_s`, None where the router could not tell. `record` is what is kept of
    the call, where its caller keeps it. `begun`: some replica may have begun the work.
    """

    def __init__(
        self, refusal: Refuse, failure: AttemptFailed | None, record: CallRecord | None = None, *, begun: bool = False
    ) -> None:
        super().__init__(f"{refusal.reason}: {failure.detail if failure else refusal.detail}")
        self.call_id = refusal.call_id
        self.reason = refusal.reason
        self.attempts = refusal.attempts
        self.retry_after_s = refusal.retry_after_s
        self.status = _STATUS.get(refusal.reason) or (failure.status if failure else 502)
        self.body = failure.body if failure else b""
        self.failed = failure.reason if failure else None
        self.record = record
        self.begun = begun

    @property
    def result(self) -> ModelResult:
        """The refusal as a workflow's node takes it."""
        own = f" ({self.body[:500].decode(errors='replace')})" if self.body else ""
        error = f"call {self.call_id} was refused after {self.attempts} attempts: {self}{own}"
        failure = Failure(cause=self._cause(), error=error, retry_after_s=self.retry_after_s, begun=self.begun)
        return ModelResult(
            call_id=self.call_id, replica_id=None, attempts=self.attempts, failure=failure, record=self.record
        )

    def _cause(self) -> Cause:
        if self.reason in _CAUSES:
            return _CAUSES[self.reason]
        return self.failed if self.failed in ("rejected", "timeout") else "replica"
