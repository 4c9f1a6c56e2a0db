"""Tells the agents that a workflow begins here and that it has ended or left, and the figures how long it took."""

from __future__ import annotations

import logging
from collections.abc import Callable

from swarmx.core.messages import Message, WorkflowEnded, WorkflowSubmitted
from swarmx.core.records import WorkflowRecord, WorkflowState

log = logging.getLogger(__name__)


class Announcer:
    """Whoever listens may raise: that is logged, and the workflow goes on.

    `on_latency` hears the seconds that a workflow took; of one that was cancelled it hears nothing, as its end was
    somebody's choice.
    """

    def __init__(
        self, post: Callable[[Message], None] | None = None, on_latency: Callable[[float], None] | None = None
    ) -> None:
        self._post = post
        self._on_latency = on_latency
        self._here: set[str] = set()

    def submitted(self, record: WorkflowRecord, *, again: bool = False) -> None:
        """The workflow is in the store and begins, or goes on `again` after a restart.

        Records and the agents of a server go by the same clock, in Unix seconds.
        """
        self._here.add(record.workflow_id)
        target_s = None if record.deadline_at_s is None else record.deadline_at_s - record.created_at_s
        self._tell(
            WorkflowSubmitted(
                workflow_id=record.workflow_id,
                kind=record.kind,
                target_s=target_s,
                submitted_at_s=record.created_at_s if again else None,
            )
        )

    def ended(self, record: WorkflowRecord, state: WorkflowState, ended_at_s: float) -> None:
        """The end of the workflow is in the store; a `state` that is not terminal says nothing."""
        if state not in ("finished", "failed", "cancelled"):
            return
        self._here.discard(record.workflow_id)
        self._tell(WorkflowEnded(workflow_id=record.workflow_id, state=state))
        if self._on_latency is not None and state != "cancelled":
            try:
                self._on_latency(max(0.0, ended_at_s - record.created_at_s))
            except Exception:
                log.exception("whoever keeps the latencies of workflows raised at the end of %s", record.workflow_id)

    def left(self, workflow_id: str) -> bool:
        """This process lets the workflow go; False, and nobody is told: it has ended, or was not here."""
        if workflow_id not in self._here:
            return False
        self._here.discard(workflow_id)
        self._tell(WorkflowEnded(workflow_id=workflow_id, state="left"))
        return True

    def _tell(self, message: WorkflowSubmitted | WorkflowEnded) -> None:
        if self._post is None:
            return
        try:
            self._post(message)
        except Exception:
            log.exception("%s of workflow %s could not be posted", type(message).__name__, message.workflow_id)
