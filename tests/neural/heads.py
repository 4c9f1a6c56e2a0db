"""A small head that knows its data, and tables of that data, with lengths that may have changed since."""

from __future__ import annotations

import numpy as np

from swarmx.core.forecast import LEVELS
from swarmx.neural.head import Head, HeadSpec
from swarmx.neural.net import Floats32, QuantileNet
from swarmx.neural.table import Table

SPEC = HeadSpec(name="toy", version=1, features=("size", "noise"), unit="tokens", softening=1.0)
SPREAD = 0.4
ANCHOR = 5.0
_MIDDLE = LEVELS.index(0.5)
_Z = np.array([-1.645, -1.2816, -0.6745, 0.0, 0.6745, 1.2816, 1.645, 2.3263])


def a_head(*, shifts: dict[str, Floats32] | None = None, version: str = "toy-0") -> Head:
    """log(y + 1) = 5 + 0.5 size + 0.4 normal noise, as `a_table` with factor 1 has it."""
    steps = np.abs(np.diff(SPREAD * _Z))
    bias = np.zeros(len(LEVELS))
    bias[:_MIDDLE], bias[_MIDDLE + 1 :] = (s - 1.0 / s for s in (steps[:_MIDDLE], steps[_MIDDLE:]))
    skip = np.zeros((2, len(LEVELS)))
    skip[0, _MIDDLE] = 0.5
    rng = np.random.default_rng(3)
    net = QuantileNet(
        hidden=rng.normal(size=(2, 8)).astype(np.float32),
        hidden_bias=np.zeros(8, dtype=np.float32),
        out=np.zeros((8, len(LEVELS)), dtype=np.float32),
        skip=skip.astype(np.float32),
        out_bias=bias.astype(np.float32),
        middle=_MIDDLE,
    )
    one = np.ones(2, dtype=np.float32)
    return Head(spec=SPEC, mean=0 * one, scale=one, nets=(net,), shifts=shifts or {}, version=version)


def a_table(*, rows: int, factor: float, seed: int = 1) -> Table:
    """So many outcomes, `factor` times as long as the head thinks; every fifth is held back."""
    rng = np.random.default_rng(seed)
    size = rng.normal(size=rows)
    log_y = ANCHOR + 0.5 * size + SPREAD * rng.normal(size=rows) + np.log(factor)
    return Table(
        features=np.column_stack([size, rng.normal(size=rows)]).astype(np.float32),
        anchor=np.full(rows, ANCHOR),
        target=np.maximum(0.0, np.exp(log_y) - 1.0),
        censored=np.zeros(rows, dtype=np.bool_),
        weight=np.ones(rows),
        group=np.full(rows, "toy"),
        split=np.where(np.arange(rows) % 5 == 4, "validation", "train"),
    )
