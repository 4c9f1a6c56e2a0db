"""What the structure head has to beat: empirical quantiles, linear quantile regression and gradient boosting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import lightgbm
import numpy as np
from numpy.typing import NDArray

from swarmx.core.forecast import LEVELS
from swarmx.neural.head import Floats
from swarmx.neural.losses import pinball
from swarmx.neural.table import Table
from swarmx.neural.training.structure import StructureRows

Mask = NDArray[np.bool_]


class Smoothing(NamedTuple):
    """How the empirical baseline groups: rows of the same kind (or domain) within so many steps, at least so many."""

    by: str
    window: int
    enough: int


SMOOTHINGS = [Smoothing(by, window, enough) for by in ("kind", "domain") for window in (0, 1, 2, 3, 5)
              for enough in (4, 8, 16, 32)]  # fmt: skip


class Samples(NamedTuple):
    """Outcomes [rows] with the step, kind and domain (as numbers) at which they were seen."""

    step: NDArray[np.int64]
    kind: NDArray[np.int64]
    domain: NDArray[np.int64]
    rest: Floats

    def at(self, rows: Mask) -> Samples:
        return Samples(self.step[rows], self.kind[rows], self.domain[rows], self.rest[rows])


def samples_of(rows: StructureRows, quantity: str) -> Samples:
    """Calls by calls arrived, the others by calls ended; one model's rows are a kind of their own."""
    subject = np.char.add(np.char.add(rows.kind, "|"), rows.model)
    family = np.char.add(np.char.add(rows.domain, "|"), (rows.model != "").astype(str))
    return Samples(
        step=rows.arrived if quantity == "calls" else rows.ended,
        kind=np.unique(subject, return_inverse=True)[1],
        domain=np.unique(family, return_inverse=True)[1],
        rest=rows.tables[quantity].target,
    )


def constant(train: Samples, asked: Samples, by: str = "") -> Floats:
    """[rows, K]: the same quantiles for all, or for all of a kind, whatever has happened so far."""
    return empirical(train, asked, Smoothing(by or "all", 10**6, 8))


def empirical(train: Samples, asked: Samples, smoothing: Smoothing) -> Floats:
    """[rows, K]: quantiles of what sessions of the kind still had before them after as many steps.

    Where fewer than `enough` were seen, those of the domain are taken, then all at these steps, then all at or beyond
    the last step that enough were seen at.
    """
    found: dict[tuple[int, int, int], Floats] = {}
    everybody = np.ones(len(train.rest), dtype=np.bool_)
    quantiles = np.empty((len(asked.rest), len(LEVELS)))
    for i, (step, kind, domain) in enumerate(zip(asked.step, asked.kind, asked.domain, strict=True)):
        key = (int(step), int(kind), int(domain))
        if key not in found:
            near = np.abs(train.step - step) <= smoothing.window
            groups = [everybody]
            if smoothing.by != "all":
                groups.insert(0, train.domain == domain)
            if smoothing.by == "kind":
                groups.insert(0, train.kind == kind)
            chosen = next((rows for group in groups if (rows := near & group).sum() >= smoothing.enough), None)
            if chosen is None:
                last = np.sort(train.step)[-min(len(train.step), smoothing.enough)]
                chosen = train.step >= min(step, last)
            found[key] = np.quantile(train.rest[chosen], LEVELS)
        quantiles[i] = found[key]
    return quantiles


def best_smoothing(train: Samples, validation: Samples, choices: Sequence[Smoothing] = SMOOTHINGS) -> Smoothing:
    """The choice with the least pinball loss on the validation rows."""
    return min(choices, key=lambda s: pinball(validation.rest, empirical(train, validation, s), LEVELS).mean())


class Boosting(NamedTuple):
    """LightGBM's settings that validation chooses among; `logs` learns the logarithm over the memory's anchor."""

    leaves: int
    logs: bool


def boosted(table: Table, softening: float, settings: Boosting, asked: Table) -> Floats:
    """[rows, K]: one LightGBM model a level, stopped early by the validation rows; crossing quantiles are sorted."""
    train, validation = table.part("train"), table.part("validation")
    columns = []
    for level in LEVELS:
        model = lightgbm.LGBMRegressor(
            objective="quantile", alpha=level, num_leaves=settings.leaves, n_estimators=200, learning_rate=0.1,
            min_child_samples=40, colsample_bytree=0.7, subsample=0.7, subsample_freq=1, reg_lambda=1.0, n_jobs=1,
            random_state=0, verbosity=-1,
        )  # fmt: skip
        target = _logs if settings.logs else _plain
        model.fit(
            train.features, target(train, softening), sample_weight=_weight(train, settings.logs),
            eval_X=validation.features, eval_y=target(validation, softening),
            eval_sample_weight=[_weight(validation, settings.logs)],
            callbacks=[lightgbm.early_stopping(20, verbose=False)],
        )  # fmt: skip
        columns.append(np.asarray(model.predict(asked.features), dtype=np.float64))
    return _in_units(np.sort(np.stack(columns, axis=1), axis=1), asked, softening, logs=settings.logs)


def linear(table: Table, softening: float, asked: Table, rounds: int = 40) -> Floats:
    """[rows, K]: linear quantile regression of the logarithm over the anchor, a little ridge.

    By majorise-minimise (Hunter and Lange, JCGS 9, 2000): each round is a weighted least squares.
    """
    train = table.part("train")
    known = np.where(np.isnan(train.features).all(axis=0), 0.0, train.features)
    mean, scale = np.nanmean(known, axis=0), np.nanstd(known, axis=0) + 1e-6

    def design(rows: Table) -> Floats:
        x = np.clip(np.nan_to_num((rows.features - mean) / scale), -6.0, 6.0)
        return np.hstack([x, np.ones((len(x), 1))]).astype(np.float64)

    ridge = 10.0 * np.eye(train.features.shape[1] + 1)
    x, y, weight = design(train), _logs(train, softening), _weight(train, logs=True)
    at = design(asked)
    columns = []
    for level in LEVELS:
        beta: Floats = np.zeros(x.shape[1])
        for _ in range(rounds):
            error = y - x @ beta
            w = weight / (0.01 + np.abs(error))
            xw = x * w[:, None]
            drift = (2.0 * level - 1.0) * (weight @ x)
            beta = _solved(x.T @ xw + ridge, xw.T @ y + drift)
        columns.append(at @ beta)
    return _in_units(np.sort(np.stack(columns, axis=1), axis=1), asked, softening, logs=True)


def boostings() -> Iterator[Boosting]:
    """What validation chooses among."""
    yield from (Boosting(7, True), Boosting(31, True), Boosting(15, False))


def _solved(matrix: Floats, right: Floats) -> Floats:
    return np.asarray(np.linalg.solve(matrix, right), dtype=np.float64)


def _logs(rows: Table, softening: float) -> Floats:
    return np.log(rows.target + softening) - rows.anchor


def _plain(rows: Table, softening: float) -> Floats:
    return rows.target


def _weight(rows: Table, logs: bool) -> Floats:
    if not logs:
        return rows.weight
    size: Floats = np.clip(np.exp(rows.anchor - np.median(rows.anchor)), 0.05, 20.0) ** 0.5
    return rows.weight * size


def _in_units(values: Floats, asked: Table, softening: float, *, logs: bool) -> Floats:
    if logs:
        values = np.exp(np.clip(values + asked.anchor[:, None], -40.0, 40.0)) - softening
    return np.maximum(values, 0.0)
