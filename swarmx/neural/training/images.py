"""Training data of the image head: measured ComfyUI flows, and graphs that were reduced to their classes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from swarmx.neural.facts import UNKNOWN_DEVICE, device_facts
from swarmx.neural.heads.comfy_graph import ImageJob, eight_bit, kinds, model_size_b
from swarmx.neural.heads.images import IMAGE, Factors, ImageHistory, estimate_s, image_rows
from swarmx.neural.splits import Split, split_of
from swarmx.neural.table import Table
from swarmx.neural.training.fit import FitSettings
from swarmx.neural.training.latency_data import read_table

IMAGE_SETTINGS = FitSettings(
    nets=3, hidden=32, epochs=60, patience=12, batch=256, dropout=0.1, weight_decay=0.1, emphasis=0.0
)

_DEVICES = {
    "A100": "a100", "A100-40GB": "a100-40gb", "H100": "h100", "L40S": "l40s", "M2_Max": "m2-max",
    "RTX3090": "rtx-3090", "RTX4000Ada": "rtx-4000-ada", "RTX4070TiS": "rtx-4070-ti-super", "RTX5090": "rtx-5090",
    "RTX6000Ada": "rtx-6000-ada", "RTXPRO6000": "rtx-pro-6000", "RX7900XTX": "rx-7900-xtx", "RTX4090": "rtx-4090",
}  # fmt: skip
_STEPS = re.compile(r"(\d+)_?steps")
_FOLDS, _BLIND_WEIGHT = 10, 0.3


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One measured flow; `graph` is its key in a history, which tells cases and cold starts apart."""

    split: Split
    flow: str
    graph: str
    device: str
    job: ImageJob
    cold: bool
    seconds: float


def runs(folder: Path) -> list[Run]:
    """The measured flows of `folder`. Raises PredictorError when a table is missing or misses a column.

    The split is by pair of flow and device: a test row's flow was seen on other devices, and its device with other
    flows. What is unseen altogether is measured by leaving it out (`leave_out`).
    """
    graphs = {
        row["flow"]: row
        for row in read_table(
            folder / "comfyui_flow_graphs.csv", ("flow", "n_nodes", "n_edges", "steps", "classes")
        ).iter_rows(named=True)
    }
    columns = ("date", "gpu", "flow", "test_case", "weights_unloaded", "exec_s")
    table = read_table(folder / "measured_comfyui_flows.parquet", columns)
    found = []
    for row in table.sort(columns, nulls_last=True).iter_rows(named=True):
        if not row["exec_s"] or row["exec_s"] <= 0.0:
            continue
        flow, case, cold = row["flow"], row["test_case"] or "", bool(row["weights_unloaded"])
        device = _DEVICES.get(row["gpu"], row["gpu"].lower())
        found.append(
            Run(
                split=split_of("row", f"{flow}|{device}"),
                flow=flow,
                graph=f"{flow}/{case}/{'cold' if cold else 'warm'}",
                device=device,
                job=_job(flow, case, graphs.get(flow) or graphs.get(flow.removesuffix("_8bit"))),
                cold=cold,
                seconds=float(row["exec_s"]),
            )
        )
    return found


def table(found: Sequence[Run], *, seed: int = 0) -> Table:
    """Rows of the image head. Test rows know the history of all training and validation rows.

    Training and validation rows know the history of all but their own tenth, by pair of flow and device, so that their
    own outcome is in none of their features; each comes three times: as it is, with a graph that was never seen, and
    with a device that was never seen, whose facts one time in two are not known either.
    """
    rng = np.random.default_rng(seed)
    past = [run for run in found if run.split != "test"]
    fold = {run: int(rng.integers(_FOLDS)) for run in sorted({(r.flow, r.device) for r in past})}
    histories = [history([r for r in past if fold[r.flow, r.device] != k]) for k in range(_FOLDS)]
    everything = history(past)
    rows, facts, factors, weight = list[Run](), [], list[Factors](), list[float]()
    for run in found:
        known = everything if run.split == "test" else histories[fold[run.flow, run.device]]
        rows.append(run)
        weight.append(1.0)
        facts.append(device_facts(run.device))
        factors.append(known.factors(run.graph, run.device))
        if run.split == "test":
            continue
        rows += [run, run]
        weight += [_BLIND_WEIGHT, _BLIND_WEIGHT]
        facts += [device_facts(run.device), device_facts(run.device) if rng.random() < 0.5 else UNKNOWN_DEVICE]
        factors += [known.factors("", run.device), known.factors(run.graph, "")]
    features, anchor = image_rows([r.job for r in rows], facts, [r.cold for r in rows], factors)
    return Table(
        features=features,
        anchor=anchor,
        target=np.array([r.seconds for r in rows], dtype=np.float64),
        censored=np.zeros(len(rows), dtype=bool),
        weight=np.array(weight),
        group=np.array(["cold" if r.cold else "warm" for r in rows]),
        split=np.array([r.split for r in rows]),
    )


def tables(folder: Path) -> dict[str, Table]:
    """The table of the image head by its name."""
    return {IMAGE.name: table(runs(folder))}


def history(found: Sequence[Run]) -> ImageHistory:
    """What these runs leave behind."""
    made = ImageHistory()
    for run in found:
        made.observe(run.graph, run.device, log_factor(run))
    return made


def log_factor(run: Run) -> float:
    """How much longer than the estimate it took, as a logarithm."""
    return math.log(run.seconds / estimate_s(run.job, device_facts(run.device), cold=run.cold))


def leave_out(found: Sequence[Run], test: NDArray[np.bool_]) -> list[Run]:
    """The same runs, split anew: those where `test` is true against all others, a tenth of which validate, by hash of
    the pair. For a refit that has never seen a device, or a flow."""
    made = []
    for run, held in zip(found, test.tolist(), strict=True):
        inner: Split = "validation" if split_of("task", f"{run.flow}|{run.device}") == "validation" else "train"
        made.append(msgspec.structs.replace(run, split="test" if held else inner))
    return made


def _job(flow: str, case: str, graph: dict[str, object] | None) -> ImageJob:
    """From a graph's classes (each once), the steps of its samplers where they are literal, and the case's name.

    No checkpoint is named: the model is guessed from the flow's name and the classes, as elsewhere from the weights'.
    No resolution is given: one megapixel a picture is the flows' default.
    """
    classes = str(graph["classes"]).split(",") if graph else []
    counts = kinds(classes)
    literal = [float(s) for s in re.findall(r"\d+", str(graph["steps"]))] if graph else []
    steps = [float(match[1])] if (match := _STEPS.search(case)) else literal
    samplers = max(counts["samplers"], len(literal))
    total = math.fsum(steps) if steps else math.nan
    return ImageJob(
        nodes=float(graph["n_nodes"]) if graph else math.nan,  # type: ignore[arg-type]  # a column of numbers
        links=float(graph["n_edges"]) if graph else math.nan,  # type: ignore[arg-type]
        steps=total,
        megapixels=1.0 if samplers else math.nan,
        batch=1.0 if samplers else math.nan,
        work=total if samplers else math.nan,
        model_b=model_size_b([flow, *classes]) if samplers else math.nan,
        eight_bit=eight_bit([flow]),
        **{**counts, "samplers": samplers},
    )
