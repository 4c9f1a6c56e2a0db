"""A predictor report in a folder: pictures, JSON, and a page that needs neither (no scripts, pictures inside)."""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import jinja2
import msgspec

from swarmx.neural.report import PredictorReport
from swarmx.neural.scores import Scores

_PAGE = Path(__file__).with_suffix(".html")


Plots = list[list[tuple[str, bool]]]


class Drawing(Protocol):
    """Who draws; `neural.training.plots` does, where matplotlib is installed."""

    def calibration_plot(self, curves: Mapping[str, Mapping[str, float]]) -> bytes: ...
    def loss_plot(self, parts: Mapping[str, Scores], dimension: str, overall: Scores) -> bytes: ...


def write_report(out: Path, report: PredictorReport, drawing: Drawing) -> list[Path]:
    """Write report.html, report.json and the pictures; returns their paths, the page first."""
    pictures: dict[str, bytes] = {}
    plots: Plots = []
    card = next((card for card in report.cards if card.name == "length" and card.calibration), None)
    for number, found in enumerate(report.sets, 1):
        curves = {found.name: found.calibration}
        if card is not None:
            curves["the card of the weights"] = card.calibration
        names = [(f"calibration-{number}.png", False)]
        pictures[names[0][0]] = drawing.calibration_plot(curves)
        for dimension in ("model", "role"):
            if len(found.by.get(dimension, {})) > 1:
                names.append((f"loss-by-{dimension}-{number}.png", True))
                pictures[names[-1][0]] = drawing.loss_plot(found.by[dimension], dimension, found.overall)
        plots.append(names)
    written = {
        "report.html": report_page(report, plots, pictures).encode(),
        "report.json": msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n",
        **pictures,
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, raw in written.items():
        (out / name).write_bytes(raw)
    return [out / name for name in written]


def report_page(report: PredictorReport, plots: Plots, pictures: Mapping[str, bytes]) -> str:
    """The page; `plots` names the pictures (PNG) of each set, and whether each is a wide one."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"num": _number, "percent": _percent}
    inside = {name: f"data:image/png;base64,{b64encode(picture).decode()}" for name, picture in pictures.items()}
    return environment.from_string(_PAGE.read_text(encoding="utf-8")).render(
        report=report, plots=plots, pictures=inside, off=_off
    )


def _off(value: float, level: str, rows: int) -> bool:
    """Whether an observed coverage is further from its level than chance explains."""
    p = float(level)
    return abs(value - p) > 3.0 * math.sqrt(p * (1.0 - p) / rows) + 0.01


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"
