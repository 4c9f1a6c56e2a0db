"""Gradient-boosted regression trees of at most 64 leaves, evaluated for many rows at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swarmx.core.fleet import Floats

DEPTH = 6
NODES = 2**DEPTH - 1
LEAVES = 2**DEPTH

Masks = NDArray[np.uint64]


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeEnsemble:
    """The sum of trees, by QuickScorer (Lucchese et al., SIGIR 2015).

    Each tree has a word with a bit a leaf, leaf 0 lowest. A row that exceeds a node's threshold cannot end to the left
    of it, which clears those bits; the lowest bit left over is its leaf. `masks[f][r]`, shape [trees], is what the
    nodes that ask about feature f leave over of a row that exceeds the first r of their thresholds, `cuts[f]`. So a
    row costs one look-up per feature instead of one per node. `leaves` has shape [trees, LEAVES].
    """

    cuts: tuple[Floats, ...]
    masks: tuple[Masks, ...]
    leaves: Floats

    def predict(self, rows: Floats) -> Floats:
        """One value a row, of shape [rows]; `rows` has shape [rows, features]."""
        left = np.full((len(rows), len(self.leaves)), np.iinfo(np.uint64).max, dtype=np.uint64)
        for column, cuts, masks in zip(rows.T, self.cuts, self.masks, strict=True):
            if len(cuts):
                left &= masks[np.searchsorted(cuts, column, side="left")]
        lowest = left & (~left + np.uint64(1))
        leaf = (lowest.astype(np.float64).view(np.int64) >> 52) - 1023  # the exponent of a power of two
        leaf += np.arange(0, self.leaves.size, LEAVES)
        total: Floats = self.leaves.ravel()[leaf].sum(axis=1)
        return total


def trees_from(arrays: Mapping[str, NDArray[Any]], name: str, features: int) -> TreeEnsemble:
    """The trees `name` among the arrays, complete and in heap order (the children of node i are 2i + 1 and 2i + 2).

    `{name}_feature` and `{name}_threshold`, shape [trees, NODES]: a row goes right where its feature exceeds the
    threshold; a node with an infinite one is none. `{name}_leaf`, shape [trees, LEAVES].
    """
    feature, threshold = arrays[f"{name}_feature"], arrays[f"{name}_threshold"].astype(np.float64)
    trees, cleared = len(feature), _left_leaves()
    real = np.isfinite(threshold)
    cuts, masks = [], []
    for f in range(features):
        tree, node = ((feature == f) & real).nonzero()
        cut, rank = np.unique(threshold[tree, node], return_inverse=True)
        mask = np.full((len(cut) + 1, trees), np.iinfo(np.uint64).max, dtype=np.uint64)
        np.bitwise_and.at(mask, (rank + 1, tree), ~cleared[node])
        cuts.append(cut)
        masks.append(np.bitwise_and.accumulate(mask, axis=0))
    return TreeEnsemble(cuts=tuple(cuts), masks=tuple(masks), leaves=arrays[f"{name}_leaf"].astype(np.float64))


def _left_leaves() -> Masks:
    """The leaves to the left of each node, as bits; shape [NODES]."""
    bits = []
    for node in range(NODES):
        depth = (node + 1).bit_length() - 1
        width = LEAVES >> depth
        first = (node + 1 - 2**depth) * width
        bits.append(((1 << width // 2) - 1) << first)
    return np.array(bits, dtype=np.uint64)
