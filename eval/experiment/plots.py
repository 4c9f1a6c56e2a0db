"""Plots of a comparison: latencies of each kind, P99 against load, and throughput at the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from eval.experiment.claims import Figures
from eval.experiment.jobs import Run
from eval.experiment.measures import latencies
from eval.result import Row


def cdfs(runs: Mapping[str, Sequence[Run]], slo_s: Mapping[str, float], title: str, path: Path) -> None:
    """The share of workflows that took longer than so many seconds, one panel a kind; runs by contestant."""
    kinds = sorted(next(iter(runs.values()))[0].latency_s)
    figure, panels = _panels(len(kinds))
    for kind, panel in zip(kinds, panels, strict=False):
        for name, some in runs.items():
            seconds = np.sort(np.concatenate([latencies(run, kind) for run in some]))
            panel.step(seconds, 1.0 - np.arange(1, len(seconds) + 1) / (len(seconds) + 1), where="post", label=name)
        panel.axvline(slo_s[kind], color="0.7", linestyle=":")
        panel.set(xscale="log", yscale="log", title=kind, xlabel="seconds", ylabel="share that took longer")
        panel.xaxis.set_minor_formatter(NullFormatter())
    panels[0].legend(fontsize="x-small")
    _save(figure, title, path)


def p99_by_load(rows: Sequence[Row], policies: Sequence[str], title: str, path: Path) -> bool:
    """The geometric mean of P99, median over seeds with their range; False, and no plot, for a single load."""
    figures = Figures(rows)
    conditions = sorted({(place[0], place[2]) for place in figures.places})
    loads = {c: sorted({p[1] for p in figures.places if (p[0], p[2]) == c}) for c in conditions}
    if max(map(len, loads.values()), default=0) < 2:
        return False
    figure, panels = _panels(len(conditions))
    for condition, panel in zip(conditions, panels, strict=False):
        fleet, arrivals = condition
        for policy in policies:
            found = {
                load: list(values.values())
                for load in loads[condition]
                if (values := figures.values((fleet, load, arrivals), policy, "p99_s"))
            }
            if found:
                middle = panel.plot(list(found), [median(v) for v in found.values()], marker="o", label=policy)[0]
                panel.fill_between(
                    list(found), [min(v) for v in found.values()], [max(v) for v in found.values()], alpha=0.15,
                    color=middle.get_color(),
                )  # fmt: skip
        panel.set(yscale="log", title=f"{fleet}, {arrivals}", xlabel="share of capacity", ylabel="P99 in seconds")
    panels[0].legend(fontsize="x-small")
    _save(figure, title, path)
    return True


def throughput(rows: Sequence[Row], title: str, path: Path) -> None:
    """The highest load with few misses, one panel a fleet and kind of arrivals."""
    mine = [row for row in rows if row["experiment"] == "routing_throughput"]
    conditions = sorted({(str(row["fleet"]), str(row["arrivals"])) for row in mine})
    figure, panels = _panels(len(conditions))
    for condition, panel in zip(conditions, panels, strict=False):
        bars = [row for row in mine if (row["fleet"], row["arrivals"]) == condition]
        names = [f"{row['policy']} ({100 * float(str(row['misses'])):g} %)" for row in bars]
        panel.barh(names, [float(str(row["load"] or 0.0)) for row in bars])
        panel.set(title=f"{condition[0]}, {condition[1]}", xlabel="highest share of capacity")
    _save(figure, title, path)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    across = min(3, count)
    down = -(-count // across)
    figure = Figure(figsize=(4.6 * across, 3.6 * down))
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for panel in panels[count:]:
        panel.set_axis_off()
    return figure, panels


def _save(figure: Figure, title: str, path: Path) -> None:
    figure.suptitle(title)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
