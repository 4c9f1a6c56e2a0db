"""Online tracking: moves the quantiles of a head after its outcomes within tens of observations of a change."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from swarmx.neural.checkpoint import middle_of
from swarmx.neural.head import Floats

ANY = ""
Key = tuple[str, str]  # prompt class, device

_NORMAL_ABS = math.sqrt(2.0 / math.pi)  # mean absolute value of a standard normal
_MEDIAN_VARIANCE = math.pi / 2.0  # of its median, times the number of observations
_LOG_SPREAD_VARIANCE = 0.6  # of the logarithm of its mean absolute deviation, likewise
_LEAST_SPREAD = 1e-3
_MOST_STRETCH = 5.0
_MOST_FINE = 3.0  # spreads
_OFTEN_UNTIL, _SELDOM = 32, 8  # estimates are made anew every time, and later every eighth


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackerSettings:
    """How fast and how far a tracker follows; chosen on validation prompts under the drifts of `python -m eval.drift`.

    A key keeps its last `window` residuals. A change is called when the cumulative sum of standardised residuals,
    less `allowance` each and held within `clip`, reaches `alarm`; what came before the change is then forgotten. A
    shift or stretch counts in full when it is far above its standard error and not at all below `doubt` of its
    variance. `step` is that of the fine correction at each level, in spreads, of which the share `leak` is lost with
    every observation. At most `most_keys` keys are kept.
    """

    window: int = 200
    allowance: float = 0.5
    clip: float = 2.5
    alarm: float = 8.0
    doubt: float = 2.0
    least_stretch: int = 4
    step: float = 0.05
    leak: float = 0.002
    most_keys: int = 2000


class QuantileTracker:
    """Corrects the log quantiles [K] of one head by (prompt class, device), from how its latest forecasts did.

        corrected = middle + shift + stretch * (q - middle + fine)

    in the logarithm. `shift` is the median of the residuals since the last change that was called (Page's cumulative
    sum, Biometrika 41, 1954), `stretch` the ratio of their spread to the one that was forecast; both are drawn to what
    is known of the coarser key ((class, any), (any, device), all of the head, nothing) by as much as they may be
    chance, so that a young key follows the others and a correction that is no longer needed fades. `fine` [K] is
    adaptive conformal inference at each level (Gibbs and Candès, NeurIPS 2021; the quantile tracker of Angelopoulos,
    Candès and Tibshirani, NeurIPS 2023). A step alone is slow for a tail: it moves by a tenth of its size when a
    forecast is too high. Everything is deterministic.
    """

    def __init__(self, levels: Sequence[float], settings: TrackerSettings | None = None) -> None:
        self.levels = tuple(levels)
        self.settings = settings or TrackerSettings()
        self._middle = middle_of(self.levels)
        self._low = min(range(len(levels)), key=lambda k: abs(levels[k] - 0.1))
        self._high = min(range(len(levels)), key=lambda k: abs(levels[k] - 0.9))
        normal = NormalDist()
        self._spans = abs(normal.inv_cdf(levels[self._low])), abs(normal.inv_cdf(levels[self._high]))
        self._nodes: OrderedDict[Key, _Node] = OrderedDict()

    @property
    def keys(self) -> int:
        """How many keys are remembered, coarse ones too."""
        return len(self._nodes)

    def correct(self, prompt_class: str, device: str, log_q: Floats) -> Floats:
        """The log quantiles [K] as they should have been, if all stays as it is: finite and rising."""
        nodes = [node for key in _keys(prompt_class, device) if (node := self._nodes.get(key)) is not None]
        return np.array(self._moved(log_q.tolist(), nodes)) if nodes else log_q

    def observe(self, prompt_class: str, device: str, log_q: Floats, log_y: float) -> None:
        """Learn from one outcome: `log_q` [K] is what the head itself said, before any correction.

        Numbers that are not finite are not learnt from.
        """
        said: list[float] = log_q.tolist()
        if not (math.isfinite(log_y) and all(map(math.isfinite, said))):
            return
        spread = max(_LEAST_SPREAD, (said[self._high] - said[self._low]) / sum(self._spans))
        nodes: list[_Node] = []
        for key in _keys(prompt_class, device):
            nodes.append(self._node(key))
            q = self._moved(said, nodes)
            z = self._standardised(log_y, q)
            nodes[-1].add(log_y - said[self._middle], spread, z, self.settings)
            nodes[-1].adjust([log_y > each for each in q], spread, self.levels, self.settings)

    def shift(self, prompt_class: str, device: str) -> float:
        """What is added to the middle log quantile now."""
        nodes = [node for key in _keys(prompt_class, device) if (node := self._nodes.get(key)) is not None]
        return self._joint(nodes)[0]

    def reset(self) -> None:
        """Forget everything: the head has other weights now. What the old ones said must not be observed after."""
        self._nodes.clear()

    def _joint(self, nodes: Sequence[_Node]) -> tuple[float, float]:
        """Shift and log stretch of the last of these nodes, coarse to fine, in view of the others."""
        shift = log_stretch = 0.0
        doubt = self.settings.doubt
        for node in nodes:
            shift += _beyond_chance(node.shift - shift, doubt * node.shift_variance)
            log_stretch += _beyond_chance(node.log_stretch - log_stretch, doubt * node.stretch_variance)
        return shift, log_stretch

    def _moved(self, q: list[float], nodes: Sequence[_Node]) -> list[float]:
        """Lists and not arrays: at eight levels they take a fifth of the time."""
        shift, log_stretch = self._joint(nodes)
        fine = next((node.fine for node in reversed(nodes) if node.count >= _OFTEN_UNTIL), nodes[0].fine)
        stretch, middle, highest = math.exp(log_stretch), q[self._middle], -math.inf
        moved = []
        for said, more in zip(q, fine, strict=True):
            highest = max(highest, middle + shift + stretch * (said - middle + more))
            moved.append(highest)
        return moved

    def _standardised(self, log_y: float, q: list[float]) -> float:
        """The residual in standard deviations of the forecast's upper or lower half."""
        residual = log_y - q[self._middle]
        if residual > 0.0:
            half = (q[self._high] - q[self._middle]) / self._spans[1]
        else:
            half = (q[self._middle] - q[self._low]) / self._spans[0]
        return residual / max(_LEAST_SPREAD, half)

    def _node(self, key: Key) -> _Node:
        node = self._nodes.get(key)
        if node is None:
            node = self._nodes[key] = _Node(len(self.levels))
            while len(self._nodes) > self.settings.most_keys:
                self._nodes.popitem(last=False)
        self._nodes.move_to_end(key)
        return node


