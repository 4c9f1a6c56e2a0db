"""Scores of length forecasts by part, intervals over prompts, and the plots of the comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import kendalltau

from eval.baselines.empirical import Rows, capped
from eval.result import Row
from swarmx.core.forecast import LEVELS
from swarmx.neural.head import Floats
from swarmx.neural.losses import coverage, crps, pinball
from swarmx.neural.training.lengths import Lengths

Numbers = dict[str, float]

_MIDDLE = LEVELS.index(0.5)
_FEWEST = 20
_RESAMPLES = 1000


def scores(lengths: Lengths, rows: Rows, quantiles: Floats) -> Numbers:
    """All scores of forecasts [rows, K] in tokens; coverage is one sided but for `central_`."""
    tokens, q = lengths.tokens[rows], capped(lengths, rows, quantiles)
    log_q = np.log(q + 1.0)
    numbers = {
        "pinball": float(pinball(tokens, q, LEVELS).mean()),
        "log_pinball": float(pinball(np.log(tokens + 1.0), log_q, LEVELS).mean()),
        "crps": float(crps(tokens, q, LEVELS).mean()),
    }
    for level in (0.5, 0.8, 0.9, 0.99):
        numbers[f"coverage_{round(100 * level)}"] = coverage(tokens, q, LEVELS, level)
    for low, high in ((2, 4), (1, 5), (0, 6)):
        inside = (tokens > q[:, low]) & (tokens <= q[:, high])
        numbers[f"central_{round(100 * (LEVELS[high] - LEVELS[low]))}"] = float(inside.mean())
    middle = q[:, _MIDDLE]
    numbers["kendall_tau"] = tau(middle, tokens)
    within, weight = 0.0, 0
    for model in np.unique(lengths.model[rows]):
        of_model = lengths.model[rows] == model
        if of_model.sum() >= _FEWEST:
            within += tau(middle[of_model], tokens[of_model]) * int(of_model.sum())
            weight += int(of_model.sum())
    numbers["kendall_tau_within_model"] = within / weight if weight else float("nan")
    return numbers


def tau(forecast: Floats, truth: Floats) -> float:
    """Kendall's tau-b of the two; a constant forecast has none, so 0."""
    if len(truth) < 2 or np.ptp(forecast) == 0.0 or np.ptp(truth) == 0.0:
        return 0.0
    return float(kendalltau(forecast, truth).statistic)


def over_seeds(many: Sequence[Numbers]) -> Numbers:
    """Medians, and the range of the pinball loss."""
    middle = {name: float(np.median([numbers[name] for numbers in many])) for name in many[0]}
    losses = [numbers["pinball"] for numbers in many]
    return middle | {"pinball_least": min(losses), "pinball_most": max(losses)}


def ratio_interval(ours: Floats, theirs: Floats, prompt: NDArray[np.int64]) -> tuple[float, float, float]:
    """The ratio of mean losses, and its middle 95 % when the prompts are drawn again with replacement."""
    _, number = np.unique(prompt, return_inverse=True)
    a, b = np.bincount(number, weights=ours), np.bincount(number, weights=theirs)
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(a), size=(_RESAMPLES, len(a)))
    low, high = np.quantile(a[drawn].sum(axis=1) / b[drawn].sum(axis=1), (0.025, 0.975)).tolist()
    return float(a.sum() / b.sum()), low, high


def plot_calibration(observed: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """By regime: the share of outcomes at or below each level, of each method."""
    figure = Figure(figsize=(4.2 * len(observed), 4), layout="constrained")
    for place, (regime, curves) in enumerate(observed.items()):
        axes = figure.add_subplot(1, len(observed), place + 1)
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        for method, shares in curves.items():
            axes.plot(LEVELS, shares, marker="o", markersize=3, label=method)
        axes.set(title=regime, xlabel="level", ylabel="share of outcomes below the quantile")
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)


def plot_pinball(rows: Sequence[Row], path: Path) -> None:
    """By regime: the pinball loss of each method, best first, with the range over the seeds."""
    whole = [row for row in rows if row["experiment"] == "predictor" and row["part"] == "all"]
    regimes = list(dict.fromkeys(str(row["regime"]) for row in whole))
    figure = Figure(figsize=(5.5 * len(regimes), 5), layout="constrained")
    colours = {"ours": "tab:blue", "baseline": "tab:gray", "ablation": "tab:cyan", "bound": "tab:green"}
    for place, regime in enumerate(regimes):
        axes = figure.add_subplot(1, len(regimes), place + 1)
        shown = sorted((r for r in whole if r["regime"] == regime), key=lambda r: -float(r["pinball"] or 0.0))
        values = np.array([[float(r[n] or 0.0) for n in ("pinball", "pinball_least", "pinball_most")] for r in shown])
        spans = np.abs(values[:, 1:] - values[:, :1]).T
        axes.barh([str(r["method"]) for r in shown], values[:, 0], xerr=spans,
                  color=[colours[str(r["kind"])] for r in shown])  # fmt: skip
        axes.set(title=regime, xlabel="pinball loss, tokens")
        axes.tick_params(axis="y", labelsize=7)
    figure.savefig(path, dpi=130)
