"""A host with GPUs and a vLLM for them, for tests of where servers are placed and how they are started.

As a program it is `vllm serve`: it takes the arguments that vLLM takes and nothing else, claims its share of memory as
vLLM does, and answers as an emulated engine. What it holds is a file in a folder, counted while its process lives.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from swarmx.providers.gpus import Gpu
from tests.e2e.fleet import alive

GIB = 2**30
OVERHEAD_BYTES = 400 * 2**20  # what CUDA takes, beside the share
ROOT = Path(__file__).parents[2]


def gpu(index: int, *, total: int = 80, free: int | None = None, name: str = "NVIDIA H100", **more: str) -> Gpu:
    """`total` and `free` are in GiB."""
    room = total if free is None else free
    return Gpu(index=index, uuid=f"GPU-{index}", name=name, total_bytes=total * GIB, free_bytes=room * GIB, **more)


def numbers(gpus: Sequence[Gpu]) -> list[int]:
    return [found.index for found in gpus]


class TableGpus:
    """GPUs by a table, less what the servers in `held` hold of them."""

    def __init__(self, table: Sequence[Gpu], held: Path) -> None:
        self.table = list(table)
        self._held = held
        held.mkdir(exist_ok=True)
        self.reads = 0

    def read(self) -> Sequence[Gpu]:
        self.reads += 1
        return [replace(gpu, free_bytes=gpu.free_bytes - held_bytes(self._held, gpu.index)) for gpu in self.table]


def held_bytes(folder: Path, index: int) -> int:
    """What servers that live hold of a GPU."""
    by_server = [json.loads(file.read_text()) for file in folder.glob("*.json") if alive(int(file.stem))]
    return sum(held.get(str(index), 0) for held in by_server)


def vllm(folder: Path, held: Path, gpus: Sequence[Gpu]) -> Path:
    """Write the program that stands in for vLLM on a host with these GPUs."""
    totals = {str(gpu.index): gpu.free_bytes for gpu in gpus}
    program = folder / "vllm"
    program.write_text(
        f"#!/bin/sh\nHELD={held} TOTALS={shlex.quote(json.dumps(totals))} PYTHONPATH={ROOT} "
        f'exec {sys.executable} -m tests.providers.gpu_stand_in "$@"\n'
    )
    program.chmod(0o755)
    return program


def serve(arguments: Sequence[str], env: Mapping[str, str]) -> Sequence[str]:
    """Load as vLLM would; returns the arguments of the engine that answers then. Ends the process when it fails."""
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("folder", type=Path)
    for text in ("served-model-name", "host", "load-format", "scheduling-policy"):
        parser.add_argument(f"--{text}", default="")
    for number in ("port", "tensor-parallel-size", "max-num-seqs", "max-model-len"):
        parser.add_argument(f"--{number}", type=int, default=1)
    parser.add_argument("--gpu-memory-utilization", type=float, required=True)
    asked = parser.parse_args(arguments)
    print(
        json.dumps({"argv": arguments, **{k: v for k, v in env.items() if k.startswith(("CUDA", "HF_"))}}), flush=True
    )

    held, totals = Path(env["HELD"]), json.loads(env["TOTALS"])
    on = [int(number) for number in env["CUDA_VISIBLE_DEVICES"].split(",")]  # vLLM 0.22 reads nothing else
    if len(on) != asked.tensor_parallel_size:
        sys.exit(f"{asked.tensor_parallel_size} GPUs are wanted, {len(on)} can be seen")
    for index in on:
        try:
            (held / f"loading-{index}").touch(exist_ok=False)
        except FileExistsError:
            sys.exit(f"another server loads on GPU {index}")
        free = totals[str(index)] - held_bytes(held, index)
        if free - OVERHEAD_BYTES < asked.gpu_memory_utilization * totals[str(index)]:
            sys.exit(f"Free memory on device cuda:0 ({free / GIB:.2f} GiB) on startup is less than desired")
    while any((held / f"hold-{index}").exists() for index in on):
        time.sleep(0.01)
    taken = {index: int(asked.gpu_memory_utilization * totals[str(index)]) + OVERHEAD_BYTES for index in on}
    (held / f"{os.getpid()}.json").write_text(json.dumps(taken))
    for index in on:
        (held / f"loading-{index}").unlink()
    if (asked.folder / "broken").exists():
        sys.exit("CUDA out of memory")
    return (
        *("--model", asked.served_model_name, "--device", "stand-in", "--port", str(asked.port)),
        *("--profile-json", '{"step_base_s": 0.001}'),
    )


if __name__ == "__main__":
    engine = serve(sys.argv[1:], os.environ)
    os.execv(sys.executable, [sys.executable, "-m", "swarmx.providers.emulated", *engine])  # noqa: S606  # it goes on as this process
