"""On what policies are compared: which workflows, from which data, and under which name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import get_args

import msgspec

from eval.workloads.arrivals import Arrivals, arrival_times
from eval.workloads.build import DEFAULT_MIX, WorkloadSettings, build, data_files, notes
from eval.workloads.drawing import timed
from eval.workloads.fleets import FLEETS
from eval.workloads.plan import Workload
from eval.workloads.reading import Sources, file_hash
from eval.workloads.toy import toy
from swarmx.core.errors import ConfigError

NEEDS: Mapping[str, tuple[str, ...]] = {
    "chat": ("prompts",), "coding": ("prompts",), "research": ("prompts",), "sessions": ("sessions",),
    "media": ("prompts", "engine"), "pools": (),
}  # fmt: skip
"""The data that a kind is drawn from; recorded arrivals need `arrivals`, too."""

TUNING_SEED = 1000
"""Seeds of the tuning split begin here: its arrivals are others, too."""


class Content(msgspec.Struct, frozen=True, kw_only=True):
    """Which workflows: the same content has the same calls, truths and forecasts, whenever they arrive."""

    tuning: bool
    count: int
    seed: int
    mix: dict[str, float]
    vary: float = 1.0


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """Content with its arrivals; only what is submitted up to `until_s` is run."""

    content: Content
    arrivals: Arrivals
    rate_per_s: float
    until_s: float | None = None


class Grounds(msgspec.Struct, frozen=True, kw_only=True):
    """Where workflows come from: the user's files, or, without any, toy workloads.

    `fingerprint` stands for the contents of the files; `cache` is a folder for workloads that were built.
    """

    sources: Sources = Sources()
    fingerprint: str = ""
    cache: Path | None = None

    @property
    def is_toy(self) -> bool:
        """Whether no data was given that workflows could be drawn from."""
        return self.sources.prompts is None and self.sources.sessions is None and self.sources.engine is None

    @property
    def name(self) -> str:
        """For rows and titles."""
        return "toy" if self.is_toy else "data"

    def mix(self, fleet: str, kinds: Sequence[str] = ()) -> dict[str, float]:
        """The kinds that the fleet serves, that data allows and that are asked for, with their weights.

        Raises ConfigError when none is left, or for a name that is none.
        """
        if fleet not in FLEETS:
            raise ConfigError(f"there is no fleet {fleet!r}, expected one of {', '.join(FLEETS)}.")
        if unknown := [kind for kind in kinds if kind not in DEFAULT_MIX]:
            raise ConfigError(f"there is no workflow kind {unknown[0]!r}, expected one of {', '.join(DEFAULT_MIX)}.")
        served = ("chat", "sessions") if fleet == "one_model" else tuple(DEFAULT_MIX)
        asked = [kind for kind in served if not kinds or kind in kinds]
        possible = [kind for kind in asked if self.is_toy or all(getattr(self.sources, need) for need in NEEDS[kind])]
        if not possible:
            needs = "; ".join(f"{kind} needs --{' and --'.join(NEEDS[kind])}" for kind in asked)
            raise ConfigError(f"the fleet {fleet} serves {', '.join(served)}, and nothing of it is left; {needs}.")
        return {kind: DEFAULT_MIX[kind] for kind in possible}

    def check(self, kinds: Sequence[str]) -> None:
        """Raises ConfigError for a kind of arrivals that is none, or needs a trace that was not given."""
        for kind in kinds:
            if kind not in get_args(Arrivals):
                raise ConfigError(f"arrivals are {kind!r}, expected one of {', '.join(get_args(Arrivals))}.")
            if kind not in ("poisson", "bursty") and (self.is_toy or self.sources.arrivals is None):
                raise ConfigError(f"arrivals {kind!r} are recorded: pass --arrivals PATH, and data to draw from.")

    def files(self, mix: Mapping[str, float], arrivals: Sequence[Arrivals]) -> list[Path]:
        """What such workloads are made from; none for toy ones. Raises ConfigError for a file that is missing."""
        if self.is_toy:
            return []
        asked = [_settings(_example(mix, kind)) for kind in arrivals]
        return list(dict.fromkeys(path for settings in asked for path in data_files(settings, self.sources)))

    def remarks(self, mix: Mapping[str, float]) -> Iterator[str]:
        """What has to be said wherever results are shown."""
        if self.is_toy:
            yield "toy workloads: lengths are invented (lognormal), and forecasts are calibrated by construction"
            return
        yield from notes(_settings(_example(mix, "poisson")), self.sources)
        if left := [kind for kind in DEFAULT_MIX if kind not in mix]:
            yield f"without {', '.join(left)}: not asked for, or their data was not given"

    def build(self, wanted: Wanted) -> Workload:
        """The workload, from memory or disk where it was built before. Raises ConfigError."""
        whole = _built(self, msgspec.json.encode(msgspec.structs.replace(wanted, until_s=None)))
        if wanted.until_s is None:
            return whole
        kept = [workflow for workflow in whole.workflows if workflow.at_s <= wanted.until_s]
        return msgspec.structs.replace(whole, workflows=kept)


def grounds(sources: Sources, cache: Path, mix: Mapping[str, float], arrivals: Sequence[Arrivals]) -> Grounds:
    """Grounds whose fingerprint is that of all files that are read. Raises ConfigError for a path that is not there."""
    for name in ("prompts", "arrivals", "sessions", "engine"):
        path: Path | None = getattr(sources, name)
        if path is not None and not path.exists():
            raise ConfigError(f"there is nothing at {path}, expected a file or folder for --{name}.")
    made = Grounds(sources=sources, cache=cache)
    hashes = "".join(file_hash(path) for path in made.files(mix, arrivals))
    return msgspec.structs.replace(made, fingerprint=sha256(hashes.encode()).hexdigest() if hashes else "toy")


def _example(mix: Mapping[str, float], arrivals: Arrivals) -> Wanted:
    content = Content(tuning=False, count=1, seed=0, mix=dict(mix))
    return Wanted(content=content, arrivals=arrivals, rate_per_s=1.0)


def _settings(wanted: Wanted) -> WorkloadSettings:
    content = wanted.content
    return WorkloadSettings(
        mix=content.mix, count=content.count, rate_per_s=wanted.rate_per_s, arrivals=wanted.arrivals,
        split="tuning" if content.tuning else "evaluation", vary=content.vary,
    )  # fmt: skip


@lru_cache(maxsize=2)
def _built(grounds: Grounds, encoded: bytes) -> Workload:
    wanted = msgspec.json.decode(encoded, type=Wanted)
    content = wanted.content
    if not grounds.is_toy:
        return build(_settings(wanted), grounds.sources, content.seed, grounds.cache)
    drawn = _toy(msgspec.json.encode(content))
    times_s = arrival_times(wanted.arrivals, content.count, wanted.rate_per_s, content.seed)
    return msgspec.structs.replace(drawn, workflows=timed(drawn.workflows, times_s))


@lru_cache(maxsize=2)
def _toy(encoded: bytes) -> Workload:
    """Drawing takes longer than simulating some of it, and does not depend on the rate."""
    content = msgspec.json.decode(encoded, type=Content)
    return toy(content.count, 1.0, content.seed, content.mix, vary=content.vary)
