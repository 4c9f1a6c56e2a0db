"""Calibration: split conformal shifts by group, and online tracking of the quantiles of a stream."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from swarmx.neural.head import Head
from swarmx.neural.net import Floats32
from swarmx.neural.table import Table

ENOUGH = 200


def conformal_shifts(head: Head, table: Table, *, enough: int = ENOUGH) -> dict[str, Floats32]:
    """What to add to the log quantiles [K] of each group so that each is exceeded as often as it should be.

    Split conformal prediction, one sided at each level (Romano, Patterson, Candès, NeurIPS 2019): the finite-sample
    quantile of the residuals log(y) - q on rows that the head was not trained on. Groups with fewer than `enough`
    rows share the shift of all, "". Censored rows are left out.
    """
    rows = table.where(~table.censored)
    bare = _without_shifts(head)
    log_q = bare.log_quantiles(rows.features, rows.anchor)
    residual = np.log(rows.target + head.spec.softening)[:, None] - log_q
    shifts = {"": _shift(residual, head.spec.levels)}
    for group in np.unique(rows.group).tolist():
        of_group = rows.group == group
        if of_group.sum() >= enough:
            shifts[group] = _shift(residual[of_group], head.spec.levels)
    return shifts


def _without_shifts(head: Head) -> Head:
    return Head(spec=head.spec, mean=head.mean, scale=head.scale, nets=head.nets, version=head.version)


def _shift(residual: np.ndarray, levels: Sequence[float]) -> Floats32:
    n = len(residual)
    ordered = np.sort(residual, axis=0)
    ranks = [min(n, max(1, int(np.ceil((n + 1) * level)))) - 1 for level in levels]
    return np.array([ordered[rank, k] for k, rank in enumerate(ranks)], dtype=np.float32)
