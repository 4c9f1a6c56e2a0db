"""A replica of the simulated fleet: the engine model, on a clock that a slow machine stretches, and what it did."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from eval.sim.flow import LiveCall
from eval.sim.settings import SimSettings
from swarmx.core.batching import Counters, Engine, Event, Request
from swarmx.core.messages import SignalReported
from swarmx.core.nouns import Replica

Condition = Literal["up", "draining", "starting", "down"]


@dataclass(slots=True, kw_only=True)
class SimReplica:
    """One replica. `epoch` counts its lives, `told_gone` is whether routers know that it is down.

    Its engine's clock stood at `_local_s` when that of the world stood at `_since_s`, and runs `_rate` times as fast.
    `holds` are the requests in the engine, by name, with the calls that they are attempts of.
    """

    number: int
    replica: Replica
    settings: SimSettings
    speed: float = 1.0
    condition: Condition = "up"
    epoch: int = 0
    told_gone: bool = False
    holds: dict[str, LiveCall] = field(default_factory=dict)
    due_s: float | None = None
    due_event: int = 0
    busy_s: float = 0.0
    call_s: float = 0.0
    preemptions: int = 0
    hit_tokens: int = 0
    query_tokens: int = 0
    output_tokens: int = 0
    _engine: Engine = field(init=False)
    _rate: float = field(init=False)
    _since_s: float = 0.0
    _local_s: float = 0.0
    _due_local_s: float = 0.0
    _hits: int = 0
    _changed_s: float = 0.0

    def __post_init__(self) -> None:
        self._rate = self.speed
        self._engine = self._new_engine()

    def submit(self, request: Request, call: LiveCall, now_s: float) -> bool:
        """Hand the request in; false if it could never be held."""
        if not self._engine.submit(request, self._local(now_s)):
            return False
        self.account(now_s)
        self.holds[request.request_id] = call
        return True

    def abort(self, name: str, now_s: float) -> bool:
        """Forget the request; false if it is not here any more."""
        if name not in self.holds:
            return False
        self._engine.abort(name, self._local(now_s))
        self.account(now_s)
        del self.holds[name]
        return True

    def advance(self, now_s: float) -> list[Event]:
        """What happened until now: `at_s` of the events is on the engine's clock."""
        return self._engine.advance(self._local(now_s))

    def finished(self, name: str, now_s: float) -> LiveCall:
        """The request has left the engine; returns the call that it was an attempt of."""
        self.account(now_s)
        return self.holds.pop(name)

    def next_s(self) -> float | None:
        """When to advance it next, on the clock of the world; None while nothing is to come."""
        local_s = self._engine.next_event_s()
        if local_s is None:
            return None
        if self._rate == 1.0 and self._local_s == self._since_s:
            return local_s
        self._due_local_s = local_s
        return self._since_s + (local_s - self._local_s) / self._rate

    def due(self, now_s: float) -> list[Event]:
        """Advance to the event that `next_s` announced, whatever rounding made of its time."""
        return self._engine.advance(max(self._local(now_s), self._due_local_s))

    def produced(self, name: str) -> int:
        """Tokens of the request as of the last advance."""
        return self._engine.produced(name)

    def hits(self) -> int:
        """Prompt tokens found in the cache since this was asked last."""
        hits = self._engine.hit_tokens
        new, self._hits = hits - self._hits, hits
        return new

    def signal(self, now_s: float) -> SignalReported:
        """The counters as an engine tells them."""
        counters = self._engine.counters()
        return SignalReported(
            replica_id=self.replica.replica_id,
            running=counters.running,
            waiting=counters.waiting,
            kv_usage=counters.kv_usage,
            measured_at_s=now_s,
        )

    def slow_down(self, factor: float, now_s: float) -> None:
        """From now on everything takes `factor` times as long as in its profile."""
        self._local_s, self._since_s = self._local(now_s), now_s
        self._rate = self.speed / factor

    def stop(self, now_s: float) -> dict[str, LiveCall]:
        """It is down, its cache lost; returns what it held."""
        self.account(now_s)
        self._count(self._engine.counters())
        lost, self.holds = self.holds, {}
        self._engine = self._new_engine()
        self._rate, self._local_s, self._since_s, self._hits = self.speed, now_s, now_s, 0
        self._due_local_s = 0.0
        self.condition, self.due_s, self.told_gone = "down", None, False
        self.epoch += 1
        return lost

    def account(self, now_s: float) -> None:
        """Add the time since the last change to its busy time."""
        if self.holds:
            passed_s = now_s - self._changed_s
            self.busy_s += passed_s
            self.call_s += passed_s * len(self.holds)
        self._changed_s = now_s

    def close(self, now_s: float) -> None:
        """The simulation is over: count what is left."""
        self.account(now_s)
        self._count(self._engine.counters())

    def _count(self, counters: Counters) -> None:
        self.preemptions += counters.preemptions
        self.hit_tokens += counters.prefix_hit_tokens
        self.query_tokens += counters.prefix_query_tokens
        self.output_tokens += counters.generated_tokens

    def _local(self, now_s: float) -> float:
        if self._rate == 1.0 and self._local_s == self._since_s:
            return now_s
        return self._local_s + (now_s - self._since_s) * self._rate

    def _new_engine(self) -> Engine:
        return Engine(self.replica.profile, order=self.settings.order, gamma_per_token=self.settings.gamma_per_token)
