"""Training data and settings of the latency heads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from swarmx.neural.head import HeadSpec
from swarmx.neural.heads.latency import COMPLETION, GROUP, TTFT, Candidates, Inputs, RuntimeState, inputs
from swarmx.neural.table import Table
from swarmx.neural.training.fit import FitSettings
from swarmx.neural.training.latency_data import Observation, forgetful, observations

TTFT_SETTINGS = FitSettings(
    nets=1,
    hidden=64,
    epochs=60,
    patience=15,
    batch=256,
    learning_rate=1e-2,
    weight_decay=0.1,
    dropout=0.0,
    emphasis=0.0,
)
COMPLETION_SETTINGS = TTFT_SETTINGS

_FORGOTTEN = 0.25


def tables(folder: Path) -> dict[str, Table]:
    """The tables of both heads by name, from a folder of engine tables. Raises PredictorError when it holds none."""
    seen = with_gaps(observations(folder))
    return {spec.name: table(seen, spec) for spec in (TTFT, COMPLETION)}


def with_gaps(seen: Sequence[Observation]) -> list[Observation]:
    """All observations, and a quarter of those for training and validation again as seen by someone who knows less.

    Drawn by hash, a third each without the device, without the model and without the engine's own word and device.
    They teach that what is not known makes the forecast wide; the head itself cannot tell NaN from the mean.
    """
    again = []
    for i, observation in enumerate(seen):
        if observation.split == "test":
            continue
        draw = (i * 2654435761) % 2**32 / 2**32
        if draw < _FORGOTTEN:
            third = int(draw / _FORGOTTEN * 3.0)
            again.append(forgetful(observation, device=third != 1, model=third == 1, state=third == 2))
    return [*seen, *again]


def inputs_of(seen: Sequence[Observation]) -> Inputs:
    """What the heads read of the observations, given their true output lengths."""

    def column(name: str) -> np.ndarray:
        return np.array([getattr(o, name) for o in seen], dtype=np.float64)

    names = ("in_flight", "remaining_work", "context_tokens", "prefill_tokens", "running", "waiting", "kv_usage",
             "signal_age_s")  # fmt: skip
    return inputs(
        Candidates.of(o.candidate for o in seen),
        RuntimeState(**{name: column(name) for name in names}),
        prompt_tokens=column("prompt_tokens"),
        uncached_tokens=column("prompt_tokens"),
        output_tokens=column("output_tokens"),
        averaged=column("averaged"),
    )


def table(seen: Sequence[Observation], spec: HeadSpec) -> Table:
    """The rows of one head, of those observations that measured its quantity.

    Sources weigh by the square root of their size, so that no table drowns the others. The calibration group is
    "request" for single calls, which is what a router forecasts, and "mean" for averages.
    """
    target = np.array([o.ttft_s if spec.name == TTFT.name else o.completion_s for o in seen], dtype=np.float64)
    keep = np.flatnonzero(np.isfinite(target) & (target > 0.0)).tolist()
    rows = [seen[i] for i in keep]
    made = inputs_of(rows)
    first = spec.name == TTFT.name
    anchor = made.ttft_anchor if first else made.completion_anchor(np.array([o.output_tokens for o in rows]))
    sources = np.array([o.source for o in rows])
    weight = np.ones(len(rows))
    for source in np.unique(sources):
        weight[sources == source] = (sources == source).sum() ** -0.5
    return Table(
        features=np.ascontiguousarray(made.features(spec)),
        anchor=anchor.astype(np.float64),
        target=target[keep],
        censored=np.zeros(len(rows), dtype=bool),
        weight=weight / weight.mean() if len(rows) else weight,
        group=np.array(["mean" if o.averaged else GROUP for o in rows]),
        split=np.array([o.split for o in rows]),
    )
