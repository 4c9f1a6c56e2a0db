"""How much a contestant can do: the highest load at which few enough workflows miss their targets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from eval.experiment.contestants import OURS
from eval.experiment.jobs import Job, Run
from eval.experiment.measures import missed, missed_of_all
from eval.result import Claim, Row, claim
from eval.workloads.arrivals import Arrivals

LOW, HIGH = 0.05, 1.25
MISSES = 0.01
VS_BEST, VS_POWER_OF_TWO = 1.15, 2.0


@dataclass(slots=True, kw_only=True)
class Search:
    """For one contestant on a fleet: between `low`, where it still keeps to `misses`, and `high`, where it does not."""

    contestant: str
    fleet: str
    arrivals: Arrivals
    misses: float = MISSES
    low: float = LOW
    high: float = HIGH
    worst_kind: float | None = None

    @property
    def middle(self) -> float:
        return (self.low + self.high) / 2.0


def search(
    searches: Sequence[Search],
    jobs_at: Callable[[Search], Sequence[Job]],
    slo_s: Mapping[str, Mapping[str, float]],
    run: Callable[[Sequence[Job], str], Sequence[Run]],
    tolerance: float = 0.02,
) -> None:
    """Bisect all of them together: `low` and `high` come as near as `tolerance`.

    `jobs_at` are the jobs of one at its middle load, one a seed; `slo_s` is by fleet and kind. Misses are the share of
    all workflows of all seeds. It is taken for granted that more load means more misses. Who fails at the lowest load
    that is tried, or never, ends at a bound of the search.
    """
    for number in range(math.ceil(math.log2((HIGH - LOW) / tolerance))):
        groups = [list(jobs_at(each)) for each in searches]
        done = iter(run([job for group in groups for job in group], f"throughput: step {number + 1}"))
        for each, group in zip(searches, groups, strict=True):
            runs = [next(done) for _ in group]
            targets = slo_s[each.fleet]
            share = sum(missed_of_all(run, targets) for run in runs) / len(runs)
            if share <= each.misses:
                each.low = each.middle
                each.worst_kind = max(missed(run, kind, targets[kind]) for run in runs for kind in run.latency_s)
            else:
                each.high = each.middle


def rows_of(searches: Sequence[Search], capacity: Mapping[str, float], workload: str) -> Iterator[Row]:
    """One row a search. `worst_kind_miss` is the highest share of a kind in one seed at the load that was found."""
    for each in searches:
        yield {
            "experiment": "routing_throughput", "workload": workload, "fleet": each.fleet, "arrivals": each.arrivals,
            "policy": each.contestant, "misses": each.misses, "load": each.low,
            "rate_per_s": each.low * capacity[each.fleet], "at_bound": each.low == LOW or each.high == HIGH,
            "worst_kind_miss": each.worst_kind,
        }  # fmt: skip


def claims_of(rows: Sequence[Row], baselines: Sequence[str]) -> Iterator[Claim]:
    """Ours against the best of the baselines that were searched, and against power of two."""
    loads: dict[tuple[object, object], dict[str, float]] = {}
    for row in rows:
        if row["experiment"] == "routing_throughput" and row["misses"] == MISSES:
            place = loads.setdefault((row["fleet"], row["arrivals"]), {})
            place[str(row["policy"])] = float(str(row["load"]))
    for (fleet, arrivals), by_policy in loads.items():
        if OURS not in by_policy:
            continue
        others = [load for policy, load in by_policy.items() if policy in baselines]
        if others:
            value = by_policy[OURS] / max(others)
            yield claim(f"throughput_at_slo_vs_best_baseline@{fleet},{arrivals}", value, ">=", VS_BEST)
        if "power_of_two" in by_policy:
            value = by_policy[OURS] / by_policy["power_of_two"]
            yield claim(f"throughput_at_slo_vs_power_of_two@{fleet},{arrivals}", value, ">=", VS_POWER_OF_TWO)
