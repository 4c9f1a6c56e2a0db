"""How routing and its simulator scale: calls a minute, CPU of a decision, and many routers with stale signals.

(a) The simulator: calls a minute of one core, for fleets of 10 to 10,000 replicas. (b) A decision: CPU of the default
and of our policy, for 10 to 1,000 replicas. (c) Sixteen routers that hear of replicas late, each of which may send
calls to all of them ("shared") or decides for the models that hash to it ("owned"), against one router with fresh
signals. `--part stale` is (c) alone: twelve simulations for the first seed, eleven for each further one.
Without data, workflows are toy ones.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from statistics import median

import msgspec

from eval import decision
from eval.experiment import options
from eval.experiment.capacity import unloaded_p99
from eval.experiment.contestants import OURS
from eval.experiment.grids import Settings
from eval.experiment.grounds import Content, Grounds, Wanted, grounds
from eval.experiment.jobs import Job, Run, Signals, replicas_of, run_job, warmup_s
from eval.experiment.measures import ALL, rows_of, without_infinities
from eval.experiment.pool import Pool
from eval.experiment.store import RunFile
from eval.experiment.tuning import read_tuned
from eval.result import Claim, Row, claim, table, write_result
from eval.workloads.fleets import fleet
from eval.workloads.load import rate_for
from swarmx.core.errors import ConfigError

FLEET, LOAD = "heterogeneous", 0.7
ROUTERS = 16
PARTS = ("speed", "decision", "stale")
AGES_S: Mapping[str, Sequence[float]] = {OURS: (1.0, 5.0), "least_outstanding": (5.0,)}
"""How old signals are, by policy: what the aims ask about."""

SPEED_AIM, STALE_AIM, JAIN_AIM = 100_000.0, 1.05, 0.9
"""The last, of Jain's index of the slowdowns of a kind's workflows, is the evaluation's own: no issue names one."""


class Effort(msgspec.Struct, frozen=True, kw_only=True):
    """How much is simulated; `calls_each` calls a replica, and at least `calls`, for the speed of the simulator."""

    sizes: tuple[int, ...] = (10, 100, 1000, 10_000)
    calls: int = 20_000
    calls_each: int = 20
    decisions: int = 5000
    decision_sizes: tuple[int, ...] = (10, 32, 100, 1000)
    seeds: int = 3
    count: int = 3000
    unloaded_count: int = 1000


