"""A comparison from end to end: capacity, targets, tuning, and the runs that are reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from eval.experiment.capacity import Capacity, capacities, unloaded_p99
from eval.experiment.contestants import Contestant, contestants
from eval.experiment.grids import Settings
from eval.experiment.grounds import TUNING_SEED, Content, Wanted
from eval.experiment.jobs import BOUND, Job, Run, warmup_s
from eval.experiment.pool import Pool
from eval.experiment.store import RunFile
from eval.experiment.tuning import Place, TunedFile, tune
from eval.workloads.arrivals import Arrivals
from eval.workloads.fleets import fleet
from eval.workloads.load import rate_for

_EXAMPLES = 1000


class Effort(msgspec.Struct, frozen=True, kw_only=True):
    """How much is simulated. The defaults are the headline matrix, with 2,000 workflows of the rarest kind.

    `count` workflows a seed; `tuning_count` of each kind of arrivals and each of `tuning_seeds`; capacity to
    `tolerance` over `horizon_s`; targets from `unloaded_count`, times `slo_factor`. `quick` cuts the grids short.
    """

    fleets: tuple[str, ...] = ("heterogeneous", "homogeneous")
    loads: tuple[float, ...] = (0.7, 0.85)
    arrivals: tuple[Arrivals, ...] = ("poisson", "bursty")
    kinds: tuple[str, ...] = ()
    seeds: int = 5
    count: int = 5600
    tuning_count: int = 600
    tuning_seeds: int = 1
    horizon_s: float = 3600.0
    tolerance: float = 0.02
    unloaded_count: int = 3000
    slo_factor: float = 2.0
    vary: float = 1.0
    quick: bool = False


class Condition(msgspec.Struct, frozen=True, kw_only=True):
    """Where contestants are compared."""

    fleet: str
    load: float
    arrivals: Arrivals


class Comparison:
    """One folder of results. What was simulated is kept there and not simulated again: `state/runs.jsonl` has the runs
    of tuning, and those for capacity and targets; `rows.jsonl` has those that are reported."""

    def __init__(self, effort: Effort, pool: Pool, out: Path, *, any_code: bool = False) -> None:
        self.effort, self.pool, self.out = effort, pool, out
        self.state = RunFile(out / "state" / "runs.jsonl", any_code=any_code)
        self.rows = RunFile(out / "rows.jsonl", any_code=any_code)
        self.mixes = {name: pool.grounds.mix(name, effort.kinds) for name in effort.fleets}
        self.capacity: dict[str, float] = {}
        self.unloaded_p99_s: dict[str, dict[str, float]] = {}
        self._tuning_ratio: dict[str, float] = {}

    @property
    def slo_s(self) -> dict[str, dict[str, float]]:
        """The targets by fleet and kind: the same for every policy, load and kind of arrivals."""
        factor = self.effort.slo_factor
        return {name: {kind: factor * p99 for kind, p99 in some.items()} for name, some in self.unloaded_p99_s.items()}

    def measure(self, given: Mapping[str, float]) -> list[Capacity]:
        """Capacity, unless it is `given` in workflows a second, and the targets. Returns what was measured."""
        effort = self.effort
        asked = {name: mix for name, mix in self.mixes.items() if name not in given}
        measured = capacities(
            asked, self.pool.grounds, self._tuning_runs, horizon_s=effort.horizon_s, tolerance=effort.tolerance,
            vary=effort.vary,
        )  # fmt: skip
        self.capacity = {**given, **{each.fleet: each.rate_per_s for each in measured}}
        self.unloaded_p99_s = unloaded_p99(
            self.mixes, self.capacity, self._tuning_runs, count=effort.unloaded_count, vary=effort.vary
        )
        return measured

    def tune(self, those: Sequence[Contestant], command: str) -> TunedFile:
        """The settings of these contestants, and of those whose settings they take, at every fleet and load."""
        known = contestants()
        needed = dict.fromkeys([*those, *(known[each.like] for each in those if each.like is not None)])
        places: list[Place] = [(fleet, load) for fleet in self.effort.fleets for load in self.effort.loads]
        found = tune(list(needed), places, self._tuning_jobs, self._tuning_runs, quick=self.effort.quick)
        return TunedFile(workload=self.pool.grounds.name, command=command, tuned=found)

    def conditions(self) -> list[Condition]:
        """The matrix."""
        effort = self.effort
        return [
            Condition(fleet=fleet, load=load, arrivals=arrivals)
            for fleet in effort.fleets
            for load in effort.loads
            for arrivals in effort.arrivals
        ]

    def compare(
        self, those: Sequence[Contestant], tuned: TunedFile, conditions: Sequence[Condition]
    ) -> dict[tuple[Condition, str], list[Run]]:
        """The runs of each contestant under each condition, seed by seed, on the evaluation split."""
        groups: dict[tuple[Condition, str], list[Job]] = {}
        for condition in conditions:
            for each in those:
                if jobs := self.jobs_at(each, tuned, condition):
                    groups[condition, each.name] = jobs
        done = iter(self.run([job for group in groups.values() for job in group], "comparison"))
        return {key: [next(done) for _ in group] for key, group in groups.items()}

    def jobs_at(self, each: Contestant, tuned: TunedFile, condition: Condition) -> list[Job]:
        """One a seed, with the settings of the nearest load that was tuned; none for an ablation of what these settings
        do without."""
        settings: Settings | None = Settings()
        if each.policy != BOUND:
            settings = each.settled(tuned.settings(each.like or each.name, condition.fleet, condition.load))
        if settings is None:
            return []
        return [self._job(each, settings, condition, seed, tuning=False) for seed in range(self.effort.seeds)]

    def run(self, jobs: Sequence[Job], what: str) -> list[Run]:
        """On the evaluation split."""
        return self.pool.run(jobs, self.rows, what)

    def _tuning_runs(self, jobs: Sequence[Job], what: str) -> list[Run]:
        return self.pool.run(jobs, self.state, what)

    def _tuning_jobs(self, each: Contestant, settings: Settings, fleet: str, load: float) -> list[Job]:
        return [
            self._job(each, settings, Condition(fleet=fleet, load=load, arrivals=arrivals), seed, tuning=True)
            for arrivals in self.effort.arrivals
            for seed in range(self.effort.tuning_seeds)
        ]

    def _rate(self, fleet_name: str, tuning: bool) -> float:
        """Workflows a second that are the capacity; of the tuning split, those that load the busiest model as much."""
        rate = self.capacity[fleet_name]
        if not tuning:
            return rate
        if fleet_name not in self._tuning_ratio:
            on_paper = []
            for part in (True, False):
                content = Content(
                    tuning=part, count=_EXAMPLES, seed=TUNING_SEED, mix=dict(self.mixes[fleet_name]),
                    vary=self.effort.vary,
                )  # fmt: skip
                built = self.pool.grounds.build(Wanted(content=content, arrivals="poisson", rate_per_s=1.0))
                on_paper.append(rate_for(built, fleet(fleet_name), 1.0))
            self._tuning_ratio[fleet_name] = on_paper[0] / on_paper[1]
        return rate * self._tuning_ratio[fleet_name]

    def _job(self, each: Contestant, settings: Settings, condition: Condition, seed: int, *, tuning: bool) -> Job:
        effort = self.effort
        content = Content(
            tuning=tuning, count=effort.tuning_count if tuning else effort.count,
            seed=seed + TUNING_SEED if tuning else seed, mix=dict(self.mixes[condition.fleet]), vary=effort.vary,
        )  # fmt: skip
        rate_per_s = condition.load * self._rate(condition.fleet, tuning)
        wanted = Wanted(content=content, arrivals=condition.arrivals, rate_per_s=rate_per_s)
        return Job(
            workload=wanted, fleet=condition.fleet, policy=each.policy, parameters=settings.parameters,
            late_binding=settings.late_binding, forecast=each.forecast, path=settings.path,
            order=settings.order,
            targets=self.slo_s[condition.fleet],
            warmup_s=warmup_s(wanted),
        )  # fmt: skip
