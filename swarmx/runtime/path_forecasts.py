"""What a call that is ready tells the router of its workflow's rest: the predictor's word, or nothing."""

from __future__ import annotations

import math

from swarmx.core.forecast import Forecast
from swarmx.core.nouns import Call
from swarmx.neural.structure_live import WorkflowForecasts
from swarmx.runtime.reliance import Fault, Reliance


class PathForecasts:
    """Asks `workflows`, which hears all messages, once for each call.

    There is no word on a call outside workflows, nor while `reliance` lets the predictor rest because it failed or took
    too long too often: the router then counts on its own means. A word that came late is heard.
    """

    def __init__(self, workflows: WorkflowForecasts, reliance: Reliance) -> None:
        self._workflows = workflows
        self._reliance = reliance

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
