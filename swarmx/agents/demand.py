"""The router's memory of demand: what calls arrived lately, and what the workflows that are running will still call."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from swarmx.agents.calls import WaitingCalls
from swarmx.agents.pool import Pool
from swarmx.core.actions import StartTimer
from swarmx.core.fleet import Floats, Ints
from swarmx.core.messages import DemandReported, WorkflowSubmitted
from swarmx.core.nouns import Call
from swarmx.core.ports import Output

TIMER = "demand"
HORIZONS_S = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)

# Kinds and workflows are the clients' to name and to number, so everything about them is bounded.
MOST_KINDS = 256
MOST_RUNNING = 10_000
MOST_HISTORY = 64  # finished workflows remembered of a kind
MOST_CALLS = 64  # calls remembered of a workflow
MOST_REMEMBERED = 10_000  # calls of workflows, the latest, that are known again when they are offered again
MOST_GROUPS = 32  # groups of running workflows that one report looks ahead for, the largest; the rest is not counted

_RATE_MEMORY_REPORTS = 15.0
_WORK_WEIGHT = 0.05
_P90 = 1.2815515655446004  # of the standard normal distribution
_GRID = np.array(HORIZONS_S)


class Load(NamedTuple):
    """What the router has of one model right now; `work_left` is the expected rest of all of it."""

    in_flight: int
    waiting: int
    work_left: float


def load_of(pool: Pool, waiting: WaitingCalls, now_s: float) -> Load:
    """The load of a model, whose replicas are in the pool."""
    view = pool.view(np.arange(len(pool)), now_s)
    return Load(int(view.in_flight.sum()), len(waiting), float(view.remaining_work.sum()) + waiting.work)


@dataclass(slots=True, kw_only=True)
class _Model:
    """Counts since the last report, and slow means. `loose` calls belong to no workflow whose shape is known."""

    number: int
    arrived: int = 0
    arrived_work: float = 0.0
    ended: int = 0
    loose: int = 0
    loose_per_s: float = 0.0
    calls: int = 0
    work_per_call: float = 0.0


@dataclass(slots=True, kw_only=True)
class _Running:
    """A workflow on its way: what it called, and when, in seconds since it was submitted."""

    kind: str
    submitted_at_s: float
    last_at_s: float
    calls: int = 0
    offsets_s: list[float] = field(default_factory=list)
    models: list[int] = field(default_factory=list)


class _Shapes(NamedTuple):
    """The remembered workflows of a kind; `offsets_s` and `models` are padded to [workflows, longest]."""

    offsets_s: Floats
    models: Ints
    calls: Ints
    ended_s: Floats


class _Kind:
    """How workflows of one kind went, and how often one is submitted."""

    def __init__(self) -> None:
        self.submitted = 0
        self.submitted_per_s = 0.0
        self._history: deque[tuple[list[float], list[int], float]] = deque(maxlen=MOST_HISTORY)
        self._shapes: _Shapes | None = None
        self._due: Floats | None = None  # fresh calls at one submission a second, until the history changes

    @property
    def is_known(self) -> bool:
        return bool(self._history)

    def remember(self, workflow: _Running, ended_s: float) -> None:
        self._history.append((workflow.offsets_s, workflow.models, ended_s))
        self._shapes = self._due = None

    def further(self, calls: int, since_s: float, models: int) -> tuple[Floats, Floats] | None:
        """Mean and variance, both [models, horizons], of the calls that a workflow makes within each horizon.

        It has made `calls`, the last one `since_s` ago. The remembered workflows that made as many speak for it; those
        of them that had gone on by this time do not, unless all had: then it is late, and what follows is due at once.
        Nobody speaks for a workflow that is longer than all that are remembered: None.
        """
        shapes = self.shapes()
        speaks = shapes.calls >= calls
        if not speaks.any():
            return None
        longest = shapes.offsets_s.shape[1]
        last_s = shapes.offsets_s[:, calls - 1] if calls else np.zeros(len(shapes.calls))
        after_s = np.where(shapes.calls > calls, shapes.offsets_s[:, min(calls, longest - 1)], shapes.ended_s) - last_s
        waits = speaks & (after_s > since_s)
        rows = waits if waits.any() else speaks
        delays_s = shapes.offsets_s[rows, calls:] - last_s[rows, None] - since_s
        called = shapes.models[rows, calls:]
        made = called >= 0
        row, _ = made.nonzero()
        first = np.searchsorted(_GRID, delays_s[made])  # the first horizon that the call is within
        width = len(_GRID) + 1
        cells = (row * models + called[made]) * width + first
        by_cell = np.bincount(cells, minlength=len(called) * models * width).reshape(len(called), models, width)
        counts = by_cell[:, :, :-1].cumsum(axis=2)
        return counts.mean(axis=0), counts.var(axis=0)

    def fresh(self, models: int) -> Floats:
        """Calls, [models, horizons], by workflows that will be submitted within the horizon, evenly over it."""
        if self._due is None or len(self._due) < models:
            shapes = self.shapes()
            calls = shapes.models >= 0
            due = np.zeros((models, len(_GRID)))
            np.add.at(due, shapes.models[calls], np.maximum(0.0, _GRID - shapes.offsets_s[calls][:, None]))
            self._due = due / len(shapes.calls)
        return self._due * self.submitted_per_s

    def shapes(self) -> _Shapes:
        if self._shapes is None:
            longest = max(1, *(len(offsets_s) for offsets_s, _, _ in self._history))
            offsets = np.full((len(self._history), longest), np.inf)
            models = np.full((len(self._history), longest), -1, dtype=np.int64)
            for row, (offsets_s, numbers, _) in enumerate(self._history):
                offsets[row, : len(offsets_s)] = offsets_s
                models[row, : len(numbers)] = numbers
            self._shapes = _Shapes(
                offsets_s=offsets,
                models=models,
                calls=np.array([len(offsets_s) for offsets_s, _, _ in self._history]),
                ended_s=np.array([ended_s for _, _, ended_s in self._history]),
            )
        return self._shapes


class DemandSketch:
    """A few counts a call while calls come and go; the looking ahead is done once a report, every `every_s`.

    The timer of the reports runs only while there is something to report. With `every_s` 0 nothing is counted.
    """

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._is_reporting = False
        self._models: dict[str, _Model] = {}
        self._kinds: dict[str, _Kind] = {}  # the one that was submitted longest ago comes first
        self._running: dict[str, _Running] = {}
        self._known: dict[str, None] = {}  # call ids, the one that was offered longest ago first
        self._since_s = 0.0

    def submitted(self, message: WorkflowSubmitted, now_s: float) -> list[Output]:
        """A workflow begins; one that only goes on after a restart was demand before."""
        workflow_id, kind = message.workflow_id, message.kind
        if not self._every_s or workflow_id in self._running:
            return []
        started = self._start(now_s)
        known = self._kinds.pop(kind, None)
        self._kinds[kind] = known = _Kind() if known is None else known
        known.submitted += message.submitted_at_s is None
        if len(self._kinds) > MOST_KINDS:
            del self._kinds[next(iter(self._kinds))]
        self._running[workflow_id] = _Running(kind=kind, submitted_at_s=now_s, last_at_s=now_s)
        if len(self._running) > MOST_RUNNING:
            del self._running[next(iter(self._running))]
        return started

    def arrived(self, call: Call, work: float, now_s: float) -> list[Output]:
        """A call wants a replica; `work` is what it is expected to need.

        One that was refused and is offered again, as calls of workflows are, was counted the first time.
        """
        if not self._every_s:
            return []
        started = self._start(now_s)
        if call.workflow_id in self._running and self._is_known(call.call_id):
            return started
        model = self._models.get(call.model)
        if model is None:
            model = self._models[call.model] = _Model(number=len(self._models))
        model.arrived += 1
        model.arrived_work += work
        model.calls += 1
        model.work_per_call += max(_WORK_WEIGHT, 1.0 / model.calls) * (work - model.work_per_call)
        workflow = self._running.get(call.workflow_id)
        if workflow is None:
            model.loose += 1
            return started
        kind = self._kinds.get(workflow.kind)
        if kind is None or not kind.is_known:
            model.loose += 1
        workflow.calls += 1
        workflow.last_at_s = now_s
        if workflow.calls <= MOST_CALLS:
            workflow.offsets_s.append(now_s - workflow.submitted_at_s)
            workflow.models.append(model.number)
        return started

    def ended(self, model: str) -> None:
        """A call is over, however it ended."""
        known = self._models.get(model)
        if known is not None:
            known.ended += 1

    def workflow_ended(self, workflow_id: str, *, finished: bool, now_s: float) -> None:
        """A workflow is over. Only one that came to its own end tells how such workflows go."""
        workflow = self._running.pop(workflow_id, None)
        kind = None if workflow is None else self._kinds.get(workflow.kind)
        if workflow is not None and kind is not None and finished:
            if not kind.is_known:  # its calls were loose until now, and must not be expected twice
                for model in self._models.values():
                    calls_per_s = kind.submitted_per_s * workflow.models.count(model.number)
                    model.loose_per_s = max(0.0, model.loose_per_s - calls_per_s)
            kind.remember(workflow, now_s - workflow.submitted_at_s)

    def report(self, loads: Mapping[str, Load], now_s: float) -> list[Output]:
        """What happened since the last report and what is expected next, a model each; begins the next window.

        Once nothing is running, waiting or new, nothing is expected either, and this report is the last for now: its
        receiver keeps it, and a rate of the past must not hold replicas for ever.
        """
        if not self._is_reporting:
            return []
        window_s = now_s - self._since_s
        goes_on = bool(self._running) or any(model.arrived for model in self._models.values())
        self._is_reporting = goes_on = goes_on or any(load.in_flight or load.waiting for load in loads.values())
        counts = {name: (m.arrived, m.arrived_work, m.ended) for name, m in self._models.items()}
        self._settle_rates(now_s)
        nothing = np.zeros((len(self._models), len(_GRID)))
        mean, p90 = self._upcoming(now_s) if goes_on else (nothing, nothing)
        fresh = self._fresh() if goes_on else nothing
        reports: list[Output] = []
        for name, model in self._models.items():
            arrived, arrived_work, ended = counts[name]
            load = loads.get(name, Load(0, 0, 0.0))
            reports.append(
                DemandReported(
                    model=name,
                    window_s=window_s,
                    arrived=arrived,
                    arrived_work=arrived_work,
                    finished=ended,
                    in_flight=load.in_flight,
                    waiting=load.waiting,
                    work_left=load.work_left,
                    work_per_call=model.work_per_call,
                    horizons_s=HORIZONS_S,
                    upcoming_mean=tuple(mean[model.number].tolist()),
                    upcoming_p90=tuple(p90[model.number].tolist()),
                    fresh_mean=tuple(fresh[model.number].tolist()),
                )
            )
        if goes_on:
            reports.append(StartTimer(key=TIMER, at_s=now_s + self._every_s))
        return reports

    def _is_known(self, call_id: str) -> bool:
        """Whether the call was offered before; from now on it is."""
        known = call_id in self._known
        self._known.pop(call_id, None)
        self._known[call_id] = None
        if len(self._known) > MOST_REMEMBERED:
            del self._known[next(iter(self._known))]
        return known

    def _start(self, now_s: float) -> list[Output]:
        """Begin to report; after a silence the next window begins here."""
        if self._is_reporting:
            return []
        self._is_reporting = True
        self._settle_rates(now_s)
        return [StartTimer(key=TIMER, at_s=now_s + self._every_s)]

    def _settle_rates(self, now_s: float) -> None:
        """Take the counts since the last time into the rates, and begin to count anew."""
        window_s = now_s - self._since_s
        self._since_s = now_s
        weight = 1.0 - math.exp(-max(0.0, window_s) / (_RATE_MEMORY_REPORTS * self._every_s))
        for kind in self._kinds.values():
            if window_s > 0.0:
                kind.submitted_per_s += weight * (kind.submitted / window_s - kind.submitted_per_s)
                kind.submitted = 0
        for model in self._models.values():
            if window_s > 0.0:
                model.loose_per_s += weight * (model.loose / window_s - model.loose_per_s)
                model.loose = 0
            model.arrived, model.arrived_work, model.ended = 0, 0.0, 0

    def _upcoming(self, now_s: float) -> tuple[Floats, Floats]:
        """Mean and P90 of the further calls of all running workflows, both [models, horizons].

        Workflows of one kind that made equally many calls about equally long ago are alike. They are independent of
        each other, so means and variances add, and the sum is taken as normal. More time never means fewer calls, so
        that a P90 does not fall where the spread narrows.
        """
        alike: dict[tuple[str, int, int], tuple[int, float]] = {}
        for workflow in self._running.values():
            since_s = now_s - workflow.last_at_s
            key = (workflow.kind, workflow.calls, bisect_right(HORIZONS_S, since_s))
            count, total_s = alike.get(key, (0, 0.0))
            alike[key] = (count + 1, total_s + since_s)
        largest = sorted(alike.items(), key=lambda item: -item[1][0])[:MOST_GROUPS]
        models = len(self._models)
        mean, variance = np.zeros((models, len(_GRID))), np.zeros((models, len(_GRID)))
        for (name, calls, _), (count, total_s) in largest:
            kind = self._kinds.get(name)
            if kind is None or not kind.is_known:
                continue
            if (further := kind.further(calls, total_s / count, models)) is not None:
                mean += count * further[0]
                variance += count * further[1]
        return mean, np.maximum.accumulate(mean + _P90 * np.sqrt(variance), axis=1)

    def _fresh(self) -> Floats:
        models = len(self._models)
        loose_per_s = np.array([model.loose_per_s for model in self._models.values()])
        total: Floats = loose_per_s[:, None] * _GRID
        for kind in self._kinds.values():
            if kind.is_known and kind.submitted_per_s > 0.0:
                total = total + kind.fresh(models)
        return total
