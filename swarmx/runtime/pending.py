"""A call between its acceptance and its end, and the record that it leaves."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from swarmx.core.actions import Dispatch, RefusalReason, Refuse
from swarmx.core.forecast import Forecast
from swarmx.core.nouns import Call, Decision, Replica
from swarmx.core.prompts import Encoding
from swarmx.core.records import CallRecord, CallState, ModelRequest
from swarmx.runtime.experience import Sent
from swarmx.runtime.upstream import AttemptFailed, Usage

_MOST_FLOAT16 = 65_504.0
_PASSING: frozenset[RefusalReason] = frozenset({"budget", "overload"})  # refusals that time alone mends
_LEAST_WAIT_S = 0.1
REQUEST_ID = "x-request-id"


@dataclass(slots=True, kw_only=True)
class PendingCall:
    """What the call service knows of a call, and how far it has come.

    `forecast` and `encoding` are the ones in force; the first ones are those that the call began with: they differ once
    a slower predictor has answered. The record keeps the first encoding, which is what the first head is trained on.
    `attempt` is the one that the router asked for last, with its `urgency`; `aborted` the last one that it gave up
    itself. It is `begun` once a replica may have begun the work. One that is `patient` waits for its tenant's budget.
    `names` are the headers that name it to the engine. The record of one that is `owned` stays here, as `kept`, for
    whoever waits for the answer.
    """

    call: Call
    first_encoding: Encoding
    first_forecast: Forecast
    encoding: Encoding
    forecast: Forecast
    body: bytes
    ready_at_s: float
    position: int
    patient: bool = False
    owned: bool = False
    names: dict[str, str] = field(default_factory=dict)
    kept: CallRecord | None = None
    decisions: dict[int, Decision] = field(default_factory=dict)
    verdicts: deque[Dispatch | Refuse] = field(default_factory=deque)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    scope: asyncio.Timeout | None = None
    attempt: int = 0
    urgency: float = 0.0
    aborted: int = 0
    begun: bool = False
    failure: AttemptFailed | None = None
    replica: Replica | None = None
    kv_usage: float | None = None
    dispatched_at_s: float | None = None
    first_token_at_s: float | None = None
    done: bool = False

    def refine(self, encoding: Encoding, forecast: Forecast) -> None:
        """A slower predictor has answered."""
        self.encoding, self.forecast = encoding, forecast

    @property
    def refined(self) -> bool:
        """Whether a slower predictor has answered."""
        return self.encoding is not self.first_encoding

    def headers(self) -> dict[str, str]:
        """What names this attempt to the engine, so that its log tells whose it was; no two have the same name."""
        name = self.names.get(REQUEST_ID, self.call.call_id)
        return self.names | {REQUEST_ID: name if self.attempt <= 1 else f"{name}.{self.attempt}"}

    def comes_back_after_s(self, refusal: Refuse, now_s: float) -> float | None:
        """How long a patient call waits before it is offered again; None where that does not help, or not in time."""
        if not self.patient or refusal.reason not in _PASSING or refusal.retry_after_s is None:
            return None
        wait_s, due_s = max(_LEAST_WAIT_S, refusal.retry_after_s), self.call.deadline_at_s
        return wait_s if due_s is None or now_s + wait_s < due_s else None

    def record(
        self, state: CallState, ended_at_s: float, *, usage: Usage | None, work_done: float, error: str | None
    ) -> CallRecord:
        """What is kept of the call."""
        call, sent = self.call, Sent.by(self.decisions.get(self.attempt))
        return CallRecord(
            call_id=call.call_id,
            tenant=call.tenant,
            workflow_id=call.workflow_id,
            workflow_kind=call.workflow_kind,
            node=call.node,
            role=call.role,
            kind=call.kind,
            model=call.model,
            state=state,
            attempts=self.attempt,
            replica_id=self.replica.replica_id if self.replica else None,
            device=self.replica.device if self.replica else None,
            prompt_key=call.prompt_key,
            prompt_bytes=call.prompt_bytes,
            prompt_tokens=(usage.prompt_tokens if usage else 0) or call.prompt_tokens,
            work_done=work_done,
            forecast_p50=self.forecast.quantile(0.5),
            forecast_p90=self.forecast.quantile(0.9),
            forecast_source=self.forecast.source,
            ready_at_s=self.ready_at_s,
            dispatched_at_s=self.dispatched_at_s,
            first_token_at_s=self.first_token_at_s,
            ended_at_s=ended_at_s,
            error=error,
            policy=sent.policy,
            ahead=sent.ahead,
            expected_s=sent.expected_s,
            kv_usage=self.kv_usage,
            position=self.position,
            encoder=self.first_encoding.encoder,
            encoding=_half(self.first_encoding),
            cached_tokens=usage.cached_tokens if usage else 0,
            forecast_version=self.forecast.version,
            work_limit=call.work_limit,
        )


def names_of(request: ModelRequest) -> dict[str, str]:
    """The headers by which a workflow's call is known to the engine, and to whoever must not do its work twice."""
    given = {REQUEST_ID: request.request_id, "idempotency-key": request.idempotency_key}
    return {name: value for name, value in given.items() if value}


def _half(encoding: Encoding) -> bytes:
    """[dimension] little-endian float16; what it cannot hold is put at its ends."""
    held = np.clip(encoding.vector, -_MOST_FLOAT16, _MOST_FLOAT16)
    return held.astype("<f2").tobytes()
