"""What is read from NVML, a small library standing in for the driver's, and which GPUs a name or a variable means."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from swarmx.core.errors import ConfigError, ReplicaError
from swarmx.providers.gpus import Gpu, NvmlGpus, of_device, visible
from tests.providers.gpu_stand_in import numbers

# As the driver's library behaves at the calls that pynvml makes: an H100, one in MIG mode, and one that is lost.
NVML = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
typedef struct { unsigned long long total, free, used; } memory;
static int code(const char *name) { const char *set = getenv(name); return set ? atoi(set) : 0; }
int nvmlInitWithFlags(unsigned flags) { return code("NVML_OPENS_WITH"); }
int nvmlShutdown(void) { fputs("closed\n", stderr); return code("NVML_CLOSES_WITH"); }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 3; return code("NVML_COUNTS_WITH"); }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
  *handle = (void *)(long)(index + 1);
  return index == 2 ? 15 : 0;
}
int nvmlDeviceGetName(void *handle, char *to, unsigned size) { strcpy(to, "NVIDIA H100 80GB HBM3"); return 0; }
int nvmlDeviceGetUUID(void *handle, char *to, unsigned size) { sprintf(to, "GPU-%ld", (long)handle); return 0; }
int nvmlDeviceGetMemoryInfo(void *handle, memory *to) {
  to->total = 85520809984ULL, to->used = 1073741824ULL, to->free = to->total - to->used;
  return 0;
}
int nvmlDeviceGetMigMode(void *handle, unsigned *now, unsigned *next) {
  *now = *next = 1;
  return handle == (void *)1 ? 3 : 0;
}
"""
READ = """
import dataclasses, json
from swarmx.core.errors import ReplicaError
from swarmx.providers.gpus import NvmlGpus
try:
    print(json.dumps([dataclasses.asdict(gpu) for gpu in NvmlGpus().read()]))
except ReplicaError as error:
    print(json.dumps(str(error)))
"""
TABLE = [
    Gpu(index=0, uuid="GPU-aa00", name="NVIDIA H100 80GB HBM3", total_bytes=80, free_bytes=80),
    Gpu(index=1, uuid="GPU-aa11", name="NVIDIA H100 PCIe", total_bytes=80, free_bytes=80),
    Gpu(index=2, uuid="GPU-bb22", name="NVIDIA A100-SXM4-80GB", total_bytes=80, free_bytes=80),
    Gpu(index=3, uuid="GPU-cc33", name="NVIDIA L40S", total_bytes=48, free_bytes=48),
    Gpu(index=4, uuid="", name="unknown", total_bytes=0, free_bytes=0, fault="NVML says: GPU is lost"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "nvml.c").write_text(NVML)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "libnvidia-ml.so.1", folder / "nvml.c"], check=True)
    return folder


def read(library: Path, **variables: str) -> tuple[Any, str]:
    """What a process that finds the library reads, and what the library said."""
    env: Mapping[str, str] = {**os.environ, "LD_LIBRARY_PATH": str(library), **variables}
    done = subprocess.run([sys.executable, "-c", READ], env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout), done.stderr


@pytest.mark.process
def test_gpus_are_read_with_their_memory_and_why_some_cannot_be_used(library: Path) -> None:
    found, said = read(library, NVML_CLOSES_WITH="15")
    assert found == [
        {
            "index": 0,
            "uuid": "GPU-1",
            "name": "NVIDIA H100 80GB HBM3",
            "total_bytes": 85520809984,
            "free_bytes": 84447068160,
            "fault": None,
        },
        {**found[0], "index": 1, "uuid": "GPU-2", "fault": "it is split into instances of MIG"},
        {
            "index": 2,
            "uuid": "",
            "name": "unknown",
            "total_bytes": 0,
            "free_bytes": 0,
            "fault": "NVML says: GPU is lost",
        },
    ]
    assert said == "closed\n"


@pytest.mark.process
@pytest.mark.parametrize(
    ("when", "code", "advice"),
    [
        ("OPENS", 4, "let this user read and write /dev/nvidia*"),
        ("OPENS", 9, "load NVIDIA's driver"),
        ("OPENS", 18, "the driver was updated under way"),
        ("OPENS", 999, "see what nvidia-smi says"),
        ("COUNTS", 15, "reset it or reboot"),
    ],
)
def test_a_driver_that_does_not_work_is_an_error_that_says_what_to_do(
    library: Path, when: str, code: int, advice: str
) -> None:
    found, said = read(library, **{f"NVML_{when}_WITH": str(code)})
    assert advice in found
    assert 'use device = "cpu"' in found
    assert said == ("closed\n" if when == "COUNTS" else "")


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="NVIDIA's driver is installed here")
def test_a_host_without_a_driver_is_an_error_that_says_what_was_expected() -> None:
    with pytest.raises(ReplicaError, match=r"NVML cannot be opened: .*a working NVIDIA driver was expected: install"):
        NvmlGpus().read()


@pytest.mark.parametrize(
    ("value", "left"),
    [
        (None, [0, 1, 2, 3, 4]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("1", [1]),
        ("2, 0", [2, 0]),
        ("GPU-bb22", [2]),
        ("GPU-b,GPU-aa1,3", [2, 1, 3]),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(value: str | None, left: list[int]) -> None:
    assert numbers(visible(TABLE, value)) == left


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("7", "'7' names no GPU of this host; there are: 0 or GPU-aa00, 1 or"),
        ("0,one", "'one' names no GPU"),
        ("GPU-aa", "'GPU-aa' names several GPUs"),
        ("0,GPU-aa00", "'GPU-aa00' names a GPU twice"),
        ("GPU-aa00,MIG-5", "MIG-5: servers are placed on whole GPUs"),
    ],
)
def test_what_cuda_would_silently_leave_out_is_an_error(value: str, said: str) -> None:
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES") as caught:
        visible(TABLE, value)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("device", "meant"),
    [
        ("h100", [0, 1]),
        ("H100-PCIe", [1]),
        ("a100_80gb", [2]),
        ("l40s", [3]),
        ("l40", []),
        ("nvidia", [0, 1, 2, 3]),
        ("b200", []),
        ("-", []),
    ],
)
def test_a_device_is_named_by_words_of_its_name(device: str, meant: list[int]) -> None:
    assert numbers(of_device(TABLE, device)) == meant
