"""This host's GPUs as NVML tells of them, and those of them that a device name and CUDA_VISIBLE_DEVICES mean."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

from swarmx.core.errors import ConfigError, ReplicaError

VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"
_WORDS = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU at one moment. `index` is NVML's number, in the order of the PCI bus; `free_bytes` is what nobody holds.

    `fault` says why nothing can be placed on it, None if something can; of one that is lost nothing else is known.
    """

    index: int
    uuid: str
    name: str
    total_bytes: int
    free_bytes: int
    fault: str | None = None

    def __str__(self) -> str:
        return f"GPU {self.index} ({self.name})"


class Gpus(Protocol):
    """Where GPUs are read from. `read` takes some milliseconds, and may be called from any thread.

    Raises ReplicaError when they cannot be read; a host without a GPU has none to tell of.
    """

    def read(self) -> Sequence[Gpu]: ...


class NvmlGpus:
    """All GPUs of this host, by NVIDIA's management library; it is opened for each reading, and closed after it."""

    def read(self) -> Sequence[Gpu]:
        with _nvml() as nvml:
            try:
                count = nvml.nvmlDeviceGetCount()
            except nvml.NVMLError as error:
                raise _failed(nvml, "cannot count the GPUs", error) from error
            return [_read(nvml, index) for index in range(count)]


def visible(gpus: Sequence[Gpu], value: str | None) -> Sequence[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES leaves, in its order; all of them if it is not set.

    Numbers are taken as NVML counts, as CUDA does with CUDA_DEVICE_ORDER=PCI_BUS_ID; UUIDs may be cut short. CUDA ends
    its list at the first entry that it does not know. Here that is a ConfigError, so that nobody wonders where the rest
    has gone; so are instances of MIG, which vLLM cannot be sent to.
    """
    if value is None:
        return gpus
    if value.strip() in ("", "-1", "NoDevFiles"):
        return ()
    found: list[Gpu] = []
    for entry in (part.strip() for part in value.split(",")):
        if entry.startswith("MIG-"):
            raise ConfigError(
                f"{VISIBLE_VARIABLE} names {entry}: servers are placed on whole GPUs, not on instances of MIG; "
                "name GPUs, or serve from the instance yourself and name the server under [[replicas]]."
            )
        meant = [gpu for gpu in gpus if _is(gpu, entry)]
        if len(meant) != 1 or meant[0] in found:
            what = "several GPUs" if len(meant) > 1 else "a GPU twice" if meant else "no GPU of this host"
            known = ", ".join(f"{gpu.index} or {gpu.uuid}" for gpu in gpus) or "none"
            raise ConfigError(f"{VISIBLE_VARIABLE} is {value!r}: {entry!r} names {what}; there are: {known}.")
        found += meant
    return found


def of_device(gpus: Sequence[Gpu], device: str) -> Sequence[Gpu]:
    """Those whose name has all words of `device`: h100 is in "NVIDIA H100 PCIe", a100-80gb in "NVIDIA A100-SXM4-80GB".

    Case does not count, and l40 is not l40s; nvidia is all of them.
    """
    words = set(_WORDS.findall(device.lower()))
    return [gpu for gpu in gpus if words and words <= set(_WORDS.findall(gpu.name.lower()))]


def _is(gpu: Gpu, entry: str) -> bool:
    return entry == str(gpu.index) or (entry.startswith("GPU-") and gpu.uuid.startswith(entry))


@contextmanager
def _nvml() -> Iterator[Any]:
    """The library while it is open. Raises ReplicaError where there is none that works."""
    nvml = _library()
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise _failed(nvml, "cannot be opened", error) from error
    try:
        yield nvml
    finally:
        with suppress(nvml.NVMLError):  # what was read stays true
            nvml.nvmlShutdown()


def _library() -> ModuleType:
    try:
        import pynvml
    except ImportError as error:
        raise ReplicaError(f"GPUs are read with nvidia-ml-py ({error}); pip install 'swarmx[gpu]'.") from error
    found: ModuleType = pynvml
    return found


def _read(nvml: Any, index: int) -> Gpu:
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        name, uuid = nvml.nvmlDeviceGetName(handle), nvml.nvmlDeviceGetUUID(handle)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError as error:
        fault = f"NVML says: {error}"
        return Gpu(index=index, uuid="", name="unknown", total_bytes=0, free_bytes=0, fault=fault)
    return Gpu(
        index=index,
        uuid=uuid,
        name=name,
        total_bytes=int(memory.total),
        free_bytes=int(memory.free),
        fault="it is split into instances of MIG" if _is_split(nvml, handle) else None,
    )


def _is_split(nvml: Any, handle: object) -> bool:
    try:
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0] == nvml.NVML_DEVICE_MIG_ENABLE)
    except nvml.NVMLError:  # most kinds of GPU know no MIG
        return False


def _failed(nvml: Any, what: str, error: Any) -> ReplicaError:
    advice = {
        nvml.NVML_ERROR_LIBRARY_NOT_FOUND: "install NVIDIA's driver; in a container, start it with the GPUs",
        nvml.NVML_ERROR_DRIVER_NOT_LOADED: "load NVIDIA's driver",
        nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "the driver was updated under way, reboot or load its modules anew",
        nvml.NVML_ERROR_NO_PERMISSION: "let this user read and write /dev/nvidia*",
        nvml.NVML_ERROR_GPU_IS_LOST: "a GPU fell off the bus, reset it or reboot",
    }.get(error.value, "see what nvidia-smi says")
    return ReplicaError(
        f"NVML {what}: {error}; a working NVIDIA driver was expected: {advice}. "
        'Without a GPU, use device = "cpu", or leave the groups that need one out.'
    )
