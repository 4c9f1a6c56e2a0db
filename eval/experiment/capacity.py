"""How much a fleet can do, and how long workflows take when it does little: loads and targets follow from both."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import msgspec

from eval.experiment.grounds import TUNING_SEED, Content, Grounds, Wanted
from eval.experiment.jobs import Job, Run
from eval.experiment.measures import quantile
from eval.workloads.fleets import fleet
from eval.workloads.load import rate_for
from swarmx.core.errors import ConfigError

GROWTH, PATIENCE_S = 1.25, 900.0
LOW, HIGH = 0.5, 1.4
"""Where capacity is looked for, as multiples of the rate that fills the busiest model on paper."""

UNLOADED = 0.05
"""The load at which a fleet counts as empty."""

DoJobs = Callable[[Sequence[Job], str], Sequence[Run]]


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """Workflows a second; `tried` says of each rate whether the queues stayed bounded. `on_paper` was the guess."""

    fleet: str
    rate_per_s: float
    on_paper: float
    tried: dict[str, bool]


def bounded(run: Run) -> bool:
    """Whether queues did not grow: of every kind, workflows that came in the last third of the time were at most 1.25
    times as slow in the mean, against an empty system, as those of the middle third; and all ended within 15 minutes of
    the last arrival, none refused. A queue that grows steadily passes 1.25 when it has come to more than one and a
    fifth of the unloaded time."""
    grew = any(last > GROWTH * middle for _, middle, last in run.thirds.values())
    return not grew and run.drained_s <= PATIENCE_S and not run.unended and not run.refusals


def capacities(
    mixes: Mapping[str, Mapping[str, float]],
    grounds: Grounds,
    run: DoJobs,
    *,
    horizon_s: float,
    tolerance: float,
    vary: float = 1.0,
) -> list[Capacity]:
    """By bisection, for each fleet with its mix: the highest rate at which least_work with perfect lengths keeps its
    queues bounded for `horizon_s` of Poisson arrivals, to `tolerance` of the rate on paper.

    Raises ConfigError when it lies outside of half and 1.4 times what the paper says.
    """
    examples = round(min(1000.0, max(200.0, 3.0 * horizon_s)))
    low, high = dict.fromkeys(mixes, LOW), dict.fromkeys(mixes, HIGH)
    tried: dict[str, dict[str, bool]] = {name: {} for name in mixes}
    guess = {
        name: rate_for(grounds.build(_wanted(mix, 1.0, examples, None, vary)), fleet(name), 1.0)
        for name, mix in mixes.items()
    }
    for number in range(math.ceil(math.log2((HIGH - LOW) / tolerance))):
        jobs = []
        for name, mix in mixes.items():
            rate = guess[name] * (low[name] + high[name]) / 2.0
            count = math.ceil(guess[name] * HIGH * horizon_s)
            jobs.append(Job(
                workload=_wanted(mix, rate, count, horizon_s, vary), fleet=name, policy="least_work", forecast="oracle",
            ))  # fmt: skip
        for name, done in zip(mixes, run(jobs, f"capacity: step {number + 1}"), strict=True):
            is_bounded = bounded(done)
            middle = (low[name] + high[name]) / 2.0
            tried[name][f"{guess[name] * middle:.4g}"] = is_bounded
            if is_bounded:
                low[name] = middle
            else:
                high[name] = middle
    for name in mixes:
        if low[name] == LOW or high[name] == HIGH:
            raise ConfigError(
                f"the capacity of the fleet {name} is not between {LOW:g} and {HIGH:g} times {guess[name]:.3g} "
                "workflows a second, which fill its busiest model on paper; give it with --capacity."
            )
    return [
        Capacity(fleet=name, rate_per_s=guess[name] * low[name], on_paper=guess[name], tried=tried[name])
        for name in mixes
    ]


def unloaded_p99(
    mixes: Mapping[str, Mapping[str, float]],
    capacity: Mapping[str, float],
    run: DoJobs,
    *,
    count: int,
    vary: float = 1.0,
) -> dict[str, dict[str, float]]:
    """Seconds for each fleet and kind: the P99 under least_work with perfect lengths at a twentieth of capacity."""
    jobs = [
        Job(
            workload=_wanted(mix, UNLOADED * capacity[name], count, None, vary), fleet=name, policy="least_work",
            forecast="oracle",
        )
        for name, mix in mixes.items()
    ]  # fmt: skip
    runs = run(jobs, "targets")
    return {
        name: {kind: quantile(done, kind, 0.99) for kind in done.latency_s}
        for name, done in zip(mixes, runs, strict=True)
    }


def _wanted(mix: Mapping[str, float], rate_per_s: float, count: int, until_s: float | None, vary: float) -> Wanted:
    content = Content(tuning=False, count=count, seed=TUNING_SEED, mix=dict(mix), vary=vary)
    return Wanted(content=content, arrivals="poisson", rate_per_s=rate_per_s, until_s=until_s)
