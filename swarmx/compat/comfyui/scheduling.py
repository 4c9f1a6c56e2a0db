"""Which job goes to which server next: one line for all servers, asked when a server is free. Pure, but for the log.

The policies are those of the router (see `views`). One job whose graph, forecast or placement fails never stops others.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from heapq import merge, nsmallest
from itertools import islice
from typing import NamedTuple

import numpy as np

from swarmx.agents.choice import second_of
from swarmx.agents.objective import Objective, parameters_in
from swarmx.agents.shares import Shares
from swarmx.compat.comfyui.drafts import facts_of
from swarmx.compat.comfyui.forecasts import UNREAD, JobFacts, JobForecaster, ServerState
from swarmx.compat.comfyui.jobs import Job
from swarmx.compat.comfyui.views import kept_fleet, seen_call, seen_fleet, seen_workflow
from swarmx.core.forecast import LEVELS, Forecast
from swarmx.core.nouns import Candidates, Decision

log = logging.getLogger(__name__)

DEPTH = 8  # jobs that are asked about before the rest of a line waits for them
WINDOW = 64  # jobs at the head of all lines that may go in another order than they came
_NEWS = 1.2
_LEAST_S = 1e-3

_GUESS = Forecast(
    levels=LEVELS, quantiles=(1.0, 2.0, 5.0, 15.0, 45.0, 120.0, 240.0, 600.0), unit="s", source="prior", version="guess"
)
"""For a job of which nothing can be said: neither so short that it passes the others, nor so long that it waits."""


class _Known(NamedTuple):
    """A forecast, after how many changes of its server it was made, and after how many jobs that taught something."""

    changes: int
    lessons: int
    forecast: Forecast


@dataclass(slots=True, kw_only=True)
class Waiting:
    """A job in the line. `able` servers may run it; those in `tried` failed it, and are asked last."""

    job: Job
    able: frozenset[str]
    since_s: float
    attempt: int = 0
    tried: frozenset[str] = frozenset()
    failed: bool = False  # to be placed, which is told once
    _facts: JobFacts | None = None
    _forecasts: dict[str, _Known] = field(default_factory=dict)

    @property
    def facts(self) -> JobFacts:
        """Read from the graph when it is first asked for: most jobs wait a while before they are."""
        if self._facts is None:
            try:
                self._facts = facts_of(self.job)
            except Exception:
                log.exception("the graph of the job %s cannot be read; its seconds are guessed", self.job.prompt_id)
                self._facts = UNREAD
        return self._facts


@dataclass(slots=True, kw_only=True)
class Running:
    """A job at a server, which was in the state `before` when it came."""

    waiting: Waiting
    forecast: Forecast
    since_s: float
    before: ServerState

    def left_s(self, now_s: float) -> float:
        """Seconds that it should still need."""
        return self.forecast.mean_remaining(now_s - self.since_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The job goes to the server."""

    waiting: Waiting
    server: str
    decision: Decision
    forecast: Forecast


@dataclass(slots=True)
class _Line:
    """The jobs of one tenant that the same servers may run, in their order."""

    jobs: list[tuple[int, tuple[float, int], str]] = field(default_factory=list)


