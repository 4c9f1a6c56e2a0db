"""Tuning: each contestant's grid on the tuning split, and which baseline is the best there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from eval.experiment.contestants import Contestant
from eval.experiment.grids import Settings, changed, defaults, dimensions
from eval.experiment.jobs import BOUND, Job, Run
from eval.experiment.measures import overall
from swarmx.core.errors import ConfigError


class Tuned(msgspec.Struct, frozen=True, kw_only=True):
    """What was found for one contestant on one fleet at one load; `score` is None where nothing ended."""

    fleet: str
    load: float
    contestant: str
    settings: Settings
    score: float | None
    searched: int


class TunedFile(msgspec.Struct, frozen=True, kw_only=True):
    """All that tuning found. `workload` and `command` say on what."""

    workload: str
    command: str
    tuned: list[Tuned]

    def settings(self, contestant: str, fleet: str, load: float) -> Settings:
        """Those found at the nearest load. Raises ConfigError when there are none for the fleet."""
        found = [each for each in self.tuned if (each.contestant, each.fleet) == (contestant, fleet)]
        if not found:
            raise ConfigError(f"nothing was tuned for {contestant} on the fleet {fleet}; run it without --tuned.")
        return min(found, key=lambda each: abs(each.load - load)).settings

    def best(self, fleet: str, load: float, among: Sequence[Contestant]) -> str | None:
        """The baseline with the lowest score on the tuning split; None where none was tuned.

        Nothing but the tuning split is looked at, and of equals the first by name is taken.
        """
        names = {each.name for each in among if each.group == "baselines"}
        found = [each for each in self.tuned if each.fleet == fleet and each.contestant in names]
        if not found:
            return None
        nearest = min((each.load for each in found), key=lambda tuned: abs(tuned - load))
        ranked = [each for each in found if each.load == nearest]
        return min(ranked, key=lambda e: (math.inf if e.score is None else e.score, e.contestant)).contestant


Place = tuple[str, float]
"""A fleet and a load."""

_Spot = tuple[Contestant, Place]

Jobs = Callable[[Contestant, Settings, str, float], Sequence[Job]]
"""The jobs on the tuning split of a contestant with settings, on a fleet at a load."""


def tune(
    those: Sequence[Contestant],
    places: Sequence[Place],
    jobs: Jobs,
    run: Callable[[Sequence[Job], str], Sequence[Run]],
    *,
    quick: bool = False,
) -> list[Tuned]:
    """The best settings of each contestant at each place, by the geometric mean of P99 over kinds and workloads.

    Coordinate-wise: from the defaults, all values of one dimension are tried, the best is kept, and the next dimension
    follows. A tie keeps what is there. `quick` tries the first two values of two dimensions only.
    """
    mine = [each for each in those if each.like is None and each.policy != BOUND]
    grids = {
        each: [list(d[:2]) if quick else d for d in dimensions(each.policy)[: 2 if quick else None]] for each in mine
    }
    best: dict[_Spot, tuple[Settings, float]] = {}
    seen: dict[_Spot, list[Settings]] = {(each, place): [] for each in mine for place in places}

    def try_all(asked: Sequence[tuple[_Spot, Settings]], what: str) -> None:
        groups = [list(jobs(each, settings, *place)) for (each, place), settings in asked]
        done = iter(run([job for group in groups for job in group], what))
        for (spot, settings), group in zip(asked, groups, strict=True):
            value = score([next(done) for _ in group])
            seen[spot].append(settings)
            if spot not in best or value < best[spot][1]:
                best[spot] = (settings, value)

    try_all([(spot, spot[0].allowed(defaults(spot[0].policy))) for spot in seen], "tuning: defaults")
    for number in range(max((len(grid) for grid in grids.values()), default=0)):
        try_all(
            [
                (spot, settings)
                for spot in seen
                for change in grids[spot[0]][number : number + 1]
                for each in change
                if (settings := spot[0].allowed(changed(best[spot][0], each))) not in seen[spot]
            ],
            f"tuning: dimension {number + 1}",
        )
    return [
        Tuned(
            fleet=fleet, load=load, contestant=each.name, settings=settings,
            score=value if math.isfinite(value) else None, searched=len(seen[each, (fleet, load)]),
        )
        for (each, (fleet, load)), (settings, value) in best.items()
    ]  # fmt: skip


def score(runs: Sequence[Run]) -> float:
    """The geometric mean of their P99s, over kinds and runs; lower is better."""
    return float(np.exp(np.mean(np.log([overall(run, 0.99) for run in runs]))))


def read_tuned(path: Path) -> TunedFile:
    """What an earlier tuning found. Raises ConfigError for a file that is none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=TunedFile)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; expected the tuned.json of an earlier run.") from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is no tuned.json: {error}.") from None


def write_tuned(path: Path, tuned: TunedFile) -> None:
    """For `--tuned` of a later run."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(tuned), indent=2) + b"\n")
