"""Quantile regressions of the logarithm over an anchor: linear, LightGBM and XGBoost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lightgbm
import numpy as np
import torch
import xgboost

from eval.baselines.columns import Design
from swarmx.core.forecast import LEVELS
from swarmx.neural.head import Floats

Learner = Literal["linear", "lightgbm", "xgboost"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What validation chooses. `emphasis` weighs a row by exp(anchor) to this power, as our head does.

    `identity` shows the trees which model it is; `over_anchor` lets them learn what the encodings leave over instead
    of the logarithm itself; `leaves` is a depth of log2 for XGBoost; `decay` is that of the linear one.
    """

    emphasis: float = 0.25
    identity: bool = True
    over_anchor: bool = True
    leaves: int = 15
    least_rows: int = 200
    rate: float = 0.05
    rounds: int = 500
    decay: float = 1e-3
    epochs: int = 25


def forecast(
    learner: Learner, train: Design, held: Design, asked: Sequence[Design], settings: Settings, seed: int
) -> list[Floats]:
    """[asked, K] quantiles in tokens for each design in `asked`.

    `held` stops the training, and its residuals shift each level to its share of the rows (split conformal), as they
    do for our head.
    """
    fitted = {"linear": _linear, "lightgbm": _lightgbm, "xgboost": _xgboost}[learner]
    scale = float(np.median(train.anchor))
    predicted = fitted(train, held, [held, *asked], settings, scale, seed)
    base = [d.anchor if settings.over_anchor else np.zeros(len(d.target)) for d in (held, *asked)]
    log_q = [np.sort(p, axis=1) + b[:, None] for p, b in zip(predicted, base, strict=True)]
    rest = np.sort(held.target[:, None] - log_q[0], axis=0)
    ranks = [min(len(rest), max(1, int(np.ceil((len(rest) + 1) * level)))) - 1 for level in LEVELS]
    shift = rest[ranks, np.arange(len(LEVELS))]
    return [np.maximum(np.exp(np.clip(np.sort(q + shift, axis=1), 0.0, 16.0)) - 1.0, 0.0) for q in log_q[1:]]


def _goal(design: Design, settings: Settings) -> Floats:
    goal: Floats = design.target - design.anchor if settings.over_anchor else design.target
    return goal


def _weight(design: Design, settings: Settings, scale: float) -> Floats:
    size = np.clip(np.exp(np.clip(design.anchor - scale, -20.0, 20.0)), 0.05, 20.0)
    weight: Floats = design.weight * size**settings.emphasis
    return weight


def _x(design: Design, settings: Settings) -> Floats:
    return design.x if settings.identity else design.x[:, :-1]


def _lightgbm(
    train: Design, held: Design, asked: Sequence[Design], settings: Settings, scale: float, seed: int
) -> list[Floats]:
    categorical = [train.x.shape[1] - 1] if settings.identity and np.isfinite(train.x[:, -1]).any() else []
    shared: dict[str, Any] = {"verbosity": -1, "max_bin": 63, "num_threads": 1}
    data = lightgbm.Dataset(
        _x(train, settings), _goal(train, settings), weight=_weight(train, settings, scale),
        categorical_feature=categorical, params=shared, free_raw_data=False,
    )  # fmt: skip
    checked = lightgbm.Dataset(
        _x(held, settings), _goal(held, settings), weight=_weight(held, settings, scale), reference=data,
        categorical_feature=categorical, params=shared, free_raw_data=False,
    )  # fmt: skip
    columns: list[list[Floats]] = [[] for _ in asked]
    for level in LEVELS:
        booster = lightgbm.train(
            {
                "objective": "quantile", "alpha": level, "metric": "quantile", "learning_rate": settings.rate,
                "num_leaves": settings.leaves, "min_data_in_leaf": settings.least_rows, "feature_fraction": 0.5,
                "bagging_fraction": 0.8, "bagging_freq": 1, "lambda_l2": 1.0, "seed": seed, "deterministic": True,
                "force_col_wise": True, "cat_smooth": 50.0, **shared,
            },
            data, settings.rounds, valid_sets=[checked],
            callbacks=[lightgbm.early_stopping(25, verbose=False)],
        )  # fmt: skip
        for column, design in zip(columns, asked, strict=True):
            column.append(np.asarray(booster.predict(_x(design, settings), num_threads=1), dtype=np.float64))
    return [np.stack(column, axis=1) for column in columns]


