"""The aims of routing at the loads of the matrix, computed from the rows of a result."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import median

from eval.experiment.contestants import LENGTHS, ORACLE, OURS, ROLE_MEANS, contestants
from eval.experiment.measures import ALL
from eval.result import Claim, Op, Row, claim

AIMS: Mapping[tuple[str, float], float] = {
    ("heterogeneous", 0.7): 0.90, ("heterogeneous", 0.85): 0.82,
    ("homogeneous", 0.7): 0.95, ("homogeneous", 0.85): 0.88,
}  # fmt: skip
"""Of our P99 over that of the best baseline; elsewhere it should not be above it."""

WORST_KIND, CLOSED, SMALL_GAP = 1.03, 0.60, 0.02
NEAR_ORACLE = 1.10
"""The issue names no aim for the distance from perfect lengths and structure; this one is the evaluation's own."""

_BASELINES = [name for name, each in contestants().items() if each.group == "baselines"]

Place = tuple[str, float, str]
"""Fleet, load and kind of arrivals."""


class Figures:
    """The rows of one experiment by place, policy, kind and seed."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows: dict[tuple[object, ...], Row] = {}
        for row in rows:
            if row["experiment"] == "routing":
                key = (row["fleet"], row["load"], row["arrivals"], row["policy"], row["kind"], row["seed"])
                self._rows[key] = row
        self.places: list[Place] = list(dict.fromkeys((str(k[0]), float(str(k[1])), str(k[2])) for k in self._rows))
        self.kinds = [kind for kind in dict.fromkeys(str(key[4]) for key in self._rows) if kind != ALL]

    def values(self, place: Place, policy: str, field: str, kind: str = ALL) -> dict[object, float]:
        """By seed."""
        found = {key[5]: row[field] for key, row in self._rows.items() if key[:5] == (*place, policy, kind)}
        return {seed: float(value) if isinstance(value, int | float) else math.inf for seed, value in found.items()}

    def ratio(self, place: Place, ours: str, theirs: str | None, field: str = "p99_s", kind: str = ALL) -> float | None:
        """The median over seeds of ours over theirs, seed by seed; None where no seed has both."""
        if theirs is None:
            return None
        a, b = self.values(place, ours, field, kind), self.values(place, theirs, field, kind)
        both = [a[seed] / b[seed] for seed in a if b.get(seed) and math.isfinite(b[seed])]
        return median(both) if both else None


def claims_of(rows: Sequence[Row], best: Mapping[tuple[str, float], str]) -> Iterator[Claim]:
    """All claims that the rows speak about; `best` is the best baseline by fleet and load, as tuning has picked it."""
    figures = Figures(rows)
    for place in figures.places:
        fleet, load, arrivals = place
        at = f"{fleet},{load:g},{arrivals}"
        theirs = best.get((fleet, load))

        def made(name: str, value: float | None, op: Op, aim: float, at: str = at) -> Iterator[Claim]:
            if value is not None:
                yield claim(f"{name}@{at}", value, op, aim)

        p99 = figures.ratio(place, OURS, theirs)
        yield from made("p99_vs_best_baseline", p99, "<=", AIMS.get((fleet, load), 1.0))
        worst = [r for kind in figures.kinds if (r := figures.ratio(place, OURS, theirs, kind=kind)) is not None]
        yield from made("p99_worst_kind", max(worst, default=None), "<=", WORST_KIND)
        others = [r for name in _BASELINES if (r := figures.ratio(place, OURS, name)) is not None]
        yield from made("p99_vs_hindsight_best", max(others, default=None), "<=", 1.0)
        yield from made("p50_vs_best_baseline", figures.ratio(place, OURS, theirs, "p50_s"), "<=", 1.0)
        yield from made("learning_gain_p99", figures.ratio(place, OURS, ROLE_MEANS), "<", 1.0)
        yield from made("oracle_distance", figures.ratio(place, OURS, ORACLE), "<=", NEAR_ORACLE)
        yield from made("gap_closed", gap(figures, place)[1], ">=", CLOSED)


def gap(figures: Figures, place: Place) -> tuple[float | None, float | None]:
    """How much of the P99 with role means perfect lengths would save, and the share of that which the forecast saves.

    The share is None where the gap is below 2 %: there is nothing to close.
    """
    means = figures.ratio(place, LENGTHS, ROLE_MEANS)
    ours = figures.ratio(place, OURS, ROLE_MEANS)
    if means is None or ours is None:
        return None, None
    wide = 1.0 - means
    return wide, (1.0 - ours) / wide if wide >= SMALL_GAP else None


def gap_rows(rows: Sequence[Row]) -> Iterator[Row]:
    """One row a place, also where there is nothing to close."""
    figures = Figures(rows)
    for place in figures.places:
        wide, closed = gap(figures, place)
        if wide is not None:
            yield {
                "experiment": "routing_gap", "fleet": place[0], "load": place[1], "arrivals": place[2], "gap": wide,
                "gap_closed": closed,
            }  # fmt: skip
