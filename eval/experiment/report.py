"""What a comparison leaves: rows, a summary with intervals, claims, plots, and a page to read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

from eval.experiment import plots
from eval.experiment.capacity import Capacity
from eval.experiment.compare import ratio
from eval.experiment.comparison import Comparison, Condition
from eval.experiment.contestants import Contestant
from eval.experiment.jobs import BOUND, Run
from eval.experiment.measures import missed_of_all, overall, quantile, rows_of, without_infinities
from eval.experiment.tuning import TunedFile
from eval.result import Claim, Row, table

Runs = Mapping[tuple[Condition, str], Sequence[Run]]

SHOWN = ("round_robin", "power_of_two", "least_work", "speed_edf", "marginal", "oracle", BOUND)
"""The contestants in plots, beside the best baseline."""


def result_rows(comparison: Comparison, runs: Runs, experiment: str = "routing") -> Iterator[Row]:
    """Flat rows by contestant, condition, seed and kind."""
    workload = comparison.pool.grounds.name
    for (condition, name), some in runs.items():
        for run in some:
            about: Row = {
                "experiment": experiment, "workload": workload, "fleet": condition.fleet, "load": condition.load,
                "arrivals": condition.arrivals, "policy": name,
            }  # fmt: skip
            for row in rows_of(run, about, comparison.slo_s[condition.fleet], comparison.effort.slo_factor):
                yield without_infinities(row)


def summary(runs: Runs, best: Mapping[tuple[str, float], str], slo_s: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """One row a condition and contestant: medians over seeds with their range, and the ratio to the best baseline."""
    rows: list[Row] = []
    for (condition, name), some in runs.items():
        p99_s = [overall(run, 0.99) for run in some]
        theirs = runs.get((condition, best.get((condition.fleet, condition.load), "")))
        row: dict[str, str | int | float | bool | None] = {
            "experiment": "routing_summary", "fleet": condition.fleet, "load": condition.load,
            "arrivals": condition.arrivals, "policy": name,
            "best_baseline": name == best.get((condition.fleet, condition.load)), "seeds": len(some),
            "p50_s": median(overall(run, 0.5) for run in some), "p99_s": median(p99_s), "p99_least_s": min(p99_s),
            "p99_most_s": max(p99_s),
        }  # fmt: skip
        for kind in sorted(some[0].latency_s):
            row[f"p99_s {kind}"] = median(quantile(run, kind, 0.99) for run in some)
        row["miss"] = median(missed_of_all(run, slo_s[condition.fleet]) for run in some)
        if theirs is not None:
            found = ratio(some, theirs)
            row |= {
                "vs_best": found.value, "vs_best_low": found.low, "vs_best_high": found.high, "over": found.over,
                "clusters": found.clusters,
            }  # fmt: skip
        rows.append(without_infinities(row))
    return rows


def about_rows(comparison: Comparison, measured: Sequence[Capacity], tuned: TunedFile) -> Iterator[Row]:
    """Capacities, targets and tuned settings."""
    workload = comparison.pool.grounds.name
    found = {each.fleet: each for each in measured}
    for fleet, rate_per_s in comparison.capacity.items():
        yield {
            "experiment": "routing_capacity", "workload": workload, "fleet": fleet, "rate_per_s": rate_per_s,
            "measured": fleet in found, "on_paper": found[fleet].on_paper if fleet in found else None,
            "horizon_s": comparison.effort.horizon_s, "tolerance": comparison.effort.tolerance,
        }  # fmt: skip
        for kind, seconds in comparison.unloaded_p99_s[fleet].items():
            yield {
                "experiment": "routing_target", "workload": workload, "fleet": fleet, "kind": kind,
                "unloaded_p99_s": seconds, "slo_s": comparison.slo_s[fleet][kind],
            }  # fmt: skip
    for each in tuned.tuned:
        yield {
            "experiment": "routing_tuned", "workload": workload, "fleet": each.fleet, "load": each.load,
            "policy": each.contestant, "late_binding": each.settings.late_binding, "path": each.settings.path,
            "parameters": " ".join(f"{name}={value:g}" for name, value in each.settings.parameters.items()),
            "tuning_p99_s": each.score, "searched": each.searched,
        }  # fmt: skip


def page(command: str, remarks: Sequence[str], rows: Sequence[Row], claims: Sequence[Claim]) -> str:
    """The summary as Markdown: what has to be said, the claims, and each table by itself. Single runs are left out."""
    parts = [f"`{command}`", *(f"Note: {remark}." for remark in remarks)]
    if claims:
        verdicts: list[Row] = [
            {"claim": c.name, "value": c.value, "aim": f"{c.op} {c.aim:g}", "met": c.met} for c in claims
        ]
        parts += ["## Claims", table(verdicts)]
    titles = {
        "routing_summary": "P99 in seconds: geometric mean over kinds, median over seeds",
        "routing_gap": "What perfect lengths would save",
        "routing_throughput": "Highest load", "routing_capacity": "Capacity", "routing_target": "Targets",
        "routing_tuned": "Tuned settings",
    }  # fmt: skip
    for experiment, title in titles.items():
        some: list[Row] = [
            {name: value for name, value in row.items() if name not in ("experiment", "workload")}
            for row in rows
            if row["experiment"] == experiment
        ]
        if some:
            parts += [f"## {title}", table(some)]
    return "\n\n".join(parts) + "\n"


def draw(
    comparison: Comparison, runs: Runs, rows: Sequence[Row], best: Mapping[tuple[str, float], str], out: Path
) -> None:
    """The plots, with what the data is in every title."""
    name, effort = comparison.pool.grounds.name, comparison.effort
    about = f"{name} workloads{', quick' if effort.quick else ''}"
    for condition in dict.fromkeys(condition for condition, _ in runs):
        shown = dict.fromkeys([*SHOWN, best.get((condition.fleet, condition.load), "")])
        some = {policy: runs[condition, policy] for policy in shown if (condition, policy) in runs}
        if some:
            where = f"{condition.fleet}, {condition.load:g} of capacity, {condition.arrivals}"
            file = out / f"latency-{condition.fleet}-{condition.load:g}-{condition.arrivals}.png"
            plots.cdfs(some, comparison.slo_s[condition.fleet], f"{where} ({about})", file)
    shown_names = list(dict.fromkeys([*SHOWN, *best.values()]))
    plots.p99_by_load(rows, shown_names, f"P99, geometric mean over kinds ({about})", out / "p99-by-load.png")
    if any(row["experiment"] == "routing_throughput" for row in rows):
        plots.throughput(rows, f"Highest load with few misses ({about})", out / "throughput.png")


def best_baselines(
    comparison: Comparison, tuned: TunedFile, those: Sequence[Contestant]
) -> dict[tuple[str, float], str]:
    """By fleet and load, as the tuning split has it."""
    places = [(fleet, load) for fleet in comparison.effort.fleets for load in comparison.effort.loads]
    found = {place: tuned.best(*place, those) for place in places}
    return {place: name for place, name in found.items() if name is not None}