class Scheduler:
    """The queue of a front, and what its servers are at. `weights` are the tenants' shares.

    Of the jobs that wait, those of a higher priority go first; then those of the tenant that had least service for its
    weight; then those whose clients asked for it by a number, as in ComfyUI's own queue; then those that have waited
    longest for each second that they take, which is the highest response ratio next (Brinch Hansen, 1971): short ones
    pass long ones, and none is passed for ever. With `by_ratio` off the first that came goes first.
    """

    def __init__(
        self,
        forecaster: JobForecaster,
        *,
        policy: str = "marginal",
        parameters: Mapping[str, float] | None = None,
        weights: Mapping[str, float] | None = None,
        by_ratio: bool = True,
        seed: int = 0,
    ) -> None:
        self.objective = Objective(policy, parameters or {})
        self.states: dict[str, ServerState] = {}
        self.running: dict[str, Running] = {}
        self._forecaster = forecaster
        self._up: set[str] = set()
        self._waiting: dict[str, Waiting] = {}
        self._lines: dict[tuple[frozenset[str], str], _Line] = {}
        self._of_tenant: dict[str, int] = {}
        self._bytes: Counter[str] = Counter()
        self._shares = Shares(weights)
        self._by_ratio = by_ratio
        self._last_chosen: dict[str, int] = {}
        self._decisions = 0
        self._lessons = 0
        self._rng = np.random.default_rng(seed)

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, prompt_id: object) -> bool:
        return prompt_id in self._waiting

    def waiting(self, tenant: str | None = None) -> Iterator[Job]:
        """The jobs that wait, in the order of ComfyUI's own queue: about that in which they go."""
        found = (w for w in self._waiting.values() if tenant in (None, w.job.tenant) and w.job.part is None)
        return (w.job for w in sorted(found, key=lambda w: (-w.job.priority, w.job.order)))

    def find(self, prompt_id: str) -> Job | None:
        """The job of this id, if it waits."""
        waiting = self._waiting.get(prompt_id)
        return None if waiting is None else waiting.job

    def waits(self, tenant: str) -> int:
        """How many jobs of the tenant wait."""
        return self._of_tenant.get(tenant, 0)

    def waiting_bytes(self, tenant: str | None = None) -> int:
        """What the jobs that wait come to."""
        return self._bytes.total() if tenant is None else self._bytes[tenant]

    def server(self, name: str, *, up: bool) -> None:
        """A server can be given jobs from now on, or no longer. What it runs is for the shell to end."""
        self.states.setdefault(name, ServerState(name=name))
        (self._up.add if up else self._up.discard)(name)

    @property
    def idle(self) -> frozenset[str]:
        """Servers that are up and run nothing."""
        return frozenset(self._up - self.running.keys())

    def add(self, waiting: Waiting) -> None:
        """The job waits from now on."""
        job = waiting.job
        if not self.waits(job.tenant):
            self._shares.joins(job.tenant, list(self._of_tenant))
        self._of_tenant[job.tenant] = self.waits(job.tenant) + 1
        self._bytes[job.tenant] += job.size_bytes
        self._waiting[job.prompt_id] = waiting
        insort(self._lines.setdefault((waiting.able, job.tenant), _Line()).jobs, _place(job))

    def remove(self, prompt_id: str) -> Waiting | None:
        """The job waits no longer."""
        waiting = self._waiting.pop(prompt_id, None)
        if waiting is None:
            return None
        key, tenant = (waiting.able, waiting.job.tenant), waiting.job.tenant
        jobs = self._lines[key].jobs
        del jobs[bisect_left(jobs, _place(waiting.job))]
        if not jobs:
            del self._lines[key]
        self._of_tenant[tenant] -= 1
        self._bytes[tenant] -= waiting.job.size_bytes
        if not self._of_tenant[tenant]:
            del self._of_tenant[tenant], self._bytes[tenant]
        return waiting

    def able_again(self, able: Callable[[Waiting], frozenset[str]]) -> None:
        """What servers can run has changed: every job that waits is asked about anew."""
        for waiting in list(self._waiting.values()):
            now_able = able(waiting)
            if now_able != waiting.able:
                self.remove(waiting.job.prompt_id)
                waiting.able = now_able
                self.add(waiting)

    def started(self, server: str, waiting: Waiting, forecast: Forecast, now_s: float) -> None:
        """The job runs at the server from now on."""
        before = self.states[server].copy()
        self.running[server] = Running(waiting=waiting, forecast=forecast, since_s=now_s, before=before)

    def ended(self, server: str, *, seconds: float | None, nodes: Mapping[str, float] | None = None) -> None:
        """The server is free again. `seconds` is what the job took, None when it did not come to its end; `nodes` what
        those of its nodes took that did, as far as the server told."""
        running = self.running.pop(server, None)
        if running is None:
            return
        facts, heard = running.waiting.facts, nodes or {}
        if seconds is not None:
            self.states[server].ran(facts)
            if facts is not UNREAD:
                self._lessons += 1
                self._learn(running, seconds, heard)
        elif heard:
            self.states[server].ran(facts, heard.keys())

    def _learn(self, running: Running, seconds: float, nodes: Mapping[str, float]) -> None:
        try:
            self._forecaster.ended(running.waiting.facts, running.before, seconds, nodes)
        except Exception:
            log.exception("the job %s taught nothing", running.waiting.job.prompt_id)

    def forecast(self, facts: JobFacts, state: ServerState, job: str = "") -> Forecast:
        """How long a job takes on a server in this state; a guess where that cannot be said. Never raises."""
        try:
            return _GUESS if facts is UNREAD else self._forecaster.forecast(facts, state)
        except Exception:
            log.exception("the seconds of the job %s on %s are guessed: its forecast failed", job, state.name)
            return _GUESS

    def expected_wait_s(self, now_s: float) -> float:
        """When a job that came now, behind all others, would be begun, roughly."""
        waiting = [self._least(w).mean for w in list(self._waiting.values())[:200]]
        mean = sum(waiting) / len(waiting) if waiting else 0.0
        left = sum(running.left_s(now_s) for running in self.running.values())
        return (left + mean * len(self._waiting)) / max(1, len(self._up))

    def next(self, now_s: float) -> Placement | None:
        """The next job for a server that is free; None while there is none, or the policy would rather wait.

        The job has left the line and is expected to be `started`, or added again.
        """
        for ahead, waiting in enumerate(self._heads(now_s)):
            placed = self._place(waiting, ahead, now_s)
            if placed is not None:
                self.remove(waiting.job.prompt_id)
                if waiting.job.part is None or waiting.attempt:  # the job that it is a part of was charged for it
                    self._shares.charge(waiting.job.tenant, placed.forecast.mean)
                return placed
        return None

    def placed(self, waiting: Waiting, now_s: float) -> Placement | None:
        """The placement of a job that is in no line, if the policy agrees."""
        return self._place(waiting, 0, now_s)

    def _heads(self, now_s: float) -> list[Waiting]:
        """Who is next of those that a free server may run."""
        idle = self.idle
        lines = [self._ranked(line, tenant) for (able, tenant), line in self._lines.items() if able & idle]
        heads = [
            (lower, counter, self._turn(self._waiting[prompt_id], idle, now_s), prompt_id)
            for lower, counter, _, prompt_id in islice(merge(*lines), WINDOW)
        ]
        return [self._waiting[prompt_id] for *_, prompt_id in nsmallest(DEPTH, heads)]

    def _ranked(self, line: _Line, tenant: str) -> Iterator[tuple[float, float, tuple[float, int], str]]:
        """Priority and tenant come before the order of jobs; lower goes first."""
        counter = self._shares.counter(tenant)
        return ((lower, counter, order, prompt_id) for lower, order, prompt_id in line.jobs)

    def _turn(self, waiting: Waiting, idle: AbstractSet[str], now_s: float) -> tuple[float, float]:
        """Where the job stands among others of its tenant and priority.

        By number where its client gave one, before all that have none or behind them; else by how long it has waited
        for each second that it takes on the idle server where it takes least: short ones, and those that find their
        model and results there, pass long ones that have not waited for long. The rest of a job that has begun goes
        first.
        """
        job = waiting.job
        if job.part is not None:
            return -math.inf, 0.0
        if job.number != job.seq:
            return math.copysign(1.0, job.number - job.seq), job.number
        if not self._by_ratio:
            return 0.0, waiting.since_s
        least_s = min(self._on(waiting, name).mean for name in waiting.able & idle)
        return 0.0, (waiting.since_s - now_s) / max(least_s, _LEAST_S)

    def _on(self, waiting: Waiting, server: str) -> Forecast:
        """How long the job takes on the server, as was known when that changed last, or of late: what a few jobs have
        taught makes another forecast of one that waits since there were none, not of one that waits since there were
        thousands."""
        state = self.states[server]
        known = waiting._forecasts.get(server)
        if known is None or known.changes != state.changes or self._lessons > _NEWS * known.lessons:
            forecast = self.forecast(waiting.facts, state, waiting.job.prompt_id)
            known = waiting._forecasts[server] = _Known(state.changes, self._lessons, forecast)
        return known.forecast

    def _place(self, waiting: Waiting, ahead: int, now_s: float) -> Placement | None:
        try:
            return self._chosen(waiting, ahead, now_s)
        except Exception:
            if not waiting.failed:
                log.exception("the job %s cannot be placed; it waits while others go on", waiting.job.prompt_id)
            waiting.failed = True
            return None

    def _chosen(self, waiting: Waiting, ahead: int, now_s: float) -> Placement | None:
        up = sorted(waiting.able & self._up)
        names = [name for name in up if name not in waiting.tried] or up
        if not self.objective.policy.waits:
            names = [name for name in names if name not in self.running]
        if not self.idle.intersection(names):
            return None
        forecasts = [self._on(waiting, name) for name in names]
        least = min(forecasts, key=lambda forecast: forecast.mean)
        view = seen_fleet(
            left_s=[self.running[name].left_s(now_s) if name in self.running else None for name in names],
            last_chosen=[self._last_chosen.get(name, 0) for name in names],
            extra_s=[forecast.mean - least.mean for forecast in forecasts],
        )
        about = seen_call(waiting.job, waiting.facts.key, least, now_s, waited_s=now_s - waiting.since_s, ahead=ahead)
        choice, policy, _ = self.objective.choose(about, view, self._rng)
        server = names[choice.index]
        if choice.hold or server in self.running:
            return None
        self._decisions += 1
        self._last_chosen[server] = self._decisions
        second = second_of(choice)
        decision = Decision(
            call=about.call,
            attempt=waiting.attempt + 1,
            at_s=now_s,
            policy=policy.name,
            parameters=parameters_in(policy),
            replica_id=server,
            runner_up=None if second is None else names[second],
            forecast=forecasts[choice.index],
            candidates=Candidates(
                total=len(names),
                replica_ids=tuple(names),
                in_flight=tuple(view.in_flight.tolist()),
                remaining_work=tuple(view.remaining_work.tolist()),
                context_tokens=(0.0,) * len(names),
                signal_age_s=(None,) * len(names),
                cost_s=None if choice.cost_s is None else tuple(choice.cost_s.tolist()),
                terms_s={name: tuple(values.tolist()) for name, values in choice.terms_s.items()},
                view=kept_fleet(view),
            ),
            note="retry" if waiting.attempt else "",
            workflow=seen_workflow(about),
            waited_s=about.waited_s,
            ahead=ahead,
        )
        return Placement(waiting=waiting, server=server, decision=decision, forecast=forecasts[choice.index])

    def _least(self, waiting: Waiting) -> Forecast:
        names = waiting.able or self.states.keys()
        found = [self._on(waiting, name) for name in names if name in self.states]
        return min(found or [self.forecast(waiting.facts, ServerState(name=""))], key=lambda f: f.mean)


def _place(job: Job) -> tuple[int, tuple[float, int], str]:
    return -job.priority, job.order, job.prompt_id
