"""When a workflow begins and ends, where nobody says so: it is over once it has been silent."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from swarmx.core.messages import Message, WorkflowEnded, WorkflowSubmitted
from swarmx.core.nouns import Call
from swarmx.runtime.clock import Clock

_MOST = 10_000


@dataclass(slots=True, kw_only=True)
class _Open:
    last_at_s: float
    calls: int = 0
    timer: asyncio.TimerHandle | None = None


class SilentWorkflows:
    """Announces workflows by their first call, and ends them `idle_s` after their last answer.

    `post` is told each message with the time at which it was true: the silence is no part of a workflow.
    """

    def __init__(self, *, idle_s: float, clock: Clock, post: Callable[[Message, float], None]) -> None:
        self._idle_s = idle_s
        self._clock = clock
        self._post = post
        self._open: OrderedDict[str, _Open] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def enter(self, call: Call) -> None:
        """One of its calls begins."""
        workflow = self._open.get(call.workflow_id)
        if workflow is None:
            now_s = self._clock.now_s()
            workflow = self._open[call.workflow_id] = _Open(last_at_s=now_s)
            self._post(WorkflowSubmitted(workflow_id=call.workflow_id, kind=call.workflow_kind), now_s)
            if len(self._open) > _MOST:
                self._end(next(iter(self._open)))
        workflow.calls += 1

    def leave(self, call: Call) -> None:
        """One of its calls is over."""
        workflow = self._open.get(call.workflow_id)
        if workflow is None:
            return
        workflow.calls, workflow.last_at_s = workflow.calls - 1, self._clock.now_s()
        if workflow.calls <= 0 and workflow.timer is None:
            self._wake(call.workflow_id, workflow, self._idle_s)

    def close(self) -> None:
        """Drop all timers."""
        for workflow in self._open.values():
            if workflow.timer is not None:
                workflow.timer.cancel()
        self._open.clear()

    def _wake(self, workflow_id: str, workflow: _Open, within_s: float) -> None:
        workflow.timer = asyncio.get_running_loop().call_later(within_s, self._looked_at, workflow_id, workflow)

    def _looked_at(self, workflow_id: str, workflow: _Open) -> None:
        """It is over if nothing has happened since the timer was set; calls that came and went let it run on."""
        workflow.timer = None
        left_s = workflow.last_at_s + self._idle_s - self._clock.now_s()
        if workflow.calls > 0:
            return
        if left_s > 0.0:
            self._wake(workflow_id, workflow, left_s)
        else:
            self._end(workflow_id)

    def _end(self, workflow_id: str) -> None:
        workflow = self._open.pop(workflow_id, None)
        if workflow is not None:
            if workflow.timer is not None:
                workflow.timer.cancel()
            self._post(WorkflowEnded(workflow_id=workflow_id, state="finished"), workflow.last_at_s)
