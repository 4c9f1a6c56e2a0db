"""How `vllm serve` is called to compute on GPUs: the settings of a group as its arguments, and its environment."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from swarmx.core.errors import ConfigError
from swarmx.core.nouns import EngineOrder
from swarmx.providers.gpus import VISIBLE_VARIABLE, Gpu

ORDER_ARGUMENTS: Mapping[EngineOrder, Sequence[str]] = {
    "arrival": (),
    "priority": ("--scheduling-policy", "priority"),
}
# What SwarmX says itself, by the setting that it comes from, and what would take more GPUs than were placed.
_OWN = {
    "--host": None,
    "--port": None,
    "--uds": None,
    "--ssl-keyfile": None,
    "--ssl-certfile": None,
    "--root-path": None,
    "--api-key": None,
    "--config": None,
    "--headless": None,
    "--model": "folder",
    "--served-model-name": "model",
    "--scheduling-policy": "engine_order",
    "--gpu-memory-utilization": "gpu_memory_utilization",
    "--kv-cache-memory-bytes": "gpu_memory_utilization",
    "--tensor-parallel-size": "tensor_parallel_size",
    "-tp": "tensor_parallel_size",
    "--pipeline-parallel-size": "tensor_parallel_size",
    "-pp": "tensor_parallel_size",
    "--data-parallel-size": "max",
    "-dp": "max",
    "--max-model-len": "max_model_len",
    "--max-num-seqs": "slots",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuServing:
    """How the servers of a group use the GPUs that `device` names; None leaves the choice to vLLM.

    One takes `gpu_memory_utilization` of the memory of each of its `tensor_parallel_size` GPUs and answers `slots`
    calls at a time; `command` starts vLLM, a path or a name on PATH or beside this interpreter.
    """

    device: str
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    max_model_len: int | None = None
    slots: int | None = None
    command: str = "vllm"
    options: tuple[str, ...] = ()

    def executable(self) -> str:
        """The whole path of the command. Raises ConfigError where there is none."""
        found = shutil.which(self.command) or shutil.which(self.command, path=str(Path(sys.executable).parent))
        if found is None:
            raise ConfigError(
                f"{self.command} is neither a program nor on PATH, vLLM for GPUs was expected: "
                "install it, or name it by its whole path in the setting command."
            )
        return found

    def arguments(self, folder: str, model: str, port: str, order: EngineOrder) -> Sequence[str]:
        """Those of `vllm`, to serve the model in a folder under a name on a port of loopback."""
        more = {"--max-model-len": self.max_model_len, "--max-num-seqs": self.slots}
        return (
            *("serve", folder, "--served-model-name", model, "--host", "127.0.0.1", "--port", port),
            *("--gpu-memory-utilization", f"{self.gpu_memory_utilization:g}"),
            *("--tensor-parallel-size", str(self.tensor_parallel_size)),
            *(word for name, value in more.items() if value is not None for word in (name, str(value))),
            *ORDER_ARGUMENTS[order],
            *self.options,
        )


def environment(gpus: Sequence[Gpu]) -> Mapping[str, str]:
    """That of a server on these GPUs: by number, as NVML counts them, since vLLM 0.22 and older cannot read UUIDs.

    The model lies in a folder: nothing is to be asked of the Internet, nor told to it.
    """
    return {
        VISIBLE_VARIABLE: ",".join(str(gpu.index) for gpu in gpus),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }


def refused_option(options: Sequence[str]) -> str | None:
    """What is wrong with the first of the options that SwarmX sets itself, in any spelling that vLLM takes."""
    for option in options:
        name = option.partition("=")[0].partition(".")[0].replace("_", "-")
        own = _own(name)
        if own is not None:
            instead = f"use {_OWN[own]}" if _OWN[own] else "leave it out"
            return f"{option}: SwarmX sets {own} itself, or counts on its default; {instead}."
    return None


def _own(name: str) -> str | None:
    """The option of ours that vLLM would take the name for: argparse takes the beginning of one for all of it."""
    if name in _OWN:
        return name
    return next((own for own in _OWN if name.startswith("--") and len(name) > 2 and own.startswith(name)), None)