class _Node:
    """What is known of one key: residuals since the last change, and what follows from them."""

    __slots__ = (
        "_ordered", "_recent", "_runs", "_sums", "count", "fine", "log_stretch", "shift", "shift_variance",
        "stretch_variance",
    )  # fmt: skip

    def __init__(self, levels: int) -> None:
        self.count = 0
        self.shift, self.shift_variance = 0.0, math.inf
        self.log_stretch, self.stretch_variance = 0.0, math.inf
        self.fine = [0.0] * levels
        self._recent: deque[tuple[float, float]] = deque()  # residual of the middle, spread that was forecast
        self._ordered: list[float] = []  # the residuals again
        self._sums = [0.0, 0.0]  # of what is too high, and too low
        self._runs = [0, 0]  # observations since each was zero

    def add(self, residual: float, spread: float, z: float, settings: TrackerSettings) -> None:
        """One more residual; `z` is that of the corrected forecast, in its standard deviations."""
        self.count += 1
        self._recent.append((residual, spread))
        insort(self._ordered, residual)
        if len(self._recent) > settings.window:
            self._drop_oldest()
        changed = self._accumulate(z, settings)
        if changed or len(self._recent) <= _OFTEN_UNTIL or self.count % _SELDOM == 0:
            self._estimate(settings)

    def adjust(self, above: Sequence[bool], spread: float, levels: Sequence[float], settings: TrackerSettings) -> None:
        """Move each level by its step: up after an outcome above it, down by so much less after one below."""
        keep, step, most = 1.0 - settings.leak, settings.step * spread, _MOST_FINE * spread
        self.fine = [
            min(most, max(-most, keep * fine + step * (is_above - 1.0 + level)))
            for fine, is_above, level in zip(self.fine, above, levels, strict=True)
        ]

    def _accumulate(self, z: float, settings: TrackerSettings) -> bool:
        """Page's test; on an alarm all that came before the change is forgotten."""
        z = min(settings.clip, max(-settings.clip, z))
        for side, excess in enumerate((z - settings.allowance, -z - settings.allowance)):
            self._sums[side] = max(0.0, self._sums[side] + excess)
            self._runs[side] = self._runs[side] + 1 if self._sums[side] > 0.0 else 0
        if max(self._sums) < settings.alarm:
            return False
        kept = self._runs[0] if self._sums[0] >= self._sums[1] else self._runs[1]
        while len(self._recent) > kept:
            self._drop_oldest()
        self._sums, self._runs = [0.0, 0.0], [0, 0]
        return True

    def _drop_oldest(self) -> None:
        residual, _ = self._recent.popleft()
        del self._ordered[bisect_left(self._ordered, residual)]

    def _estimate(self, settings: TrackerSettings) -> None:
        n = len(self._ordered)
        self.shift = (self._ordered[(n - 1) // 2] + self._ordered[n // 2]) / 2.0
        if n >= settings.least_stretch:
            away = sorted(abs(residual - self.shift) / spread for residual, spread in self._recent)
            most = 7.5 * away[n // 2] + 1e-9  # one absurd outcome must not widen all
            ratio = sum(min(most, each) for each in away) / _NORMAL_ABS / (n - 1)
            self.log_stretch = math.log(min(_MOST_STRETCH, max(1.0 / _MOST_STRETCH, ratio)))
            self.stretch_variance = _LOG_SPREAD_VARIANCE / n
        scale = math.exp(self.log_stretch) * sum(spread for _, spread in self._recent) / n
        self.shift_variance = _MEDIAN_VARIANCE * scale * scale / n


def _keys(prompt_class: str, device: str) -> tuple[Key, ...]:
    """From coarse to fine."""
    if device == ANY:
        return (ANY, ANY), (prompt_class, ANY)
    return (ANY, ANY), (ANY, device), (prompt_class, ANY), (prompt_class, device)


def _beyond_chance(estimate: float, variance: float) -> float:
    """The estimate less what may be chance (James and Stein's shrinkage, positive part)."""
    square = estimate * estimate
    return 0.0 if square <= variance else estimate * (1.0 - variance / square)
