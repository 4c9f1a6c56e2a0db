"""Which routing policy gives workflows the shortest tails: baselines at their best settings against ours, simulated.

Without data, workflows are toy ones: good for a look, not for a claim about real traffic. With --prompts, --sessions
and --engine they are drawn from real prompts, sessions and images, with --arrivals also at recorded times. What is done
is kept under --out: the same command goes on where it was stopped. docs/evaluation.md has the definitions.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from eval.experiment import claims as aims
from eval.experiment import options, report, throughput
from eval.experiment.comparison import Comparison, Effort
from eval.experiment.contestants import GROUPS, chosen, contestants
from eval.experiment.grounds import Grounds, grounds
from eval.experiment.pool import Pool
from eval.experiment.tuning import TunedFile, read_tuned, write_tuned
from eval.result import Claim, Row, table, write_result
from eval.workloads.build import DEFAULT_MIX
from eval.workloads.fleets import FLEETS
from swarmx.core.errors import ConfigError

_QUICK = Effort(
    seeds=2, count=250, loads=(0.85,), arrivals=("poisson",), tuning_count=150, horizon_s=100.0, tolerance=0.12,
    unloaded_count=200, quick=True,
)  # fmt: skip
_QUICK_POLICIES = (
    "round_robin", "power_of_two", "least_work", "speed_edf", "sglang_cache_aware",
    "murakkab_mean", "marginal", "marginal/role_means", "marginal/lengths", "oracle", "lower_bound",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for, print the summary, write the result; 2 for options or data that will not do."""
    given = _parser().parse_args(arguments)
    command = " ".join(["python -m eval routing", *(sys.argv[1:] if arguments is None else arguments)])
    return options.status_of(lambda: _compare(given, command), given.out)


def _compare(given: argparse.Namespace, command: str) -> int:
    effort = _effort(given)
    those = chosen(given.policies or (_QUICK_POLICIES if given.quick else GROUPS), contestants())
    capacity = _capacity(given.capacity, effort.fleets)
    ground = _grounds(given, effort)
    tuned_before = read_tuned(given.tuned) if given.tuned else None
    with Pool(ground, given.workers) as pool:
        comparison = Comparison(effort, pool, given.out, any_code=given.stale_ok)
        if stale := comparison.state.stale + comparison.rows.stale:
            print(f"{stale} runs in {given.out} are of other code and not used; --stale-ok does.", file=sys.stderr)
        measured = comparison.measure(capacity)
        tuned = tuned_before or comparison.tune(those, command)
        write_tuned(given.out / "tuned.json", tuned)
        best = report.best_baselines(comparison, tuned, those)
        runs = comparison.compare(those, tuned, comparison.conditions())
        rows = list(report.result_rows(comparison, runs))
        if given.throughput:
            searched, pair = throughput.measure(comparison, those, tuned, runs)
            rows += [*searched, *report.result_rows(comparison, pair, "routing_round_robin")]
    claims = [
        *aims.claims_of(rows, best),
        *throughput.claims_of(rows, [e.name for e in those if e.group == "baselines"]),
    ]
    rows += aims.gap_rows(rows)
    rows += report.summary(runs, best, comparison.slo_s)
    rows += report.about_rows(comparison, measured, tuned)
    remarks = _remarks(comparison, tuned)
    mix = {kind: weight for some in comparison.mixes.values() for kind, weight in some.items()}
    path = write_result(given.out, command, rows, claims, range(effort.seeds), ground.files(mix, effort.arrivals))
    (given.out / "result.md").write_text(report.page(command, remarks, rows, claims), encoding="utf-8")
    report.draw(comparison, runs, rows, best, given.out)
    _show(rows, claims, remarks)
    print(f"Written to {path}.")
    return 0


def _effort(given: argparse.Namespace) -> Effort:
    options.check(given)
    base = _QUICK if given.quick else Effort()
    changes = {
        "fleets": given.fleets, "loads": given.loads, "arrivals": given.arrival_kinds, "kinds": given.kinds,
    }  # fmt: skip
    numbers = {"seeds": given.seeds, "count": given.count, "slo_factor": given.slo_factor, "vary": given.vary}
    if given.capacity_hours is not None:
        numbers["horizon_s"] = given.capacity_hours * 3600.0
    made = {name: tuple(dict.fromkeys(some)) for name, some in changes.items() if some}
    made |= {name: value for name, value in numbers.items() if value is not None}
    effort = msgspec.structs.replace(base, **made)
    if bad := [load for load in effort.loads if not 0.0 < load <= 3.0]:
        raise ConfigError(f"--loads has {bad[0]}, expected shares of capacity: above 0, at most 3.")
    if not (effort.horizon_s > 0.0 and effort.slo_factor > 0.0 and math.isfinite(effort.horizon_s * effort.slo_factor)):
        raise ConfigError("--slo-factor and --capacity-hours must be finite numbers above zero.")
    return effort


