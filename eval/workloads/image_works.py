"""How much work images are: measured ComfyUI flows, in megapixel-steps of the device that ran them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from eval.workloads.draft import FLUX, SDXL, DrawnImage
from eval.workloads.reading import read_table, refuse, table_file
from swarmx.core.engine import profiles
from swarmx.core.errors import ConfigError
from swarmx.neural.training.images import runs

FLOWS, GRAPHS = "measured_comfyui_flows.parquet", "comfyui_flow_graphs.csv"

_SDXL_B = (2.0, 3.0)  # billions of parameters of its denoiser and of those that derive from it


def flow_files(source: Path) -> list[Path]:
    """The two tables in a folder; given one of the files, the other is next to it."""
    folder = source if source.is_dir() else source.parent
    return [table_file(folder, FLOWS), table_file(folder, GRAPHS)]


@dataclass(frozen=True, slots=True)
class ImageWorks:
    """Measured runs by model of the fleet; those of one flow, on other devices, have one source."""

    works: Mapping[str, tuple[DrawnImage, ...]]

    def draw(self, model: str, rng: np.random.Generator) -> DrawnImage:
        """One of them, as likely as it was measured."""
        measured = self.works[model]
        return measured[int(rng.integers(len(measured)))]


def read_images(source: Path) -> ImageWorks:
    """The work of the measured runs: their seconds, by what a megapixel-step takes on the same device.

    So an image comes to its measured time on that device, with all that its flow does besides sampling. Flows of
    SDXL's size stand for sdxl, those of Flux.1-dev for flux-dev; runs that had to load their weights, and devices
    without a profile, are left out. Nothing learns from them, as a request for an image tells its work; so few of
    them, divided, would be two different loads. Raises ConfigError.
    """
    files = flow_files(source)
    table = read_table(files[0], ("flow", "gpu", "exec_s"))
    refuse(table, (pl.col("exec_s") < 0.0).fill_null(False), files[0], "a negative exec_s", "flow")
    works: dict[str, list[DrawnImage]] = {SDXL: [], FLUX: []}
    measured = runs(files[0].parent)
    numbers = {flow: number for number, flow in enumerate(sorted({run.flow for run in measured}))}
    for run in measured:
        model = (
            FLUX if run.flow.startswith("flux1_dev") else SDXL if _SDXL_B[0] <= run.job.model_b <= _SDXL_B[1] else ""
        )
        profile = profiles().get((model, run.device))
        if profile is None or run.cold:
            continue
        work = max(1, round((run.seconds - profile.call_base_s) / profile.step_base_s))
        works[model].append(DrawnImage(work, numbers[run.flow]))
    for model, found in works.items():
        if not found:
            raise ConfigError(f"{files[0]} has no run that could stand for {model}.")
    return ImageWorks({model: tuple(sorted(found)) for model, found in works.items()})
