"""Which job goes to which server next: one line for all servers, asked when a server is free. Pure.

The policies are those of the router. They see a server as a serial replica whose unit of work is a second: what the
job at hand would take where it takes least is its work, and what another server would need beyond that (a model to
load, nodes whose results it does not hold, a slower device) is the prompt that it has to read first.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from heapq import merge, nsmallest
from itertools import islice
from typing import NamedTuple

import msgspec
import numpy as np

from swarmx.agents.choice import second_of
from swarmx.agents.kept_view import fixed_columns, fixed_row, keep
from swarmx.agents.objective import Objective, parameters_in
from swarmx.agents.shares import Shares
from swarmx.compat.comfyui.drafts import facts_of
from swarmx.compat.comfyui.forecasts import JobFacts, JobForecaster, ServerState
from swarmx.compat.comfyui.jobs import Job
from swarmx.core.engine import EngineProfile
from swarmx.core.fleet import CallView, FleetView, WorkflowView
from swarmx.core.forecast import Forecast
from swarmx.core.nouns import Call, Candidates, Decision, SeenWorkflow

DEPTH = 8  # jobs that are asked about before the rest of a line waits for them
WINDOW = 64  # jobs at the head of all lines that may go in another order than they came
_NEWS = 1.2
_LEAST_S = 1e-3

_PROFILE = EngineProfile(model="comfyui", device="server", step_base_s=1.0, max_batch=1)
_FIXED = fixed_row(_PROFILE)


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
    _facts: JobFacts | None = None
    _forecasts: dict[str, _Known] = field(default_factory=dict)

    @property
    def facts(self) -> JobFacts:
        """Read from the graph when it is first asked for: most jobs wait a while before they are."""
        if self._facts is None:
            self._facts = facts_of(self.job)
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
        if not self._of_tenant[tenant]:
            del self._of_tenant[tenant]
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
        self._lessons += seconds is not None
        if seconds is not None:
            self._forecaster.ended(facts, running.before, seconds, heard)
            self.states[server].ran(facts)
        elif heard:
            self.states[server].ran(facts, heard.keys())

    def forecast(self, facts: JobFacts, state: ServerState) -> Forecast:
        """How long a job takes on a server in this state."""
        return self._forecaster.forecast(facts, state)

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
            forecast = self._forecaster.forecast(waiting.facts, state)
            known = waiting._forecasts[server] = _Known(state.changes, self._lessons, forecast)
        return known.forecast

    def _place(self, waiting: Waiting, ahead: int, now_s: float) -> Placement | None:
        up = sorted(waiting.able & self._up)
        names = [name for name in up if name not in waiting.tried] or up
        if not self.objective.policy.waits:
            names = [name for name in names if name not in self.running]
        if not self.idle.intersection(names):
            return None
        forecasts = [self._on(waiting, name) for name in names]
        least = min(forecasts, key=lambda forecast: forecast.mean)
        view = self._view(names, [forecast.mean - least.mean for forecast in forecasts], now_s)
        call = _call(waiting)
        about = CallView(
            call=call,
            forecast=least,
            workflow=_alone(waiting, least.mean, now_s),
            now_s=now_s,
            waited_s=now_s - waiting.since_s,
            ahead=ahead,
        )
        choice, policy, _ = self.objective.choose(about, view, self._rng)
        server = names[choice.index]
        if choice.hold or server in self.running:
            return None
        self._decisions += 1
        self._last_chosen[server] = self._decisions
        second = second_of(choice)
        decision = Decision(
            call=call,
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
                view=keep(
                    view, slice(None), fixed_columns([_fixed_of(extra) for extra in view.prefill_token_s.tolist()])
                ),
            ),
            note="retry" if waiting.attempt else "",
            workflow=_seen(about.workflow),
            waited_s=about.waited_s,
            ahead=ahead,
        )
        return Placement(waiting=waiting, server=server, decision=decision, forecast=forecasts[choice.index])

    def _least(self, waiting: Waiting) -> Forecast:
        names = waiting.able or self.states.keys()
        found = [self._on(waiting, name) for name in names if name in self.states]
        return min(found or [self._forecaster.forecast(waiting.facts, ServerState(name=""))], key=lambda f: f.mean)

    def _view(self, names: list[str], extra_s: Iterable[float], now_s: float) -> FleetView:
        count = len(names)
        busy = np.array([name in self.running for name in names], dtype=np.int64)
        left = np.array([self.running[n].left_s(now_s) if n in self.running else 0.0 for n in names])
        zero, one = np.zeros(count), np.ones(count)
        return FleetView(
            in_flight=busy,
            last_chosen=np.array([self._last_chosen.get(name, 0) for name in names], dtype=np.int64),
            max_batch=np.ones(count, dtype=np.int64),
            remaining_work=left,
            work_variance=zero,
            weight=busy.astype(np.float64),
            context_tokens=zero,
            prefill_tokens=zero,
            unread_tokens=zero,
            shared_tokens=zero,
            cached_tokens=zero,
            prefill_share=zero,
            slowdown=one,
            kv_capacity_tokens=one * _PROFILE.kv_capacity_tokens,
            max_step_tokens=one * _PROFILE.max_step_tokens,
            cost_weight=one,
            call_base_s=zero,
            step_base_s=one,
            decode_seq_s=zero,
            decode_ctx_token_s=zero,
            prefill_token_s=np.array(list(extra_s)),
            prefill_ctx_token_s=zero,
            running=busy.astype(np.float64),
            waiting=zero,
            kv_usage=zero,
            signal_age_s=zero,
        )


def _place(job: Job) -> tuple[int, tuple[float, int], str]:
    return -job.priority, job.order, job.prompt_id


def _fixed_of(extra_s: float) -> bytes:
    return fixed_row(msgspec.structs.replace(_PROFILE, prefill_token_s=extra_s)) if extra_s else _FIXED


def _call(waiting: Waiting) -> Call:
    job = waiting.job
    return Call(
        call_id=job.prompt_id,
        tenant=job.tenant,
        kind="image",
        model="comfyui",
        role="graph",
        workflow_id=job.prompt_id,
        workflow_kind="comfyui",
        node="" if job.part is None else f"part {job.part.number + 1}",
        prompt_key=waiting.facts.key,
        prompt_bytes=0,
        prompt_tokens=1,
        work_limit=0.0,
        priority=job.priority,
    )


def _seen(alone: WorkflowView) -> SeenWorkflow:
    return SeenWorkflow(**{name: getattr(alone, name) for name in SeenWorkflow.__struct_fields__})


def _alone(waiting: Waiting, least_s: float, now_s: float) -> WorkflowView:
    """A job is a workflow of one call."""
    return WorkflowView(
        kind="comfyui",
        age_s=now_s - waiting.job.created_s,
        target_s=0.0,
        remaining_s=least_s,
        attained_s=0.0,
        attained_work=0.0,
        calls=0,
        past_s=np.zeros(0),
    )
