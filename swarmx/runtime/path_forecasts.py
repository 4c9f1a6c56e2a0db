"""What a call that is ready tells the router of its workflow's rest: the predictor's word, or nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from swarmx.core.forecast import Forecast
from swarmx.core.messages import Message
from swarmx.core.nouns import Call
from swarmx.neural.structure_live import WorkflowForecasts
from swarmx.runtime.clock import Clock
from swarmx.runtime.reliance import Fault, Reliance


class PathForecasts:
    """Asks `workflows`, which hears all messages, once for each call.

    There is no word on a call outside workflows, nor while the predictor rests because it failed or took more than
    `budget_s` too often (`runtime.reliance`): the router then counts on its own means. A word that came late is heard.
    """

    def __init__(
        self,
        workflows: WorkflowForecasts,
        *,
        budget_s: float,
        clock: Clock,
        post: Callable[[Message], None],
        rest_s: float = 30.0,
        busy_s: Callable[[], float] = time.thread_time,
        on_rest: Callable[[Fault], None] = lambda fault: None,
    ) -> None:
        self._workflows = workflows
        self._reliance = Reliance(
            "workflows", budget_s=budget_s, clock=clock, post=post, rest_s=rest_s, busy_s=busy_s, on_rest=on_rest
        )

    def of(self, call: Call) -> Forecast | None:
        """Seconds from now to the end of the workflow, the call being the newest of it."""
        reliance = self._reliance
        begun = reliance.now()
        if not call.workflow_id or reliance.rests(begun.wall):
            return None
        found: Forecast | None = None
        fault: Fault | None = None
        try:
            self._workflows.call_ready(call, begun.wall)
            found = self._workflows.path(call.workflow_id, begun.wall)
        except Exception as error:  # noqa: BLE001  # weights are data: whatever they lead to must not stop a call
            fault = "raised"
            reliance.complain("path", error)
        if found is not None and not (found.unit == "s" and math.isfinite(found.mean)):
            found, fault = None, "unsound"
        reliance.mark(fault, reliance.since(begun))
        return found
