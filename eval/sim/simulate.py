"""`simulate`: a workload on a fleet, under the real routers, in virtual time."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Sequence

from eval.sim.outcome import Outcome
from eval.sim.settings import SimSettings
from eval.sim.world import Observer, World
from eval.workloads.plan import PlannedCall, Workload
from swarmx.core.errors import ConfigError
from swarmx.core.nouns import Replica


def simulate(
    workload: Workload,
    fleet: Sequence[Replica],
    settings: SimSettings | None = None,
    seed: int = 0,
    *,
    observer: Observer | None = None,
) -> Outcome:
    """Run the workload to its end. The same arguments give the same outcome, but for the time that it took.

    Raises ConfigError for a workload or a fleet that makes no sense. Calls for models that no replica serves, and calls
    that no replica can hold, are the router's to refuse.
    """
    check(workload, fleet)
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    was_on = gc.isenabled()
    gc.disable()  # nothing here forms cycles, and its passes over all that lives cost a tenth of the time
    try:
        world = World(workload, fleet, settings or SimSettings(), seed, observer)
        world.run()
    finally:
        if was_on:
            gc.enable()
    return world.ledger.outcome(
        world.machines.all,
        stopped_s=world.now_s,
        events=world.events,
        wall_s=time.perf_counter() - wall_s,
        cpu_s=time.process_time() - cpu_s,
    )


def check(workload: Workload, fleet: Sequence[Replica]) -> None:
    """Raises ConfigError where it makes no sense, with the first place that does not."""
    if len({replica.replica_id for replica in fleet}) < len(fleet):
        raise ConfigError("two replicas of the fleet have the same id.")
    seen: set[str] = set()
    before_s = 0.0
    for workflow in workload.workflows:
        name = f"workflow {workflow.workflow_id!r}"
        if workflow.workflow_id in seen:
            raise ConfigError(f"there are two workflows with the id {workflow.workflow_id!r}.")
        seen.add(workflow.workflow_id)
        if not before_s <= workflow.at_s < math.inf:
            raise ConfigError(f"{name} is submitted at {workflow.at_s} s, expected a time from {before_s} s on.")
        before_s = workflow.at_s
        if not workflow.calls:
            raise ConfigError(f"{name} has no calls.")
        for position, call in enumerate(workflow.calls):
            if wrong := _wrong_in(call, position, len(workload.quantiles)):
                raise ConfigError(f"call {position} of {name} {wrong}.")


def _wrong_in(call: PlannedCall, position: int, forecasts: int) -> str:
    if not all(0 <= before < position for before in call.after):
        return f"waits for {call.after}, expected earlier calls"
    if not 0.0 <= call.gap_s < math.inf:
        return f"has a gap of {call.gap_s} s, expected a finite one from 0 on"
    if call.prompt_tokens < 0:
        return f"has {call.prompt_tokens} prompt tokens, expected none or more"
    if not 0.0 < call.work < math.inf:
        return f"does {call.work} of work, expected a finite number above zero"
    if not 0 <= call.forecast < forecasts:
        return f"has the forecast {call.forecast}, expected one of {forecasts}"
    return ""
