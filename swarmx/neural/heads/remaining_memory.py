"""Remembers what workflows still had before them after n calls: by kind, by model, and for all that is unknown yet."""

from __future__ import annotations

import math
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from swarmx.core.errors import PredictorError
from swarmx.neural.checkpoint import Card, load_arrays, save_arrays
from swarmx.neural.head import Floats

# Calls by calls arrived; work (output tokens) and path (seconds) by calls ended.
QUANTITIES = ("calls", "work", "path")
SOFTENING = (1.0, 10.0, 1.0)

MEMORY = "remaining_memory"
EVERY_MODEL = ""
MOST_KINDS = 256
MOST_MODELS = 16  # of one kind that are told apart
MOST_CALLS = 512  # of one workflow that are remembered

_MOST_CACHED = 4096
_EXACT = 24
_PLACES = 48
_PRIOR = 2.0  # the weight of what is known of all workflows, in workflows
_AROUND = 4.0  # the weight of what its kind did some calls earlier and later
_RECENT = 200.0  # workflows after which a kind has forgotten half
_COMMON = {True: "every_model", False: "one_model"}
_COMMON_WEIGHT = 100.0
_NEAR = 2.0  # calls over which experience is shared
_KERNEL = np.exp(-np.abs(np.subtract.outer(np.arange(_PLACES), np.arange(_PLACES))) / _NEAR)

Sums = Floats
"""[quantities, places, 4]: the count, and the sums of x, x² and (rest = 0), x = log(rest + softening)."""


class Recall(NamedTuple):
    """What is expected of one quantity of a workflow from others: the mean and spread of log(rest + softening).

    `ending` is the share that had nothing more to come; `evidence` the workflows of its own kind that speak here.
    """

    mean: float
    spread: float
    ending: float
    evidence: float


@dataclass(slots=True, kw_only=True)
class Trail:
    """What of a running workflow is kept to learn from at its end; the first `MOST_CALLS` calls."""

    models: list[str] = field(default_factory=list)
    ended_models: list[str] = field(default_factory=list)
    outputs: array[float] = field(default_factory=lambda: array("d"))
    ended_s: array[float] = field(default_factory=lambda: array("d"))

    def call_arrived(self, model: str) -> None:
        if len(self.models) < MOST_CALLS:
            self.models.append(model)

    def call_ended(self, model: str, output_tokens: float, at_s: float) -> None:
        """`at_s` counts from the workflow's beginning; NaN where nobody looked at the clock."""
        if len(self.outputs) < MOST_CALLS:
            self.ended_models.append(model)
            self.outputs.append(output_tokens)
            self.ended_s.append(at_s)

    def sums(self, model: str, *, ended_s: float) -> Sums:
        """What the finished workflow adds to the memory, about all its calls or those of one model."""
        sums = np.zeros((len(QUANTITIES), _PLACES, 4))
        every = model == EVERY_MODEL
        calls = np.array([every or name == model for name in self.models], dtype=np.float64)
        outputs = np.array(self.outputs) * [every or name == model for name in self.ended_models]
        _add(sums[0], _after(calls), SOFTENING[0])
        _add(sums[1], _after(outputs), SOFTENING[1])
        if every:
            rest_s = np.maximum(ended_s - np.array([0.0, *self.ended_s]), 0.0)
            _add(sums[2], rest_s, SOFTENING[2])
        return sums