def _grounds(given: argparse.Namespace, effort: Effort) -> Grounds:
    sources = options.sources_of(given)
    empty = Grounds(sources=sources)
    empty.check(effort.arrivals)
    mix = {kind: weight for name in effort.fleets for kind, weight in empty.mix(name, effort.kinds).items()}
    return grounds(sources, given.out / "state" / "workloads", mix, effort.arrivals)


def _capacity(texts: Sequence[str], fleets: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            found[name] = float(number)
        except ValueError:
            raise ConfigError(f"--capacity is {text!r}, expected FLEET=WORKFLOWS_PER_SECOND.") from None
        if name not in fleets or not 0.0 < found[name] < math.inf:
            raise ConfigError(f"--capacity is {text!r}, expected a rate above zero for one of {', '.join(fleets)}.")
    return found


def _remarks(comparison: Comparison, tuned: TunedFile) -> list[str]:
    effort, ground = comparison.effort, comparison.pool.grounds
    said = [note for mix in comparison.mixes.values() for note in ground.remarks(mix)]
    if effort.quick:
        said.append(
            "quick: few workflows and seeds, grids cut to two values of two dimensions, capacity from "
            f"{effort.horizon_s:.0f} simulated seconds: it shows that all runs, not who is better"
        )
    if tuned.workload != ground.name:
        said.append(f"settings were tuned on {tuned.workload} workloads, and compared on {ground.name}")
    for fleet in effort.fleets:
        found = {each.load for each in tuned.tuned if each.fleet == fleet}
        if missing := [f"{load:g}" for load in effort.loads if load not in found]:
            said.append(f"{fleet}: at the loads {', '.join(missing)} the settings of the nearest tuned load are used")
    return list(dict.fromkeys(said))


def _show(rows: Sequence[Row], claims: Sequence[Claim], remarks: Sequence[str]) -> None:
    fields = (
        "fleet",
        "load",
        "arrivals",
        "policy",
        "best_baseline",
        "p50_s",
        "p99_s",
        "miss",
        "vs_best",
        "vs_best_low",
        "vs_best_high",
    )
    summary = [row for row in rows if row["experiment"] == "routing_summary"]
    shown: list[Row] = [{field: row.get(field) for field in fields} for row in summary]
    for some in (shown, [row for row in rows if row["experiment"] == "routing_throughput"]):
        if some:
            print(table(some))
    for made in claims:
        print(f"{made.name}: {made.value:.3f} {made.op} {made.aim:g} {'met' if made.met else 'NOT met'}")
    for remark in remarks:
        print(f"Note: {remark}.")


def _parser() -> argparse.ArgumentParser:
    parser = options.parser_of("routing", __doc__)
    add = parser.add_argument
    add("--arrivals", type=Path, help="recorded arrival times")
    add(
        "--arrival-kinds",
        nargs="+",
        help="poisson, bursty, or, with --arrivals, azure_code, azure_conv, mooncake, servegen",
    )
    add("--policies", nargs="+", help="contestants or groups of them: baselines, ours, ablations, bounds")
    add("--fleets", nargs="+", help=", ".join(FLEETS))
    add("--loads", nargs="+", type=float, help="shares of capacity")
    add("--kinds", nargs="+", help=f"workflow kinds, of {', '.join(DEFAULT_MIX)}")
    add("--slo-factor", type=float, help="targets, in unloaded P99s")
    add("--vary", type=float, help="spread of what is invented: 0.5 halves it, 1.5 adds half")
    add("--capacity", nargs="+", default=[], metavar="FLEET=RATE", help="workflows a second, instead of measuring it")
    add("--capacity-hours", type=float, help="of simulated time for which queues must stay bounded; 1")
    add("--throughput", action="store_true", help="after the matrix, search for the highest loads with few misses")
    return parser


if __name__ == "__main__":
    sys.exit(main())
