"""The comparison of latency forecasts, on rows whose law is known."""

from __future__ import annotations

import numpy as np
import pytest

from eval.latency import OURS, claims_of, compare
from swarmx.neural.head import HeadSpec
from swarmx.neural.table import Table
from swarmx.neural.training.fit import FitSettings

SPEC = HeadSpec(name="made_up", version=1, features=("load",), unit="s", softening=0.01)


def a_table(rows: int = 600) -> Table:
    """Twice as long as the engine model says, and longer with load."""
    rng = np.random.default_rng(0)
    load, anchor = rng.normal(size=rows), rng.normal(size=rows)
    seconds = np.exp(anchor + np.log(2.0) + 0.5 * load + 0.1 * rng.normal(size=rows))
    return Table(
        features=load[:, None].astype(np.float32),
        anchor=anchor,
        target=seconds,
        censored=np.zeros(rows, dtype=np.bool_),
        weight=np.ones(rows),
        group=np.full(rows, "request"),
        split=np.array(["train", "train", "validation", "test"] * (rows // 4)),
    )


def test_a_method_that_reads_the_load_is_better_than_one_that_does_not() -> None:
    rows = list(
        compare(
            SPEC,
            a_table(),
            FitSettings(nets=1, epochs=120, patience=40, batch=64, learning_rate=1e-2),
            [0],
            quick=False,
        )
    )
    loss = {row["method"]: row["pinball_log"] for row in rows}
    assert set(loss) == {"engine_model", "engine_model_residuals", "linear_quantile", "lightgbm", OURS}
    assert loss[OURS] < 0.5 * loss["engine_model_residuals"] < loss["engine_model"]
    (made,) = claims_of(rows)
    assert made.name == "latency_pinball_vs_best@made_up"
    assert made.value == pytest.approx(loss[OURS] / min(value for name, value in loss.items() if name != OURS))
