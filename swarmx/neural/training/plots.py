"""The plots of a predictor report, as PNG."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from io import BytesIO

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from swarmx.neural.scores import Scores

_DPI = 120
_MOST_BARS = 20
_MOST_CHARACTERS = 34
_INK, _BLUE, _GREY = "#1b1f24", "#0b5cad", "#9aa4af"


def calibration_plot(curves: Mapping[str, Mapping[str, float]]) -> bytes:
    """Observed coverage against level, a line for each name: on the diagonal a forecast is calibrated."""
    figure = Figure(figsize=(5.2, 4.6), layout="constrained", dpi=_DPI)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=_GREY, linewidth=1, linestyle="--", label="calibrated")
    for name, curve in curves.items():
        levels = [float(level) for level in curve]
        axes.plot(levels, list(curve.values()), marker="o", markersize=4, linewidth=1.5, label=_short(name))
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_aspect("equal")
    axes.set_xlabel("level of the quantile")
    axes.set_ylabel("share of outcomes at or below it")
    axes.legend(loc="upper left", frameon=False, fontsize=8)
    _plain(axes)
    return _png(figure)


def loss_plot(parts: Mapping[str, Scores], dimension: str, overall: Scores) -> bytes:
    """The relative pinball loss by label, worst first, with that of all rows as a line."""
    worst = sorted(parts.items(), key=lambda item: item[1].pinball_log, reverse=True)[:_MOST_BARS]
    figure = Figure(figsize=(6.4, 1.1 + 0.27 * len(worst)), layout="constrained", dpi=_DPI)
    axes = figure.subplots()
    names = [f"{_short(name)} ({scores.rows:,})" for name, scores in worst]
    axes.barh(range(len(worst)), [scores.pinball_log for _, scores in worst], color=_BLUE, height=0.65)
    axes.set_yticks(range(len(worst)), names, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(overall.pinball_log, color=_INK, linewidth=1, linestyle="--", label="all rows")
    axes.set_xlabel(f"pinball loss of the logarithm, by {dimension} (rows)")
    axes.legend(loc="lower right", frameon=False, fontsize=8)
    _plain(axes)
    return _png(figure)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, axis="x", color="#e3e7ec", linewidth=0.6)
    axes.set_axisbelow(True)


def _png(figure: Figure) -> bytes:
    out = BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a script that the font lacks is drawn as boxes
        figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _short(name: str) -> str:
    """Clients choose names: no mathematics in them, and none is longer than its place."""
    name = name if len(name) <= _MOST_CHARACTERS else name[: _MOST_CHARACTERS - 1] + "…"
    return name.replace("$", r"\$")
