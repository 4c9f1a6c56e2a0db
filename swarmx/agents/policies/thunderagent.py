"""thunderagent: a program stays at its replica while the KV cache there bears it, and waits when none does."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from swarmx.agents.policies.ties import least
from swarmx.core.fleet import CallView, Choice, FleetView, Order


@dataclass(frozen=True, slots=True, kw_only=True)
class ThunderAgent:
    """A program stays at its replica until the KV cache there is under pressure; then it waits at a tool boundary.

    The program scheduler of ThunderAgent (arXiv 2602.13692) as in NVIDIA Dynamo's experimental router. A replica is
    charged the context of its programs and `buffer_tokens` for each. A new program goes to the one with most free KV
    among those where it fits, behind programs that wait. A call of a running program goes home unless more than
    `pause` of the KV there is taken: its program is paused, between two calls and never within one. Who waits is let in
    where it fits below `pause - hysteresis`: at home if possible, else where most KV is free. Inside an engine that
    looks at priorities, calls go by time of dispatch; one that has waited goes `boost_s` earlier, and one to a replica
    that is filled to between `demote` and `pause` goes `demote_s` later.

    Left out: programs between two calls count for nothing (the original charges them in full when it pauses, and decays
    them to nothing within seconds when it admits); the tick of 5 s (here, whenever something changes); best-fit
    decreasing and the smallest program first (here, the workflow submitted first); expiry of idle programs. The limit
    on waiting is the router's `hold_limit_s` (there 1800 s). Blind to devices but for their KV capacity.
    """

    name: ClassVar[str] = "thunderagent"
    order: ClassVar[Order] = "workflow"
    waits: ClassVar[bool] = True

    pause: float = 0.95
    hysteresis: float = 0.10
    demote: float = 0.80
    buffer_tokens: float = 100.0
    boost_s: float = 1.0
    demote_s: float = 2.0

    def choose(self, call: CallView, fleet: FleetView, rng: np.random.Generator) -> Choice:
        capacity, home = fleet.kv_capacity_tokens, call.home
        used = fleet.context_tokens + self.buffer_tokens * fleet.in_flight
        resumed = call.waited_s > 0.0
        roomy = fleet.in_flight < fleet.max_batch
        if home is not None and not resumed and used[home] <= self.pause * capacity[home]:
            index, hold = home, False
        else:
            new = home is None and not resumed
            ceiling = 1.0 if new else self.pause - self.hysteresis
            fits = roomy & (used + call.call.prompt_tokens + self.buffer_tokens <= ceiling * capacity)
            hold = not fits.any() or (new and call.ahead > 0)
            if home is not None and fits[home]:
                index = home
            else:
                index = least(used - capacity, rng, fits if fits.any() else None)
        pressed = self.demote * capacity[index] <= used[index] < self.pause * capacity[index]
        urgency = call.now_s - self.boost_s * resumed + self.demote_s * bool(pressed)
        return Choice(index=index, hold=hold, urgency=float(urgency))
