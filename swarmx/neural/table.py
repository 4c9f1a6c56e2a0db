"""Training data of one head as columns, whatever it was read from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swarmx.neural.head import Floats
from swarmx.neural.net import Floats32


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of one head's data; every array has `rows` as its first dimension.

    `features` [rows, features] float32, in the order of the head's spec, NaN where unknown; `anchor` [rows] as in
    `HeadSpec`; `target` [rows] in the spec's unit; `censored` [rows]: the truth is at least `target` (cancelled, or
    still running when seen); `weight` [rows] of the row in the loss; `group` [rows] names the calibration group;
    `split` [rows] "train", "validation" or "test".
    """

    features: Floats32
    anchor: Floats
    target: Floats
    censored: NDArray[np.bool_]
    weight: Floats
    group: NDArray[np.str_]
    split: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.target)

    def where(self, rows: NDArray[np.bool_]) -> Table:
        """The rows for which `rows` [rows] is true."""
        return Table(
            features=self.features[rows],
            anchor=self.anchor[rows],
            target=self.target[rows],
            censored=self.censored[rows],
            weight=self.weight[rows],
            group=self.group[rows],
            split=self.split[rows],
        )

    def part(self, split: str) -> Table:
        """The rows of one split."""
        return self.where(self.split == split)
