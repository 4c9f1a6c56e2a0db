"""The orders in which calls may wait in the router: a key for each call, fixed when it begins to wait, lowest first."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from swarmx.agents.gittins import gittins_index
from swarmx.core.fleet import Order, WorkflowView

Key = tuple[float, float]
"""What is compared first, and what decides between equals."""

# Levels of attained service, in seconds at replicas: those of a multi-level feedback queue, each double the last.
_LEVELS_S = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)
_BOOST = 4.0  # a workflow that has waited this many times its service is served as if it were new


def _arrival(_: WorkflowView, now_s: float) -> Key:
    """First come, first served."""
    return now_s, 0.0


def _workflow(workflow: WorkflowView, now_s: float) -> Key:
    """The workflow that was submitted first; calls of one workflow as they come (program-level FCFS)."""
    return now_s - workflow.age_s, now_s


def _deadline(workflow: WorkflowView, now_s: float) -> Key:
    """Earliest deadline of the workflow first (Liu & Layland 1973)."""
    return now_s - workflow.age_s + workflow.target_s, now_s


def _slack(workflow: WorkflowView, now_s: float) -> Key:
    """The workflow that has to go on earliest to meet its target, given what it still has before it, first."""
    return now_s + workflow.slack_s, now_s


def attained_level(workflow: WorkflowView) -> float:
    """The level of the service that the workflow got so far, 0 for the least; who was starved goes back to it.

    Program-level attained service (PLAS) of Autellix (arXiv 2502.13965), with a multi-level queue between workflows.
    """
    waited_s = workflow.age_s - workflow.attained_s
    if waited_s > _BOOST * max(workflow.attained_s, _LEVELS_S[0]):
        return 0.0
    return float(sum(workflow.attained_s >= level for level in _LEVELS_S))


def _attained(workflow: WorkflowView, now_s: float) -> Key:
    """The workflow that got the least service so far first, in levels."""
    return attained_level(workflow), now_s


def _gittins(workflow: WorkflowView, now_s: float) -> Key:
    """The workflow with the highest Gittins index of its remaining service first (Hermes, arXiv 2506.14851)."""
    return -gittins_index(workflow.past_s, workflow.attained_s), now_s


ORDERS: Mapping[Order, Callable[[WorkflowView, float], Key]] = {
    "arrival": _arrival,
    "workflow": _workflow,
    "deadline": _deadline,
    "slack": _slack,
    "attained": _attained,
    "gittins": _gittins,
}
