"""Circuit breakers: a replica that fails too often in a row gets no calls for a while."""

from __future__ import annotations

from swarmx.agents.pool import Pool
from swarmx.core.actions import StartTimer, StopTimer
from swarmx.core.messages import AlertRaised
from swarmx.core.nouns import FailureReason
from swarmx.core.ports import Output

# Reasons that speak against the replica and not against the call.
REPLICA_FAULTS: frozenset[FailureReason] = frozenset(
    {"connect", "timeout", "bad_answer", "connection_lost", "replica_gone", "replica_error"}
)


class Breakers:
    """Opens a replica's breaker at `failures` in a row; it half opens after `open_s`, or closes with an answer."""

    def __init__(self, failures: int, open_s: float) -> None:
        self._limit = failures
        self._open_s = open_s
        self._failures: dict[str, int] = {}

    def failed(self, pool: Pool | None, replica_id: str, now_s: float) -> list[Output]:
        """One more failure in a row; nobody counts those of a replica that is gone."""
        if pool is None:
            return []
        count = self._failures[replica_id] = self._failures.get(replica_id, 0) + 1
        if count != self._limit:  # below: not yet; above: open already, these are stragglers
            return []
        pool.set_broken(replica_id, True)
        return [
            AlertRaised(kind="breaker_opened", subject=replica_id, value=float(count)),
            StartTimer(key=f"breaker:{replica_id}", at_s=now_s + self._open_s),
        ]

    def answered(self, pool: Pool | None, replica_id: str) -> list[Output]:
        """The row of failures is over; an answer from behind an open breaker closes it."""
        if self._failures.pop(replica_id, 0) < self._limit or pool is None:
            return []
        return [StopTimer(key=f"breaker:{replica_id}"), self._close(pool, replica_id)]

    def half_open(self, pool: Pool, replica_id: str) -> list[Output]:
        """Its time is over: let calls through again; the next failure opens it again."""
        self._failures[replica_id] = self._limit - 1
        return [self._close(pool, replica_id)]

    def forget(self, replica_id: str) -> list[Output]:
        """The replica is gone, and what was known about it."""
        open_still = self._failures.pop(replica_id, 0) >= self._limit
        return [StopTimer(key=f"breaker:{replica_id}")] if open_still else []

    @staticmethod
    def _close(pool: Pool, replica_id: str) -> AlertRaised:
        pool.set_broken(replica_id, False)
        return AlertRaised(kind="breaker_closed", subject=replica_id)