_QUICK = Effort(
    sizes=(10, 100, 1000), calls=3000, calls_each=5, decisions=500, seeds=1, count=200, unloaded_count=100
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all three or some, print the tables, write the result; 2 for options or data that will not do."""
    given = _parser().parse_args(arguments)
    command = " ".join(["python -m eval scale", *(sys.argv[1:] if arguments is None else arguments)])
    return options.status_of(lambda: _measure(given, command), given.out)


def _measure(given: argparse.Namespace, command: str) -> int:
    options.check(given)
    effort = _QUICK if given.quick else Effort()
    numbers = {"seeds": given.seeds, "count": given.count, "sizes": tuple(given.sizes) if given.sizes else None}
    effort = msgspec.structs.replace(effort, **{name: value for name, value in numbers.items() if value is not None})
    if min(effort.sizes) < 1:
        raise ConfigError(f"--sizes has {min(effort.sizes)}, expected at least 1.")
    sources = options.sources_of(given)
    mix = Grounds(sources=sources).mix(FLEET)
    ground = grounds(sources, given.out / "state" / "workloads", mix, ["poisson"])
    parts: Sequence[str] = given.part or PARTS
    rows: list[Row] = []
    if "speed" in parts:
        rows += speed(effort, ground, mix)
    if "decision" in parts:
        rows += decisions(effort)
    if "stale" in parts:
        settings = {policy: Settings() for policy in AGES_S}
        if given.tuned:
            file = read_tuned(given.tuned)
            settings = {policy: file.settings(policy, FLEET, LOAD) for policy in AGES_S}
        with Pool(ground, given.workers) as pool:
            rows += stale(effort, pool, RunFile(given.out / "rows.jsonl", any_code=given.stale_ok), mix, settings)
    claims = list(claims_of(rows))
    path = write_result(given.out, command, rows, claims, range(effort.seeds), ground.files(mix, ["poisson"]))
    for part in parts:
        shown = [_shown(row) for row in rows if row["experiment"] == f"scale_{part}" and row.get("kind", ALL) == ALL]
        print(table(shown), end="\n\n")
    for made in claims:
        print(f"{made.name}: {made.value:.3f} {made.op} {made.aim:g} {'met' if made.met else 'NOT met'}")
    for remark in [*ground.remarks(mix), *(["quick: it shows that all runs"] if given.quick else [])]:
        print(f"Note: {remark}.")
    print(f"Written to {path}.")
    return 0


def speed(effort: Effort, ground: Grounds, mix: Mapping[str, float]) -> Iterator[Row]:
    """One simulation a size and policy, in this process, at `LOAD` on paper."""
    example = ground.build(_wanted(mix, 1.0, 300))
    calls_each = example.calls / len(example.workflows)
    for size in effort.sizes:
        for policy in (OURS, "least_work"):
            job = Job(workload=_wanted(mix, 1.0, 300), fleet=FLEET, replicas=size, policy=policy, forecast="neural")
            count = max(20, round(max(effort.calls, effort.calls_each * size) / calls_each))
            rate = rate_for(example, replicas_of(job), LOAD)
            run = run_job(msgspec.structs.replace(job, workload=_wanted(mix, rate, count)), ground)
            yield {
                "experiment": "scale_speed", "workload": ground.name, "policy": policy,
                "replicas": len(replicas_of(job)), "calls": run.calls, "cpu_s": run.cpu_s,
                "calls_per_minute": run.calls / run.cpu_s * 60.0,
                "cpu_us_per_call": run.cpu_s / run.calls * 1e6, "simulated_s": run.span_s + run.drained_s,
            }  # fmt: skip


def decisions(effort: Effort) -> Iterator[Row]:
    """As `python -m eval.decision` measures them."""
    for replicas in effort.decision_sizes:
        for policy in (OURS, "least_work"):
            yield {
                **decision.measure(policy, replicas=replicas, calls=effort.decisions, seed=0),
                "experiment": "scale_decision",
            }


def stale(
    effort: Effort, pool: Pool, runs: RunFile, mix: Mapping[str, float], settings: Mapping[str, Settings]
) -> Iterator[Row]:
    """One fresh router, and sixteen with signals of each age, shared and owned; shared ones also bind early.

    The rate is `LOAD` on paper, and targets are twice the unloaded P99.
    """
    rate = rate_for(pool.grounds.build(_wanted(mix, 1.0, 1000)), fleet(FLEET), LOAD)
    p99_s = unloaded_p99(
        {FLEET: mix}, {FLEET: rate / LOAD}, lambda jobs, what: pool.run(jobs, runs, what), count=effort.unloaded_count
    )[FLEET]
    slo_s = {kind: 2.0 * seconds for kind, seconds in p99_s.items()}
    jobs = [
        Job(
            workload=wanted, fleet=FLEET, policy=policy,
            parameters=settings[policy].parameters, late_binding=late and settings[policy].late_binding,
            forecast="neural" if policy == OURS else "role_means", path=settings[policy].path, targets=slo_s,
            signals=signals, warmup_s=warmup_s(wanted),
        )
        for wanted in (_wanted(mix, rate, effort.count, seed) for seed in range(effort.seeds))
        for policy, ages_s in AGES_S.items()
        for signals, late in _ways(ages_s)
    ]  # fmt: skip
    for run in pool.run(jobs, runs, "stale signals"):
        yield from _rows(run, pool.grounds.name, slo_s)


def _ways(ages_s: Sequence[float]) -> Iterator[tuple[Signals, bool]]:
    """How many routers know what, and whether calls are bound late."""
    yield Signals(), True
    for age_s in ages_s:
        yield Signals(routers=ROUTERS, ownership="owned", age_s=age_s), True
        yield Signals(routers=ROUTERS, ownership="shared", age_s=age_s), True
        yield Signals(routers=ROUTERS, ownership="shared", age_s=age_s), False


def _rows(run: Run, workload: str, slo_s: Mapping[str, float]) -> Iterator[Row]:
    signals = run.job.signals
    about: Row = {
        "experiment": "scale_stale", "workload": workload, "fleet": FLEET, "load": LOAD, "arrivals": "poisson",
        "policy": run.job.policy, "routers": signals.routers, "ownership": signals.ownership,
        "signal_age_s": signals.age_s,
    }  # fmt: skip
    for row in rows_of(run, about, slo_s, 2.0):
        yield without_infinities(row)


def claims_of(rows: Sequence[Row]) -> Iterator[Claim]:
    """What the rows say about the aims."""
    for row in rows:
        if row["experiment"] == "scale_speed" and row["policy"] == "least_work" and _near(row["replicas"], 100):
            yield claim("simulated_calls_per_minute@100", _number(row["calls_per_minute"]), ">=", SPEED_AIM)
        if row["experiment"] == "scale_decision" and row["replicas"] == 1000:
            at = "" if row["policy"] == OURS else f",{row['policy']}"
            yield claim(f"decision_p99_ms@1000{at}", _number(row["cpu_p99_ms"]), "<", 1.0)
    fresh = _p99(rows, OURS, 1, "shared", 0.0)
    if (value := _ratio(_p99(rows, OURS, ROUTERS, "owned", 1.0), fresh)) is not None:
        yield claim("p99_at_stale_1s", value, "<=", STALE_AIM)
    # Of its ways to be run with stale signals, the best is what ours has to keep up with.
    others = [_p99(rows, "least_outstanding", ROUTERS, how, 5.0) for how in ("owned", "shared")]
    ratios = [_ratio(_p99(rows, OURS, ROUTERS, "owned", 5.0), other) for other in others]
    if known := [value for value in ratios if value is not None]:
        yield claim("p99_at_stale_5s_vs_least_outstanding", max(known), "<=", 1.0)
    evenness = [_number(row["jain_slowdown"]) for row in _stale(rows, OURS, ROUTERS, "owned", 1.0)]
    if evenness:
        yield claim("jain_index@owned,1s", median(evenness), ">=", JAIN_AIM)


def _stale(rows: Sequence[Row], policy: str, routers: int, ownership: str, age_s: float) -> Iterator[Row]:
    for row in rows:
        if row["experiment"] != "scale_stale" or row["kind"] != ALL or row["policy"] != policy:
            continue
        if (row["routers"], row["ownership"], row["signal_age_s"]) == (routers, ownership, age_s):
            yield row


def _p99(rows: Sequence[Row], policy: str, routers: int, ownership: str, age_s: float) -> dict[object, float]:
    """By seed; the better of early and late binding where both were run."""
    found: dict[object, float] = {}
    for row in _stale(rows, policy, routers, ownership, age_s):
        if row["p99_s"] is not None:
            found[row["seed"]] = min(_number(row["p99_s"]), found.get(row["seed"], float("inf")))
    return found


def _ratio(ours: Mapping[object, float], theirs: Mapping[object, float]) -> float | None:
    both = [ours[seed] / theirs[seed] for seed in ours if seed in theirs]
    return median(both) if both else None


def _wanted(mix: Mapping[str, float], rate_per_s: float, count: int, seed: int = 0) -> Wanted:
    content = Content(tuning=False, count=count, seed=seed, mix=dict(mix))
    return Wanted(content=content, arrivals="poisson", rate_per_s=rate_per_s)


def _shown(row: Row) -> Row:
    if row["experiment"] != "scale_stale":
        return {name: value for name, value in row.items() if name not in ("experiment", "workload", "seed")}
    fields = (
        "policy", "routers", "ownership", "signal_age_s", "late_binding", "seed", "p50_s", "p99_s", "miss",
        "jain_slowdown", "jain",
    )  # fmt: skip
    return {field: row[field] for field in fields}


def _near(value: object, size: int) -> bool:
    return abs(_number(value) - size) <= 0.1 * size


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)


def _parser() -> argparse.ArgumentParser:
    parser = options.parser_of("scale", __doc__)
    parser.add_argument("--part", nargs="+", choices=PARTS, help="only these")
    parser.add_argument("--sizes", nargs="+", type=int, help="replicas, for the speed of the simulator")
    return parser


if __name__ == "__main__":
    sys.exit(main())
