"""session_affinity: the replica that served the session last, unless it is much busier than the others."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from swarmx.agents.policies.ties import least
from swarmx.core.fleet import CallView, Choice, FleetView, Order


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionAffinity:
    """The home of the call's session, unless it has more than `slack` calls above the mean; else the fewest in flight.

    The session routers of the vLLM production stack (`SessionRouter` of vllm-project/production-stack, a hash ring)
    and of vllm-router 0.1.17 (`sticky_least_loaded`, a pin to the replica that was least loaded at first) look at the
    session key and at calls in flight. Like the latter, a session begins where the fewest calls are in flight and then
    stays. Two things differ here: a home that is `slack` calls above the mean is left, so a hot session cannot flood
    one replica (a very large slack is the originals' pin), and a call without session is spread by load, where the
    originals hash all of them to one replica. A session that was sent elsewhere has its home there from then on.
    """

    name: ClassVar[str] = "session_affinity"
    order: ClassVar[Order] = "arrival"
    waits: ClassVar[bool] = False

    slack: float = 8.0

    def choose(self, call: CallView, fleet: FleetView, rng: np.random.Generator) -> Choice:
        home = call.home
        if home is not None and fleet.in_flight[home] <= fleet.in_flight.mean() + self.slack:
            return Choice(index=home)
        return Choice(index=least(fleet.in_flight, rng))