def _xgboost(
    train: Design, held: Design, asked: Sequence[Design], settings: Settings, scale: float, seed: int
) -> list[Floats]:
    width = train.x.shape[1]
    kinds = ["q"] * (width - 1) + (["c"] if settings.identity else [])

    def matrix(design: Design) -> Any:
        return xgboost.QuantileDMatrix(
            _x(design, settings), _goal(design, settings), weight=_weight(design, settings, scale), max_bin=63,
            feature_types=kinds, enable_categorical=True, ref=data, nthread=1,
        )  # fmt: skip

    data: Any = None
    data = matrix(train)
    booster = xgboost.train(
        {
            "objective": "reg:quantileerror", "quantile_alpha": np.array(LEVELS), "tree_method": "hist",
            "max_leaves": settings.leaves, "max_depth": 0, "grow_policy": "lossguide", "eta": settings.rate,
            "min_child_weight": settings.least_rows / 4.0, "subsample": 0.8, "colsample_bytree": 0.5, "lambda": 1.0,
            "seed": seed, "nthread": 1, "max_bin": 63, "verbosity": 0,
        },
        data, settings.rounds, evals=[(matrix(held), "held")], early_stopping_rounds=25, verbose_eval=False,
    )  # fmt: skip
    best = (0, int(booster.best_iteration) + 1)
    return [np.asarray(booster.predict(matrix(d), iteration_range=best), dtype=np.float64) for d in asked]


def _linear(
    train: Design, held: Design, asked: Sequence[Design], settings: Settings, scale: float, seed: int
) -> list[Floats]:
    """All levels at once by stochastic gradients on the pinball loss; the best epoch on `held` counts."""
    known = train.x[:, :-1]
    with np.errstate(invalid="ignore"):
        filled = np.where(np.isnan(known).all(axis=0), 0.0, known)
        mean, deviation = np.nanmean(filled, axis=0), np.nanstd(filled, axis=0)
    deviation = np.where(deviation < 1e-6, 1.0, deviation)

    def standard(design: Design) -> torch.Tensor:
        x = np.clip((design.x[:, :-1] - mean) / deviation, -6.0, 6.0)
        return torch.from_numpy(np.nan_to_num(x).astype(np.float32))

    def column(values: Floats) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.float32))[:, None]

    torch.manual_seed(seed)
    x, y, w = standard(train), column(_goal(train, settings)), column(_weight(train, settings, scale))
    held_x, held_y, held_w = standard(held), column(_goal(held, settings)), column(_weight(held, settings, scale))
    tau = torch.tensor(LEVELS)
    layer = torch.nn.Linear(x.shape[1], len(LEVELS))
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.quantile(y[:, 0][:: max(1, len(y) // 5000)], tau))
    optimiser = torch.optim.AdamW(layer.parameters(), lr=3e-3, weight_decay=settings.decay)

    def loss(q: torch.Tensor, goal: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        error = goal - q
        return (torch.maximum(tau * error, (tau - 1.0) * error) * weight).mean()

    best, state = float("inf"), {name: value.clone() for name, value in layer.state_dict().items()}
    for epoch in range(settings.epochs):
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * (0.02 + 0.98 * (1.0 + np.cos(np.pi * epoch / settings.epochs)) / 2.0)
        for rows in torch.split(torch.randperm(len(x)), 512):
            optimiser.zero_grad()
            loss(layer(x[rows]), y[rows], w[rows]).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        with torch.no_grad():
            now = float(loss(layer(held_x), held_y, held_w))
        if now < best:
            best, state = now, {name: value.clone() for name, value in layer.state_dict().items()}
    layer.load_state_dict(state)
    with torch.no_grad():
        return [layer(standard(design)).numpy().astype(np.float64) for design in asked]
