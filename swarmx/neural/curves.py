"""Service curves: what a replica would take, on a grid that routers interpolate instead of running the heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields

import numpy as np
from msgspec import structs
from numpy.typing import ArrayLike

from swarmx.core.messages import ServiceCurvePublished
from swarmx.neural.head import Floats, Head
from swarmx.neural.heads.latency import COMPLETION, GROUP, TTFT, Candidate, Candidates, RuntimeState, inputs

WORK = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0)
UNCACHED = (0.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0, 262144.0)

_SMALLEST_S = 1e-6


def service_curve(
    ttft: Head,
    completion: Head,
    candidate: Candidate,
    state: RuntimeState,
    *,
    replica_id: str,
    measured_at_s: float,
    work: Sequence[float] = WORK,
    uncached: Sequence[float] = UNCACHED,
) -> ServiceCurvePublished:
    """What a call would take on this replica in this `state` (columns of one), at every point of the grid.

    The grid grows by fours. Completion is nearly a sum of a constant and a line in each argument; in the logarithm,
    straight lines between points a factor of four apart are at most 12 % above such a sum, where the constant equals
    the line, and 9 x 8 x 8 numbers stay below 12 kB of JSON. The uncached tokens count as the whole prompt.

    Quantiles are made to rise in the level, the work and the uncached tokens, since a longer call never ends sooner:
    where the network says so, it is noise. Raises ValueError when a grid does not rise from at least 0.
    """
    works, prompts = _grid("work", work), _grid("uncached", uncached)
    each_work, each_prompt = (axis.ravel() for axis in np.meshgrid(works, prompts, indexing="ij"))
    points = len(each_work)
    made = inputs(
        Candidates.of([candidate]).take(np.zeros(points, dtype=np.intp)),
        RuntimeState(**{f.name: np.repeat(np.ravel(getattr(state, f.name))[:1], points) for f in fields(state)}),
        prompt_tokens=each_prompt,
        uncached_tokens=each_prompt,
        output_tokens=each_work,
    )
    levels = completion.spec.levels
    shape = (len(works), len(prompts), len(levels))
    anchor, first = (a.astype(np.float64) for a in (made.completion_anchor(each_work), made.ttft_anchor))
    completion_s = completion.quantiles(made.features(COMPLETION), anchor, GROUP)
    ttft_s = ttft.quantiles(made.features(TTFT), first, GROUP)[: len(prompts)]
    return ServiceCurvePublished(
        replica_id=replica_id,
        work=tuple(works.tolist()),
        uncached=tuple(prompts.tolist()),
        levels=levels,
        completion_s=tuple(_rising(completion_s.reshape(shape)).ravel().tolist()),
        ttft_s=tuple(_rising(ttft_s).ravel().tolist()),
        measured_at_s=measured_at_s,
        version=f"{ttft.version} {completion.version}".strip(),
    )


def moved(curve: ServiceCurvePublished, correct: Callable[[Floats], Floats]) -> ServiceCurvePublished:
    """The curve with its completions corrected: `correct` maps the log quantiles [K] of one point."""
    shape = (len(curve.work), len(curve.uncached), len(curve.levels))
    log_s = np.log(np.maximum(np.array(curve.completion_s), _SMALLEST_S)).reshape(-1, len(curve.levels))
    corrected = np.exp(np.minimum(np.stack([correct(row) for row in log_s]), 40.0)).reshape(shape)
    return structs.replace(curve, completion_s=tuple(_rising(corrected).ravel().tolist()))


def read_curve(curve: ServiceCurvePublished, work: ArrayLike, uncached: ArrayLike) -> Floats:
    """Completion quantiles [calls, K] in seconds, of calls with so much work and so many uncached tokens.

    Bilinear in the logarithms of the seconds and of 1 + work and 1 + tokens, which keeps them rising in level, work and
    tokens. Outside the grid its edge holds. Whoever knows the work by its quantiles reads the curve at each.
    """
    k = len(curve.levels)
    shape = (len(curve.work), len(curve.uncached), k)
    table = np.log(np.maximum(np.array(curve.completion_s).reshape(shape), _SMALLEST_S))
    works, tokens = np.broadcast_arrays(np.atleast_1d(work), np.atleast_1d(uncached))
    i, a = _between(curve.work, works)
    j, b = _between(curve.uncached, tokens)
    left = table[i, j] + b * (table[i, j + 1] - table[i, j])
    right = table[i + 1, j] + b * (table[i + 1, j + 1] - table[i + 1, j])
    return _seconds(left + a * (right - left))


def read_ttft(curve: ServiceCurvePublished, uncached: ArrayLike) -> Floats:
    """Quantiles [calls, K] of the time to the first token in seconds; as `read_curve`."""
    shape = (len(curve.uncached), len(curve.levels))
    table = np.log(np.maximum(np.array(curve.ttft_s).reshape(shape), _SMALLEST_S))
    j, b = _between(curve.uncached, np.atleast_1d(uncached))
    return _seconds(table[j] + b * (table[j + 1] - table[j]))


def _between(points: Sequence[float], values: np.ndarray) -> tuple[np.ndarray, Floats]:
    """The cell [calls] of each value, and where in it [calls, 1], from 0 to 1."""
    axis, x = np.log1p(np.array(points)), np.log1p(np.maximum(np.nan_to_num(values.astype(np.float64)), 0.0))
    cell = np.clip(np.searchsorted(axis, x, side="right") - 1, 0, len(axis) - 2)
    share = np.clip((x - axis[cell]) / (axis[cell + 1] - axis[cell]), 0.0, 1.0)
    return cell, share[:, None]


def _rising(quantiles: Floats) -> Floats:
    for axis in range(quantiles.ndim):
        quantiles = np.maximum.accumulate(quantiles, axis=axis)
    return quantiles


def _seconds(log_s: Floats) -> Floats:
    seconds: Floats = np.exp(np.minimum(log_s, 40.0))
    return np.maximum.accumulate(seconds, axis=1)


def _grid(name: str, points: Sequence[float]) -> Floats:
    grid = np.asarray(points, dtype=np.float64)
    if len(grid) < 2 or not np.isfinite(grid).all() or grid[0] < 0.0 or (np.diff(grid) <= 0.0).any():
        raise ValueError(f"{name} must be at least two numbers that rise from 0 or more, got {tuple(points)}")
    return grid
