"""How much a contestant can do: the highest load at which few enough workflows miss their targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from eval.experiment.compare import ratio
from eval.experiment.comparison import Comparison, Condition
from eval.experiment.contestants import OURS, ROLE_MEANS, Contestant
from eval.experiment.jobs import Job, Run
from eval.experiment.measures import missed, missed_of_all
from eval.experiment.tuning import TunedFile
from eval.result import Claim, Row, claim
from eval.workloads.arrivals import Arrivals

LOW, HIGH = 0.05, 1.25
MISSES, FAILING = 0.01, 0.10
VS_BEST, VS_POWER_OF_TWO, VS_ROUND_ROBIN = 1.15, 2.0, 0.385

POWER_OF_TWO, ROUND_ROBIN = "power_of_two", "round_robin"
WITHIN, LEAST = 3.0, 3

Runs = Mapping[tuple[Condition, str], Sequence[Run]]
Place = tuple[str, Arrivals]
"""A fleet and a kind of arrivals."""


@dataclass(slots=True, kw_only=True)
class Search:
    """For one contestant on a fleet: between `low`, where it still keeps to `misses`, and `high`, where it does not.

    Where the search begins, both are taken for granted.
    """

    contestant: str
    fleet: str
    arrivals: Arrivals
    misses: float = MISSES
    low: float = LOW
    high: float = HIGH
    worst_kind: float | None = None

    @property
    def load(self) -> float | None:
        """The highest at which it kept to `misses`; None where it did at none that was tried."""
        return self.low if self.low > LOW else None

    def next_load(self, first: Sequence[float], tolerance: float) -> float | None:
        """Where to look next: at those of `first` that lie in between, then in the middle; None when it is found."""
        between = [load for load in first if self.low < load < self.high]
        if between:
            return between[0]
        return (self.low + self.high) / 2.0 if self.high - self.low > tolerance else None


def measure(
    comparison: Comparison, those: Sequence[Contestant], tuned: TunedFile, compared: Runs
) -> tuple[list[Row], Runs]:
    """Searches for ours, ours with role means, power of two, round robin and the `contenders`, each with at most 1 %
    misses; and for round robin with 10 %, where ours is run, too. The rows, and the runs of that pair.

    `compared` are the runs of the matrix. Its loads are looked at first, as what was run there is in the file.
    """
    effort, known = comparison.effort, {each.name: each for each in those}
    baselines = [each.name for each in those if each.group == "baselines"]
    searches: list[Search] = []
    for fleet in effort.fleets:
        for arrivals in effort.arrivals:
            condition = Condition(fleet=fleet, load=max(effort.loads), arrivals=arrivals)
            misses = {
                name: _misses(compared[condition, name], comparison.slo_s[fleet])
                for name in baselines
                if (condition, name) in compared
            }
            named = dict.fromkeys([OURS, ROLE_MEANS, POWER_OF_TWO, ROUND_ROBIN, *contenders(misses)])
            searches += [Search(contestant=n, fleet=fleet, arrivals=arrivals) for n in named if n in known]
    against = [
        Search(contestant=ROUND_ROBIN, fleet=fleet, arrivals=arrivals, misses=FAILING)
        for fleet in effort.fleets
        for arrivals in effort.arrivals
        if {ROUND_ROBIN, OURS} <= set(known)
    ]

    def jobs_at(each: Search, load: float) -> list[Job]:
        condition = Condition(fleet=each.fleet, load=load, arrivals=each.arrivals)
        return comparison.jobs_at(known[each.contestant], tuned, condition)

    tolerance = 0.1 if effort.quick else 0.02
    search([*searches, *against], jobs_at, comparison.slo_s, comparison.run, first=effort.loads, tolerance=tolerance)
    at = {
        (s.fleet, s.arrivals): Condition(fleet=s.fleet, load=s.load, arrivals=s.arrivals)
        for s in against
        if s.load is not None
    }
    pair = comparison.compare([known[ROUND_ROBIN], known[OURS]] if at else [], tuned, list(at.values()))
    rows = list(rows_of([*searches, *against], comparison.capacity, comparison.pool.grounds.name))
    for place, condition in at.items():
        rows = [_against(row, place, pair[condition, OURS], pair[condition, ROUND_ROBIN]) for row in rows]
    return rows, pair


def contenders(misses: Mapping[str, float]) -> list[str]:
    """The baselines that could turn out to bear the most, by their misses at the highest load that was run: those with
    at most three times the misses of the best, and the best three in any case."""
    ranked = sorted(misses, key=lambda name: (misses[name], name))
    return [name for i, name in enumerate(ranked) if i < LEAST or misses[name] <= WITHIN * misses[ranked[0]]]


def search(
    searches: Sequence[Search],
    jobs_at: Callable[[Search, float], Sequence[Job]],
    slo_s: Mapping[str, Mapping[str, float]],
    run: Callable[[Sequence[Job], str], Sequence[Run]],
    *,
    first: Sequence[float] = (),
    tolerance: float = 0.02,
) -> None:
    """Bisect all of them together, after a look at the loads `first`: `low` and `high` come as near as `tolerance`.

    `jobs_at` are the jobs of one at a load, one a seed; `slo_s` is by fleet and kind. Misses are the share of all
    workflows of all seeds. It is taken for granted that more load means more misses.
    """
    step = 0
    while left := [(s, load) for s in searches if (load := s.next_load(first, tolerance)) is not None]:
        step += 1
        groups = [list(jobs_at(each, load)) for each, load in left]
        done = iter(run([job for group in groups for job in group], f"throughput: step {step}"))
        for (each, load), group in zip(left, groups, strict=True):
            runs = [next(done) for _ in group]
            targets = slo_s[each.fleet]
            if _misses(runs, targets) <= each.misses:
                each.low = load
                each.worst_kind = max(missed(run, kind, targets[kind]) for run in runs for kind in run.latency_s)
            else:
                each.high = load


def rows_of(searches: Sequence[Search], capacity: Mapping[str, float], workload: str) -> Iterator[Row]:
    """One row a search. `fails_at` is the lowest load that was too much, None where none was, and `worst_kind_miss` the
    highest share of a kind in one seed at the load that was found."""
    for each in searches:
        yield {
            "experiment": "routing_throughput", "workload": workload, "fleet": each.fleet, "arrivals": each.arrivals,
            "policy": each.contestant, "misses": each.misses, "load": each.load,
            "fails_at": each.high if each.high < HIGH else None,
            "rate_per_s": None if each.load is None else each.load * capacity[each.fleet],
            "worst_kind_miss": each.worst_kind,
        }  # fmt: skip


def claims_of(rows: Sequence[Row], baselines: Sequence[str]) -> Iterator[Claim]:
    """Ours against the best of the baselines that were searched, against power of two, and against round robin just
    before that fails.

    A baseline that kept to its misses at no load counts as if it did at the lowest that was tried. Nothing is claimed
    where ours did at none, nor against round robin where that did at none.
    """
    mine = [row for row in rows if row["experiment"] == "routing_throughput"]
    loads: dict[str, dict[str, float]] = {}
    for row in mine:
        load = row["load"] if row["load"] is not None or row["policy"] == OURS else row["fails_at"]
        if row["misses"] == MISSES and isinstance(load, float):
            loads.setdefault(f"{row['fleet']},{row['arrivals']}", {})[str(row["policy"])] = load
    for at, by_policy in loads.items():
        if OURS not in by_policy:
            continue
        others = [load for policy, load in by_policy.items() if policy in baselines]
        if others:
            value = by_policy[OURS] / max(others)
            yield claim(f"throughput_at_slo_vs_best_baseline@{at}", value, ">=", VS_BEST)
        if POWER_OF_TWO in by_policy:
            value = by_policy[OURS] / by_policy[POWER_OF_TWO]
            yield claim(f"throughput_at_slo_vs_power_of_two@{at}", value, ">=", VS_POWER_OF_TWO)
    for row in mine:
        there = row.get("p99_vs_round_robin")
        if isinstance(there, float):
            at = f"{row['fleet']},{row['load']:g},{row['arrivals']}"
            yield claim(f"p99_vs_round_robin@{at}", there, "<=", VS_ROUND_ROBIN)


def _misses(runs: Sequence[Run], targets: Mapping[str, float]) -> float:
    """The share of all workflows, mean over seeds."""
    return sum(missed_of_all(run, targets) for run in runs) / len(runs)


def _against(row: Row, place: Place, ours: Sequence[Run], theirs: Sequence[Run]) -> Row:
    """The row of round robin where it fails, with our P99 over its own there; any other as it is."""
    if (row["fleet"], row["arrivals"], row["misses"]) != (*place, FAILING):
        return row
    found = ratio(ours, theirs)
    return {
        **row, "p99_vs_round_robin": found.value, "p99_vs_round_robin_low": found.low,
        "p99_vs_round_robin_high": found.high, "over": found.over, "clusters": found.clusters,
    }  # fmt: skip
