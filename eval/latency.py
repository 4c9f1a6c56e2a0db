"""How well latencies are foreseen: `python -m eval.latency --engine DIR --out DIR`.

The heads for TTFT, completion and image seconds against the engine model alone, its residuals, linear quantile
regression and LightGBM on the same features; on conditions that were not trained on (`training.latency_data`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import torch
from sklearn.linear_model import QuantileRegressor

from eval.result import Claim, Row, claim, table, write_result
from swarmx.core.forecast import LEVELS
from swarmx.neural.calibration import conformal_shifts
from swarmx.neural.head import Floats, HeadSpec
from swarmx.neural.heads.images import IMAGE
from swarmx.neural.heads.latency import COMPLETION, TTFT
from swarmx.neural.losses import coverage, pinball
from swarmx.neural.table import Table
from swarmx.neural.training import images, latency
from swarmx.neural.training.fit import FitSettings, fit

OURS = "swarmx"
_LINEAR_ROWS = 3000  # the simplex of the linear programme is slow
_TREES: tuple[dict[str, Any], ...] = (
    {"num_leaves": 15, "min_child_samples": 10},
    {"num_leaves": 31, "min_child_samples": 20},
    {"num_leaves": 63, "min_child_samples": 10},
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the result."""
    parser = argparse.ArgumentParser(prog="python -m eval.latency", description=__doc__)
    parser.add_argument("--engine", type=Path, required=True, help="folder of engine and ComfyUI measurements")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--quick", action="store_true", help="few epochs and trees; says nothing about quality")
    parser.add_argument("--out", type=Path, required=True, help="folder for result.json and result.md")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    tables = {**latency.tables(options.engine), **images.tables(options.engine)}
    settings = {
        TTFT: latency.TTFT_SETTINGS,
        COMPLETION: latency.COMPLETION_SETTINGS,
        IMAGE: images.IMAGE_SETTINGS,
    }
    rows = [
        row
        for spec, how in settings.items()
        for row in compare(spec, tables[spec.name], how, options.seeds, quick=options.quick)
    ]
    claims = list(claims_of(rows))
    command = " ".join(["python -m eval.latency", *(sys.argv[1:] if arguments is None else arguments)])
    files = sorted(options.engine.glob("measured_*.parquet"))
    path = write_result(options.out, command, rows, claims, options.seeds, files)
    print(table(rows))
    for made in claims:
        print(f"{made.name}: {made.value:.3f} {made.op} {made.aim:g} {'met' if made.met else 'NOT met'}")
    print(f"Written to {path}.")
    return 0


def compare(
    spec: HeadSpec, data: Table, settings: FitSettings, seeds: Sequence[int], *, quick: bool = False
) -> Iterator[Row]:
    """One row a method, for ours one a seed, on the test rows."""
    train, validation, test = (data.part(split) for split in ("train", "validation", "test"))
    rest, held = _rest(spec, train), _rest(spec, validation)
    yield _row(spec, test, "engine_model", np.zeros((len(test), len(LEVELS))))
    yield _row(spec, test, "engine_model_residuals", np.tile(np.quantile(rest, LEVELS), (len(test), 1)))
    yield _row(spec, test, "linear_quantile", _linear(train, rest, test))
    trees = [_boosted(train, rest, validation, held, test, shape, 20 if quick else 400) for shape in _TREES]
    yield _row(spec, test, "lightgbm", min(trees, key=lambda found: found[0])[1])
    for seed in seeds:
        how = replace(settings, seed=seed, epochs=2 if quick else settings.epochs)
        head = fit(data, spec, how)
        if spec == TTFT:  # as `swarmx train` does
            head = replace(head, shifts=conformal_shifts(head, validation))
        log_q = head.log_quantiles(test.features, test.anchor, list(test.group)) - test.anchor[:, None]
        yield _row(spec, test, OURS, log_q, seed=seed)


