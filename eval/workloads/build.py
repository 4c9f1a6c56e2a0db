"""Workloads from data: real prompts, sessions, images and arrivals, put together into workflows by a seed."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from eval.workloads import stored
from eval.workloads.arrivals import Arrivals, arrival_times
from eval.workloads.draft import Drawn, DrawnImage, Turn
from eval.workloads.drawing import draw_workflows, planned, timed
from eval.workloads.foreseen import PAST, foresee, means_of
from eval.workloads.image_works import ImageWorks, flow_files, read_images
from eval.workloads.invented import INVENTED, Inventions
from eval.workloads.kinds import KINDS
from eval.workloads.plan import Workload
from eval.workloads.prompt_rows import PromptRows, prompt_files, read_prompts
from eval.workloads.reading import Part, Sources, file_hash, table_file
from eval.workloads.session_rows import SessionRows, read_sessions
from eval.workloads.traces import TRACES, read_trace
from swarmx.core.errors import ConfigError
from swarmx.core.forecast import LEVELS
from swarmx.neural.forecaster import NeuralForecaster
from swarmx.neural.tracking import QuantileTracker

__all__ = ["DEFAULT_MIX", "Sources", "WorkloadSettings", "build", "data_files", "notes"]

DEFAULT_MIX: Mapping[str, float] = {
    "chat": 1.0, "coding": 1.0, "research": 1.0, "sessions": 1.0, "media": 0.4, "pools": 0.6,
}  # fmt: skip
"""Weights of the kinds where nothing else is said. Images take long: as many requests for them as for the others would
leave most of a fleet to them. Five seeds of 5,000 workflows have 2,000 of the rarest kind."""


class WorkloadSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked for: `count` workflows of the kinds in `mix` (weights), at `rate_per_s` all kinds together.

    `split` says which prompts, sessions and images may be used. `vary` scales the invented spreads: 0.5 halves them,
    1.5 adds half.
    """

    mix: dict[str, float]
    count: int
    rate_per_s: float
    arrivals: Arrivals = "poisson"
    split: Part = "evaluation"
    vary: float = 1.0


def build(settings: WorkloadSettings, sources: Sources, seed: int, cache: Path | None = None) -> Workload:
    """The workload of this seed. Raises ConfigError for data or settings that will not do.

    The same seed, data, mix, split and `vary` give the same workflows with the same truth and forecasts, in the same
    order, whatever the rate and the kind of arrivals: only `at_s` differs, so policies and loads are compared on common
    random numbers. With a folder `cache`, what was built once is loaded from there.
    """
    trace = read_trace(_given(sources.arrivals, "arrivals"), settings.arrivals) if settings.arrivals in TRACES else None
    times = arrival_times(settings.arrivals, settings.count, settings.rate_per_s, seed, trace)
    with _no_collection():
        built = _built(settings, sources, seed, cache)
        workflows = timed(built.workflows, times)
    kinds = "+".join(kind for kind in sorted(settings.mix) if settings.mix[kind] > 0.0)
    return Workload(
        name=f"{kinds}/{settings.arrivals}", workflows=workflows, quantiles=built.quantiles, role_means=built.role_means
    )


def data_files(settings: WorkloadSettings, sources: Sources) -> list[Path]:
    """The files that a workload is made from, for the record of a result."""
    return [*_content_files(settings, sources), *_trace_files(settings, sources)]


def notes(settings: WorkloadSettings, sources: Sources) -> list[str]:
    """What a report should say of this data: models that stand in for missing ones, sessions that were left out."""
    truth = _Recorded.read(settings, sources)
    said = list(truth.prompts.stand_ins) if truth.prompts is not None else []
    if truth.sessions is not None and truth.sessions.left_out:
        said.append(f"{truth.sessions.left_out} sessions with calls of no tokens were left out")
    return said


def _built(settings: WorkloadSettings, sources: Sources, seed: int, cache: Path | None) -> stored.Built:
    forecaster = NeuralForecaster.load(None, QuantileTracker(LEVELS))
    mix = {kind: weight for kind, weight in sorted(settings.mix.items()) if weight != 0.0}
    key = stored.key_of(
        mix, settings.count, settings.split, settings.vary, seed, [msgspec.to_builtins(i) for i in INVENTED.values()],
        [file_hash(path) for path in _content_files(settings, sources)], forecaster.version,
        forecaster.encoder.version,
    )  # fmt: skip
    found = stored.load(cache, key) if cache is not None else None
    if found is not None:
        return found
    inventions = Inventions(vary=settings.vary)
    truth = _Recorded.read(settings, sources)
    past = draw_workflows(truth, mix, PAST, seed + _PAST_SEED, inventions)
    drafts = draw_workflows(truth, mix, settings.count, seed, inventions)
    built = stored.Built(planned(drafts), foresee(drafts, past, forecaster), means_of(past))
    if cache is not None:
        stored.store(cache, key, built)
    return built


_PAST_SEED = 1_000_000  # what came before was drawn from another stream
_PROMPTED = frozenset(KINDS) - {"pools", "sessions"}


def _content_files(settings: WorkloadSettings, sources: Sources) -> list[Path]:
    kinds = {kind for kind, weight in settings.mix.items() if weight > 0.0}
    files = prompt_files(_given(sources.prompts, "prompts")) if kinds & _PROMPTED else []
    if "sessions" in kinds:
        files.append(table_file(_given(sources.sessions, "sessions"), "sessions.parquet"))
    if "media" in kinds:
        files += flow_files(_given(sources.engine, "engine"))
    return files


def _trace_files(settings: WorkloadSettings, sources: Sources) -> list[Path]:
    if settings.arrivals not in TRACES:
        return []
    return [table_file(_given(sources.arrivals, "arrivals"), TRACES[settings.arrivals][0])]


def _given(source: Path | None, name: str) -> Path:
    if source is None:
        raise ConfigError(f"this workload needs data that was not given: pass --{name} PATH, or leave its kind out.")
    return source


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recorded:
    """Implements `draft.Truth` with what was recorded; each part is there where the mix needs it."""

    prompts: PromptRows | None
    sessions: SessionRows | None
    images: ImageWorks | None

    @classmethod
    def read(cls, settings: WorkloadSettings, sources: Sources) -> _Recorded:
        kinds = {kind for kind, weight in settings.mix.items() if weight > 0.0}
        split = settings.split
        return cls(
            prompts=read_prompts(_given(sources.prompts, "prompts"), split) if kinds & _PROMPTED else None,
            sessions=(read_sessions(_given(sources.sessions, "sessions"), split) if "sessions" in kinds else None),
            images=read_images(_given(sources.engine, "engine")) if "media" in kinds else None,
        )

    def llm(self, role: str, model: str, rng: np.random.Generator) -> Drawn:
        assert self.prompts is not None
        return self.prompts.draw(role, model, rng)

    def image(self, model: str, rng: np.random.Generator) -> DrawnImage:
        assert self.images is not None
        return self.images.draw(model, rng)

    def session(self, rng: np.random.Generator) -> Sequence[Turn]:
        assert self.sessions is not None
        return self.sessions.draw(rng)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Values by the hundred thousand, and no cycles among them: the collector would only read them over and over."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
