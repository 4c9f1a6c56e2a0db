"""A head: named features in, K monotone quantiles of one quantity out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256

import msgspec
import numpy as np
from numpy.typing import NDArray

from swarmx.core.forecast import LEVELS, Forecast, Unit
from swarmx.neural.net import Floats32, QuantileNet

Floats = NDArray[np.float64]

_MOST_EXPONENT = 40.0


class HeadSpec(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """What a head reads and forecasts. Weights fit one spec only: `key` changes with every part of it.

    A head works on the logarithm: y = exp(anchor + net(x)) - softening, so that errors are factors. `anchor` [batch]
    is what is expected without the network, log(expected + softening): an analytic model's word, or a running mean.
    `softening` is a small amount in `unit` that keeps zero in reach.
    """

    name: str
    version: int
    features: tuple[str, ...]
    unit: Unit
    softening: float
    levels: tuple[float, ...] = LEVELS

    @cached_property
    def key(self) -> str:
        return sha256(msgspec.json.encode(self)).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Head:
    """A trained head: networks whose quantiles are averaged, and what calibration adds to them.

    `mean` and `scale` [features] standardise the inputs; a feature that is NaN counts as its mean, one that is far out
    is held at `limit` standard deviations. `shifts` [K] by group are added to the log quantiles (split conformal,
    `neural.calibration`); "" is for groups without their own.
    """

    spec: HeadSpec
    mean: Floats32
    scale: Floats32
    nets: tuple[QuantileNet, ...]
    shifts: dict[str, Floats32] = field(default_factory=dict)
    version: str = ""
    limit: float = 6.0

    def log_quantiles(self, features: Floats32, anchor: Floats, groups: Sequence[str] | str = "") -> Floats:
        """[batch, K] quantiles of log(y + softening), which rise, from raw features [batch, features]."""
        x = self.standardised(features)
        q = self.nets[0](x)
        for net in self.nets[1:]:
            q += net(x)
        if len(self.nets) > 1:
            q /= len(self.nets)
        if self.shifts:
            if isinstance(groups, str):
                q += self._shift(groups)
            else:
                q += np.stack([self._shift(group) for group in groups])
            np.maximum.accumulate(q, axis=1, out=q)
        log_q: Floats = q + np.asarray(anchor, dtype=np.float64)[:, None]
        return log_q

    def log_quantiles_of(self, features: Floats32, anchor: float, group: str = "") -> Floats:
        """[K], the same for one row of features [features]: half the price of a batch of one."""
        x = self.standardised(features)
        q = self.nets[0](x)
        for net in self.nets[1:]:
            q += net(x)
        if len(self.nets) > 1:
            q /= len(self.nets)
        if self.shifts:
            q += self._shift(group)
            np.maximum.accumulate(q, out=q)
        log_q: Floats = q.astype(np.float64)
        log_q += anchor
        return log_q

    def standardised(self, features: Floats32) -> Floats32:
        """What the networks read of raw features, same shape."""
        x: Floats32 = features - self.mean
        x /= self.scale
        np.maximum(x, -self.limit, out=x)  # cheaper than np.clip; NaN stays NaN
        np.minimum(x, self.limit, out=x)
        x[x != x] = 0.0
        return x

    def quantiles(self, features: Floats32, anchor: Floats, groups: Sequence[str] | str = "") -> Floats:
        """[batch, K] quantiles in `spec.unit`: finite, not negative, rising along K."""
        log_q = np.clip(self.log_quantiles(features, anchor, groups), -_MOST_EXPONENT, _MOST_EXPONENT)
        q: Floats = np.exp(log_q) - self.spec.softening
        return np.maximum(q, 0.0, out=q)

    def forecast(self, features: Floats32, anchor: float, group: str = "") -> Forecast:
        """The forecast of one row of features [features]."""
        log_q = self.log_quantiles_of(features, anchor, group)
        np.maximum(log_q, -_MOST_EXPONENT, out=log_q)
        np.minimum(log_q, _MOST_EXPONENT, out=log_q)
        q = np.maximum(np.exp(log_q) - self.spec.softening, 0.0)
        return Forecast(
            levels=self.spec.levels,
            quantiles=tuple(q.tolist()),
            unit=self.spec.unit,
            source="neural",
            version=self.version,
        )

    def _shift(self, group: str) -> Floats32:
        shift = self.shifts.get(group)
        return self.shifts[""] if shift is None else shift
