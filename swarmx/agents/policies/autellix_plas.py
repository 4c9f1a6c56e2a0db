"""autellix_plas: least attained service of the program first, long prompts at home, short ones where there is least."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from swarmx.agents.orders import attained_level
from swarmx.agents.policies.ties import least
from swarmx.core.fleet import CallView, Choice, FleetView, Order


@dataclass(frozen=True, slots=True, kw_only=True)
class AutellixPlas:
    """Short prompts go to the least used candidate, long ones home; programs with the least service so far go first.

    Autellix (arXiv 2502.13965): PLAS, the service that a program's ended calls got, in levels of a multi-level queue
    with promotion of the starved, orders the calls; the balancer sends those of at most `short_tokens` prompt tokens to
    the least used engine and longer ones to the engine of the program. Blind to devices and to lengths, as there.

    The original preempts inside the engine at the end of a quantum, which is not modelled: the level of a call is fixed
    when it is sent (`urgency`), and an engine that looks at priorities serves low levels first. Its ATLAS, for programs
    of many threads, needs their graph and is left out. A program's home is where its session was served last.
    With `wait_for_home` 0, a long call whose home is full goes elsewhere rather than wait for it.
    """

    name: ClassVar[str] = "autellix_plas"
    order: ClassVar[Order] = "attained"
    waits: ClassVar[bool] = True

    short_tokens: float = 2048.0
    wait_for_home: float = 1.0

    def choose(self, call: CallView, fleet: FleetView, rng: np.random.Generator) -> Choice:
        urgency = attained_level(call.workflow)
        roomy = fleet.in_flight < fleet.max_batch
        home = call.home if call.call.prompt_tokens > self.short_tokens else None
        if home is not None and (roomy[home] or self.wait_for_home > 0.0):
            return Choice(index=home, urgency=urgency)
        return Choice(index=least(fleet.in_flight, rng, roomy if roomy.any() else None), urgency=urgency)
