"""What an operator sees of the replicas: state, load, how busy they have been."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from swarmx.core.control import ReplicaStatus
from swarmx.core.errors import NotFound
from swarmx.core.messages import Message, ReplicaChanged, ServiceCurvePublished, SignalReported
from swarmx.core.nouns import CallKind, Replica, ReplicaState
from swarmx.runtime.clock import Clock
from swarmx.runtime.curves import curve_status

_REMEMBERED_S = 600.0


@dataclass(slots=True)
class _Entry:
    replica: Replica
    state: ReplicaState
    since_s: float
    elastic: bool
    gone_at_s: float | None = None
    in_flight: int = 0
    calls: int = 0
    busy_s: float = 0.0
    busy_since_s: float = 0.0
    signal: SignalReported | None = None
    curve: ServiceCurvePublished | None = None


class FleetBook:
    """Keeps the books; observes the switchboard and is told of every attempt.

    `elastic` tells whether SwarmX started a replica itself. Such replicas come and go under ever new names: the book
    forgets one ten minutes after it is gone. `models` can be had on demand, and may have no replica yet.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        elastic: Callable[[str], bool] = lambda replica_id: False,
        models: Mapping[str, CallKind] | None = None,
    ) -> None:
        self._clock = clock
        self._elastic = elastic
        self._entries: dict[str, _Entry] = {}
        self._models: dict[str, CallKind] = dict(models or {})

    def observe(self, message: Message, now_s: float) -> None:
        """Follow states, signals and service curves."""
        if isinstance(message, ReplicaChanged):
            self._changed(message, now_s)
        elif isinstance(message, SignalReported) and message.replica_id in self._entries:
            self._entries[message.replica_id].signal = message
        elif isinstance(message, ServiceCurvePublished) and message.replica_id in self._entries:
            self._entries[message.replica_id].curve = message

    def _changed(self, message: ReplicaChanged, now_s: float) -> None:
        replica, state = message.replica, message.state
        self._models[replica.model] = replica.kind
        entry = self._entries.get(replica.replica_id)
        if entry is None:
            elastic = self._elastic(replica.replica_id)
            entry = self._entries[replica.replica_id] = _Entry(replica, state, now_s, elastic)
        entry.replica, entry.state = replica, state
        entry.gone_at_s = now_s if state == "gone" else None
        if state == "gone":
            entry.curve = None
        self._forget(now_s)

    def _forget(self, now_s: float) -> None:
        for replica_id, entry in list(self._entries.items()):
            gone_s = 0.0 if entry.gone_at_s is None else now_s - entry.gone_at_s
            if entry.elastic and entry.in_flight == 0 and gone_s > _REMEMBERED_S:
                del self._entries[replica_id]

    def attempt_started(self, replica_id: str) -> None:
        entry = self._entries[replica_id]
        if entry.in_flight == 0:
            entry.busy_since_s = self._clock.now_s()
        entry.in_flight += 1
        entry.calls += 1

    def attempt_ended(self, replica_id: str) -> None:
        entry = self._entries[replica_id]
        entry.in_flight -= 1
        if entry.in_flight == 0:
            entry.busy_s += self._clock.now_s() - entry.busy_since_s

    def models(self) -> Mapping[str, CallKind]:
        """Every model that some replica serves, with its kind; replicas that are gone count as well."""
        return self._models

    def ready(self) -> int:
        """How many replicas take calls."""
        return sum(entry.state == "ready" for entry in self._entries.values())

    def statuses(self) -> list[ReplicaStatus]:
        """All replicas, by model and id."""
        now_s = self._clock.now_s()
        self._forget(now_s)
        rows = [self._status(entry, now_s) for entry in self._entries.values()]
        return sorted(rows, key=lambda row: (row.model, row.replica_id))

    def service_curve(self, replica_id: str) -> ServiceCurvePublished:
        """The last one of a replica. Raises NotFound."""
        entry = self._entries.get(replica_id)
        if entry is None or entry.curve is None:
            what = "replica" if entry is None else "service curve of the replica"
            raise NotFound(f"there is no {what} {replica_id!r}; GET /api/v1/replicas lists both.")
        return entry.curve

    def _status(self, entry: _Entry, now_s: float) -> ReplicaStatus:
        busy_s = entry.busy_s + (now_s - entry.busy_since_s if entry.in_flight else 0.0)
        signal = entry.signal
        return ReplicaStatus(
            replica_id=entry.replica.replica_id,
            model=entry.replica.model,
            kind=entry.replica.kind,
            device=entry.replica.device,
            url=entry.replica.url,
            provider=entry.replica.provider,
            emulated=entry.replica.emulated,
            state=entry.state,
            in_flight=entry.in_flight,
            calls=entry.calls,
            utilisation=min(1.0, busy_s / max(1e-9, now_s - entry.since_s)),
            running=signal.running if signal else None,
            waiting=signal.waiting if signal else None,
            kv_usage=signal.kv_usage if signal else None,
            signal_age_s=now_s - signal.measured_at_s if signal else None,
            elastic=entry.elastic,
            service_curve=curve_status(entry.curve, entry.replica.kind, now_s) if entry.curve else None,
        )
