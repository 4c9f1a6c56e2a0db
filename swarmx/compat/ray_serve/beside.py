"""What sits beside a replica: counts its calls, learns how fast it is, and says so."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from swarmx.compat.ray_serve.pace import Pace
from swarmx.compat.ray_serve.signals import ReplicaSignal
from swarmx.core.engine import EngineProfile


@dataclass(slots=True, kw_only=True)
class Served:
    """A call that the replica is working on."""

    begun_s: float
    area: float
    prompt_tokens: float


class Beside:
    """One replica's own view of itself. `clock` may be any clock that never runs backwards; times in seconds."""

    def __init__(self, deployment: str, replica_id: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.deployment = deployment
        self.replica_id = replica_id
        self.running = 0
        self._clock = clock
        self._area, self._since_s = 0.0, clock()
        self._pace = Pace(EngineProfile(model=deployment, device="ray", step_base_s=0.02))

    def begin(self, prompt_tokens: float) -> Served:
        """A call begins."""
        self._count(+1)
        return Served(begun_s=self._since_s, area=self._area, prompt_tokens=prompt_tokens)

    def end(self, served: Served, work: float | None) -> None:
        """The call is over; `work` is what it came to, None where nobody can tell, or it failed."""
        self._count(-1)
        took_s = self._since_s - served.begun_s
        if work is not None and took_s > 0.0:
            batch = max(1.0, (self._area - served.area) / took_s)
            self._pace.observe(took_s, work=work, prompt_tokens=served.prompt_tokens, batch=batch)

    def signal(self, at_s: float) -> ReplicaSignal:
        """Its state now; `at_s` are Unix seconds."""
        calls = self._pace.calls
        return ReplicaSignal(
            deployment=self.deployment,
            replica_id=self.replica_id,
            at_s=at_s,
            running=self.running,
            profile=self._pace.profile(1) if calls else None,
            calls=calls,
        )

    def _count(self, by: int) -> None:
        now_s = self._clock()
        self._area += self.running * (now_s - self._since_s)
        self.running, self._since_s = self.running + by, now_s
