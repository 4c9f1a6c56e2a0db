"""The router's memory of workflows: how old each is, what it got, what it may still need, and when it should end."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from swarmx.core.fleet import Floats, WorkflowView
from swarmx.core.forecast import Forecast
from swarmx.core.messages import WorkflowSubmitted
from swarmx.core.nouns import Call

# Kinds and workflows are the clients' to name and to number, so everything about them is bounded.
MOST_RUNNING = 20_000
MOST_KINDS = 256
MOST_STAGES = 256
MOST_CALLS = 64

_HISTORY = 256
_WEIGHT = 0.05
_STRETCH = 2.0  # a workflow without a target should take twice what its kind takes on average
_UNKNOWN_S = 60.0
_NOTHING: Floats = np.zeros(0)


@dataclass(slots=True, kw_only=True)
class _Mean:
    """A running mean that forgets."""

    value: float = 0.0
    count: int = 0

    def add(self, sample: float) -> None:
        self.count += 1
        self.value += max(_WEIGHT, 1.0 / self.count) * (sample - self.value)


_Stage = tuple[str, int]
"""The role of a call, and how many of that role its workflow had behind it when it was ready."""


@dataclass(slots=True, kw_only=True)
class _Kind:
    """How workflows of one kind went. `stages` has the time from a ready call to the end of the workflow, and how long
    the call itself took at its replica."""

    total_s: _Mean = field(default_factory=_Mean)
    stages: OrderedDict[_Stage, tuple[_Mean, _Mean]] = field(default_factory=OrderedDict)
    service_s: deque[float] = field(default_factory=lambda: deque(maxlen=_HISTORY))
    past_s: Floats | None = None

    def sorted_past_s(self) -> Floats:
        if self.past_s is None:
            self.past_s = np.sort(np.array(self.service_s, dtype=np.float64))
        return self.past_s

    def add(self, stage: _Stage, rest_s: float, call_s: float | None) -> None:
        rest, call = self.stages.setdefault(stage, (_Mean(), _Mean()))
        self.stages.move_to_end(stage)
        if len(self.stages) > MOST_STAGES:
            self.stages.popitem(last=False)
        rest.add(rest_s)
        if call_s is not None:
            call.add(call_s)

    def after(self, stage: _Stage) -> tuple[float, float] | None:
        """Means of what follows and of the call itself; of a round that nobody reached, those of the last one known."""
        role, rounds = stage
        for before in range(min(rounds, MOST_STAGES), -1, -1):
            if (known := self.stages.get((role, before))) is not None:
                return known[0].value, known[1].value
        return None


@dataclass(slots=True, kw_only=True)
class _Running:
    kind: str
    submitted_at_s: float
    target_s: float | None
    calls: int = 0
    attained_s: float = 0.0
    attained_work: float = 0.0
    resumed: bool = False  # what it got before that is not known
    rounds: Counter[str] = field(default_factory=Counter)  # ended calls by role
    ready_at_s: dict[str, tuple[_Stage, float]] = field(default_factory=dict)  # by call
    service_s: dict[str, float] = field(default_factory=dict)
    ends_at_s: dict[str, float] = field(default_factory=dict)


_ALONE = _Running(kind="", submitted_at_s=0.0, target_s=None)
"""What is known of the workflow of a call that belongs to none: nothing, ever."""


class WorkflowBook:
    """Takes in what happens to workflows and their calls; `view` tells what a policy should know of one.

    `targets` are seconds by kind, for workflows that bring no target of their own.
    """

    def __init__(self, targets: Mapping[str, float] | None = None) -> None:
        self._targets = dict(targets or {})
        self._kinds: OrderedDict[str, _Kind] = OrderedDict()
        self._running: OrderedDict[str, _Running] = OrderedDict()

    def __len__(self) -> int:
        return len(self._running)

    def submitted(self, message: WorkflowSubmitted, now_s: float) -> None:
        """A workflow begins, or goes on after a restart; of one that runs already, nothing changes."""
        if message.workflow_id in self._running:
            return
        began_s = message.submitted_at_s
        self._running[message.workflow_id] = _Running(
            kind=message.kind,
            submitted_at_s=now_s if began_s is None else min(began_s, now_s),
            target_s=message.target_s,
            resumed=began_s is not None,
        )
        if len(self._running) > MOST_RUNNING:
            self._running.popitem(last=False)

    def call_ready(self, call: Call, now_s: float) -> None:
        """One of its calls wants a replica; one that is offered again has been ready since the first time."""
        running = self._running.get(call.workflow_id)
        if running is not None and len(running.ready_at_s) < MOST_CALLS:
            running.ready_at_s.setdefault(call.call_id, ((call.role, running.rounds[call.role]), now_s))

    def call_placed(self, workflow_id: str, call_id: str, ends_at_s: float) -> None:
        """One of its calls went to a replica, and should end there at this time."""
        running = self._running.get(workflow_id)
        if running is not None:
            running.ends_at_s[call_id] = ends_at_s

    def call_left(self, workflow_id: str, call_id: str) -> None:
        """One of its calls is no longer at a replica, whatever became of it."""
        running = self._running.get(workflow_id)
        if running is not None:
            running.ends_at_s.pop(call_id, None)

    def call_ended(self, call: Call, service_s: float, work: float) -> None:
        """One of its calls was answered after so many seconds at its replica."""
        running = self._running.get(call.workflow_id)
        if running is None:
            return
        running.calls += 1
        if call.role in running.rounds or len(running.rounds) < MOST_CALLS:
            running.rounds[call.role] += 1
        running.attained_s += service_s
        running.attained_work += work
        if call.call_id in running.ready_at_s:
            running.service_s[call.call_id] = service_s

    def ended(self, workflow_id: str, *, finished: bool, now_s: float) -> None:
        """It is over. Only one that came to its own end tells how such workflows go.

        Of one that went on after a restart, only how long it took in all: its calls before that were not counted.
        """
        running = self._running.pop(workflow_id, None)
        if running is None or not finished:
            return
        kind = self._kinds.setdefault(running.kind, _Kind())
        self._kinds.move_to_end(running.kind)
        if len(self._kinds) > MOST_KINDS:
            self._kinds.popitem(last=False)
        kind.total_s.add(now_s - running.submitted_at_s)
        if running.resumed:
            return
        kind.service_s.append(running.attained_s)
        kind.past_s = None
        for call_id, (stage, ready_at_s) in running.ready_at_s.items():
            kind.add(stage, now_s - ready_at_s, running.service_s.get(call_id))

    def view(self, call: Call, path: Forecast | None, ready_at_s: float, now_s: float) -> WorkflowView:
        """What is known of the workflow as of now; a call that belongs to none is a workflow of its own.

        `path` is the predictor's word on what remained when the call became ready.
        """
        running = self._running.get(call.workflow_id)
        if running is None:
            kind, began_s, running = call.workflow_kind, ready_at_s, _ALONE
        else:
            kind, began_s = running.kind, running.submitted_at_s
        known = self._kinds.get(kind)
        target_s = running.target_s if running.target_s is not None else self._targets.get(kind)
        typical_s = known.total_s.value if known is not None else _UNKNOWN_S / _STRETCH
        at = running.ready_at_s.get(call.call_id)
        stage = (call.role, running.rounds[call.role]) if at is None else at[0]
        after = known.after(stage) if known is not None else None
        rest_s, call_s = (typical_s, 0.0) if after is None else after
        if path is not None:
            rest_s, call_s = path.mean, 0.0
        return WorkflowView(
            kind=kind,
            age_s=now_s - began_s,
            target_s=_STRETCH * typical_s if target_s is None else target_s,
            remaining_s=rest_s,
            attained_s=running.attained_s,
            attained_work=running.attained_work,
            calls=running.calls,
            past_s=_NOTHING if known is None else known.sorted_past_s(),
            usual_s=0.0 if known is None else known.total_s.value,
            usual_call_s=call_s,
            others_s=max(0.0, max(running.ends_at_s.values()) - now_s) if running.ends_at_s else 0.0,
        )