class RemainingMemory:
    """Learns at the end of every workflow. The memory of 256 kinds is bounded; the one unheard of for longest goes.

    A memory may begin with what all workflows of another did, `common`; raises PredictorError for other arrays.

    A kind is judged against all workflows: where it differs, by how much around this number of calls, held back by
    two workflows' worth of doubt (empirical Bayes); where many went through the same place, that place alone speaks. A
    kind that nobody has seen gets what all do.
    """

    def __init__(self, common: Mapping[str, NDArray[Any]] | None = None) -> None:
        self._sums: OrderedDict[str, dict[str, Sums]] = OrderedDict()
        shape = (len(QUANTITIES), _PLACES, 4)
        self._all: dict[bool, Sums] = {every: np.zeros(shape) for every in (True, False)}
        for every, name in _COMMON.items() if common is not None else ():
            sums = None if common is None else common.get(name)
            if sums is None or sums.shape != shape or not np.isfinite(sums).all():
                raise PredictorError(
                    f"the memory to begin with has no usable array {name!r} of shape {shape}; write it again with "
                    "`swarmx train`."
                )
            self._all[every] = sums.astype(np.float64)
        self._levels: dict[bool, Sums] = {}
        self._cached: dict[tuple[str, str, int, int], tuple[Recall, Recall, Recall]] = {}

    def __len__(self) -> int:
        return len(self._sums)

    def common(self) -> dict[str, NDArray[Any]]:
        """What all workflows had before them, to begin another memory with; it counts like a hundred workflows."""
        arrays: dict[str, NDArray[Any]] = {}
        for every, name in _COMMON.items():
            sums = self._all[every]
            arrays[name] = (sums * min(1.0, _COMMON_WEIGHT / max(1.0, sums[0, 0, 0]))).astype(np.float32)
        return arrays

    def save(self, folder: Path, card: Mapping[str, Any]) -> Card:
        """Write what all workflows had before them, for `load_remaining_memory`."""
        return save_arrays(folder, MEMORY, self.common(), card)

    def models(self, kind: str) -> tuple[str, ...]:
        """The models that workflows of the kind are known to call."""
        return tuple(model for model in self._sums.get(kind, ()) if model != EVERY_MODEL)

    def learn(self, kind: str, trail: Trail, *, ended_s: float) -> None:
        """A workflow has come to its own end, `ended_s` after its beginning (NaN unknown)."""
        names = list(dict.fromkeys(trail.models))
        self.add(kind, {name: trail.sums(name, ended_s=ended_s) for name in (EVERY_MODEL, *names[:MOST_MODELS])})

    def add(self, kind: str, parts: dict[str, Sums], weight: float = 1.0) -> None:
        """Add a workflow's sums by model, or take them away again (`weight` -1: forecasts out of sample)."""
        known = self._sums.setdefault(kind, {})
        self._sums.move_to_end(kind)
        for model, sums in parts.items():
            if model not in known and len(known) > MOST_MODELS:
                continue
            every = model == EVERY_MODEL
            self._all[every] += weight * sums
            own = known.setdefault(model, np.zeros_like(sums))
            if weight > 0.0 and own[0, 0, 0] >= 2.0 * _RECENT:
                self._all[every] -= own / 2.0
                own /= 2.0
            own += weight * sums
        if len(self._sums) > MOST_KINDS:
            _, gone = self._sums.popitem(last=False)
            for model, sums in gone.items():  # what all do outlives the kind, at the weight of two workflows
                share = min(1.0, _PRIOR / max(sums[0, 0, 0], 1e-9))
                self._all[model == EVERY_MODEL] -= (1.0 - share) * sums
        self._cached.clear()
        self._levels.clear()

    def recall(self, kind: str, model: str, arrived: int, ended: int) -> tuple[Recall, Recall, Recall]:
        """What workflows still have before them after so many calls, for each of `QUANTITIES`."""
        key = (kind, model, _place(arrived), _place(ended))
        found = self._cached.get(key)
        if found is None:
            if len(self._cached) >= _MOST_CACHED:
                self._cached.clear()
            found = self._cached[key] = self._recall(*key)
        return found

    def _recall(self, kind: str, model: str, arrived: int, ended: int) -> tuple[Recall, Recall, Recall]:
        level = self._level(every=model == EVERY_MODEL)
        own = self._sums.get(kind, {}).get(model)
        answers = []
        for q, place in enumerate((arrived, ended, ended)):
            mean, variance, ending = level[q, place, 0], level[q, place, 1], level[q, place, 2]
            evidence = 0.0
            if own is not None:
                near = _KERNEL[place]
                n, x, xx, zero = own[q].T
                evidence = max(0.0, float(near @ n))
                expected = level[q, :, 0]
                offset = near @ (x - n * expected) / (evidence + _PRIOR)
                centre = expected + offset
                squares = max(0.0, float(near @ (xx - 2.0 * centre * x + centre * centre * n)))
                mean = mean + offset
                variance = (squares + _PRIOR * variance) / (evidence + _PRIOR)
                ending = (near @ zero + _PRIOR * ending) / (evidence + _PRIOR)
                # What was seen at this very place counts beside what was seen around it.
                here = max(0.0, n[place])
                mean = (x[place] + _AROUND * mean) / (here + _AROUND)
                squares = max(0.0, xx[place] - 2.0 * mean * x[place] + mean * mean * here)
                variance = (squares + _AROUND * variance) / (here + _AROUND)
                ending = (zero[place] + _AROUND * ending) / (here + _AROUND)
            answers.append(Recall(float(mean), math.sqrt(variance), float(ending), evidence))
        return answers[0], answers[1], answers[2]

    def _level(self, *, every: bool) -> Sums:
        """[quantities, places, 3]: mean, variance and share of endings of all workflows, smoothed over near places."""
        level = self._levels.get(every)
        if level is None:
            near = np.einsum("ij,qjk->qik", _KERNEL, self._all[every])
            total = self._all[every].sum(axis=1, keepdims=True)
            typical = (total[..., 1] + _PRIOR * _FIRST_MEAN[:, None]) / (total[..., 0] + _PRIOR)
            n = np.maximum(near[..., 0], 0.0) + _PRIOR
            mean = (near[..., 1] + _PRIOR * typical) / n
            around = near[..., 2] - 2.0 * mean * near[..., 1] + mean * mean * near[..., 0]
            variance = (np.maximum(around, 0.0) + _PRIOR * _FIRST_VARIANCE) / n
            ending = (near[..., 3] + _PRIOR * 0.1) / n
            level = self._levels[every] = np.stack([mean, variance, ending], axis=2)
        return level


# Before the first workflow: about five calls, 800 tokens, 20 s, give or take a factor of three.
_FIRST_MEAN = np.log(np.array([5.0, 800.0, 20.0]) + SOFTENING)
_FIRST_VARIANCE = 1.0


def load_remaining_memory(folder: Path) -> RemainingMemory:
    """A memory that begins with what is in the folder. Raises PredictorError."""
    arrays, _ = load_arrays(folder, MEMORY)
    return RemainingMemory(arrays)


def _after(amounts: Floats) -> Floats:
    """[n + 1]: what is still to come after 0 ... n of them."""
    return np.concatenate([np.cumsum(amounts[::-1])[::-1], [0.0]])


def _add(sums: Floats, rest: Floats, softening: float) -> None:
    known = np.isfinite(rest)
    places = np.fromiter(_places(len(rest)), dtype=np.int64, count=len(rest))[known]
    x = np.log(rest[known] + softening)
    # Of several points in one place each counts for its part, so that a place holds one workflow once.
    share = 1.0 / np.bincount(places, minlength=_PLACES)[places]
    for column, values in enumerate((np.ones_like(x), x, x * x, (rest[known] <= 0.0).astype(np.float64))):
        np.add.at(sums[:, column], places, share * values)


def _place(calls: int) -> int:
    if calls < _EXACT:
        return calls
    return min(_PLACES - 1, _EXACT + int(6.0 * math.log2(calls / _EXACT)))


def _places(count: int) -> Iterable[int]:
    return (_place(n) for n in range(count))
