"""Built workloads on disk: building asks a predictor for each call, loading takes a moment."""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from eval.workloads.plan import PlannedWorkflow, RoleMeans

_WORKFLOWS, _QUANTILES, _MEANS = "workflows.msgpack", "quantiles.npy", "role_means.msgpack"


class Built(NamedTuple):
    """All of a workload but the times of its workflows."""

    workflows: list[PlannedWorkflow]
    quantiles: NDArray[np.float32]
    role_means: RoleMeans


_workflows = msgspec.msgpack.Decoder(list[PlannedWorkflow])
_means = msgspec.msgpack.Decoder(dict[tuple[str, str, str], tuple[int, float]])


def key_of(*parts: object) -> str:
    """A name for what these parts, JSON all of them, lead to: with any change of this package it is another."""
    return sha256(msgspec.json.encode([_version(), *parts], order="deterministic")).hexdigest()[:24]


@cache
def _version() -> str:
    """A hash of the modules that draw and forecast: of all that are here, so that none can be forgotten."""
    modules = sorted(Path(__file__).parent.glob("*.py"))
    return sha256(b"".join(module.read_bytes() for module in modules)).hexdigest()


def load(folder: Path, key: str) -> Built | None:
    """What was stored under the key; None where nothing is, or where it cannot be read and has to be built again."""
    place = folder / key
    try:
        return Built(
            _workflows.decode((place / _WORKFLOWS).read_bytes()),
            np.load(place / _QUANTILES, allow_pickle=False),
            _means.decode((place / _MEANS).read_bytes()),
        )
    except (OSError, ValueError, msgspec.DecodeError):
        return None


def store(folder: Path, key: str, built: Built) -> None:
    """Keep it under the key; all of it appears at once."""
    folder.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=folder, prefix=f".{key}-"))
    (fresh / _WORKFLOWS).write_bytes(msgspec.msgpack.encode(built.workflows))
    np.save(fresh / _QUANTILES, built.quantiles, allow_pickle=False)
    (fresh / _MEANS).write_bytes(msgspec.msgpack.encode(built.role_means))
    place = folder / key
    shutil.rmtree(place, ignore_errors=True)
    try:
        os.replace(fresh, place)
    except OSError:  # another process has stored the same
        shutil.rmtree(fresh, ignore_errors=True)
