"""gittins: the workflow with the highest Gittins index first, each call where it is expected to complete first."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from msgspec.structs import replace

from swarmx.agents.gittins import gittins_index
from swarmx.agents.policies.least_work import LeastWork
from swarmx.core.fleet import CallView, Choice, FleetView, Order

_PLACEMENT = LeastWork()


@dataclass(frozen=True, slots=True, kw_only=True)
class Gittins:
    """The workflow with the highest Gittins index of its remaining service first, placed by least work.

    Hermes (arXiv 2506.14851) orders by the Gittins index over the demand that remains of an application, which its
    probabilistic demand graph refines as functions end. Here that demand is the service (seconds at replicas) of the
    last finished workflows of the kind, given that it exceeds what this one got: no graph, and nothing is prewarmed.
    Hermes says little of placement: that of `least_work` is this project's. Inside an engine that looks at
    priorities the index at dispatch decides (`urgency`).
    """

    name: ClassVar[str] = "gittins"
    order: ClassVar[Order] = "gittins"
    waits: ClassVar[bool] = False

    def choose(self, call: CallView, fleet: FleetView, rng: np.random.Generator) -> Choice:
        workflow = call.workflow
        index = gittins_index(workflow.past_s, workflow.attained_s)
        return replace(_PLACEMENT.choose(call, fleet, rng), urgency=-index)