def claims_of(rows: Sequence[Row]) -> Iterator[Claim]:
    """Ours, as the median over seeds, against the best of the others; and the error of image seconds."""
    for what in dict.fromkeys(str(row["what"]) for row in rows):
        of = [row for row in rows if row["what"] == what]
        ours = float(np.median([float(row["pinball_log"] or 0.0) for row in of if row["method"] == OURS]))
        best = min(float(row["pinball_log"] or 0.0) for row in of if row["method"] != OURS)
        yield claim(f"latency_pinball_vs_best@{what}", ours / best, "<=", 1.0)
    errors = [float(row["mdape"] or 0.0) for row in rows if row["what"] == IMAGE.name and row["method"] == OURS]
    if errors:
        yield claim("image_mdape", float(np.median(errors)), "<=", 0.15)


def _rest(spec: HeadSpec, part: Table) -> Floats:
    rest: Floats = np.log(part.target + spec.softening) - part.anchor
    return rest


def _row(spec: HeadSpec, test: Table, method: str, log_rest: Floats, *, seed: int | None = None) -> Row:
    """Scores of quantiles [rows, K] of the logarithm over the anchor."""
    log_q = np.clip(np.sort(log_rest, axis=1) + test.anchor[:, None], -40.0, 40.0)
    q = np.maximum(np.exp(log_q) - spec.softening, 0.0)
    log_y = np.log(test.target + spec.softening)
    middle = q[:, LEVELS.index(0.5)]
    return {
        "experiment": "latency",
        "what": spec.name,
        "method": method,
        "seed": seed,
        "n": len(test),
        "pinball_log": float(pinball(log_y, log_q, LEVELS).mean()),
        "pinball_s": float(pinball(test.target, q, LEVELS).mean()),
        "mdape": float(np.median(np.abs(middle - test.target) / test.target)),
        "cover_50": coverage(test.target, q, LEVELS, 0.5),
        "cover_90": coverage(test.target, q, LEVELS, 0.9),
        "cover_99": coverage(test.target, q, LEVELS, 0.99),
    }


def _linear(train: Table, rest: Floats, test: Table) -> Floats:
    with np.errstate(invalid="ignore"):
        mean, scale = np.nanmean(train.features, axis=0), np.nanstd(train.features, axis=0)
    scale[~(scale > 1e-6)] = 1.0
    known, asked = (np.clip(np.nan_to_num((t.features - mean) / scale), -6.0, 6.0) for t in (train, test))
    rows = np.random.default_rng(0).permutation(len(known))[:_LINEAR_ROWS]
    made = [
        QuantileRegressor(quantile=level, alpha=1e-4, solver="highs")
        .fit(known[rows], rest[rows], sample_weight=train.weight[rows])
        .predict(asked)
        for level in LEVELS
    ]
    return np.stack(made, axis=1)


def _boosted(
    train: Table, rest: Floats, validation: Table, held: Floats, test: Table, shape: dict[str, Any], trees: int
) -> tuple[float, Floats]:
    """The validation loss of one shape of trees, and its quantiles of the test rows."""
    loss, made = 0.0, []
    for level in LEVELS:
        model = lightgbm.LGBMRegressor(
            objective="quantile", alpha=level, learning_rate=0.05, n_estimators=trees, subsample=0.8, subsample_freq=1,
            colsample_bytree=0.8, n_jobs=1, seed=0, verbose=-1, **shape,
        )  # fmt: skip
        model.fit(
            train.features,
            rest,
            sample_weight=train.weight,
            eval_X=validation.features,
            eval_y=held,
            eval_sample_weight=[validation.weight],
            callbacks=[lightgbm.early_stopping(30, verbose=False)],
        )
        loss += model.best_score_["valid_0"]["quantile"]
        made.append(model.predict(test.features))
    return loss, np.stack(made, axis=1)


if __name__ == "__main__":
    sys.exit(main())
