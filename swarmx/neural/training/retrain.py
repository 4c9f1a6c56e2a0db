"""One retraining as a process of its own: `python -m swarmx.neural.training.retrain FOLDER`.

The folder holds job.json, the head in force (weights and card) in before/, and the records as rows.npz. The process
leaves a head in after/ and then writes result.json; what it did not write whole is not there.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from swarmx.core.errors import PredictorError
from swarmx.neural.checkpoint import load_head, save_head
from swarmx.neural.head import Head, HeadSpec
from swarmx.neural.refit import RefitSettings, refit, weighted_loss
from swarmx.neural.table import Table

Method = Literal["refit", "fit"]

JOB, ROWS, RESULT, BEFORE, AFTER = "job.json", "rows.npz", "result.json", "before", "after"
_HELD_BACK_EVERY = 5
_NICE = 10
_ARRAYS = ("features", "anchor", "target", "censored", "weight", "group")


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be done. "refit" fits the output layer in numpy and keeps what the rest has learnt, "fit" trains all
    anew with torch. A row weighs half as much as one `half_life` rows newer. The new head is better when its loss on
    the held-back rows is below the old one's by the share `gain`.
    """

    spec: HeadSpec
    method: Method = "refit"
    half_life: float = 300.0
    gain: float = 0.01
    steps: int = 400


class JobResult(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it: `version` is empty when the new head is not better."""

    version: str
    loss_before: float
    loss_after: float
    rows: int


def write_rows(path: Path, table: Table) -> None:
    """Write the rows, oldest first, without pickle. Their splits are not kept: `held_back` makes them anew."""
    arrays: dict[str, NDArray[Any]] = {name: getattr(table, name) for name in _ARRAYS}
    np.savez(path, allow_pickle=False, **arrays)


def read_rows(path: Path) -> Table:
    """What `write_rows` wrote. Raises PredictorError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in _ARRAYS}
    except (OSError, ValueError, KeyError) as error:
        raise PredictorError(f"the rows in {path} cannot be read: {error}; have the head trained again.") from None
    return Table(**arrays, split=np.full(len(arrays["target"]), "train"))


def held_back(table: Table, half_life: float) -> Table:
    """The rows, oldest first, with every fifth held back, counted from the newest, and weighed by their age."""
    age = np.arange(len(table))[::-1]
    split = np.where(age % _HELD_BACK_EVERY == 0, "validation", "train")
    return replace(table, split=split, weight=table.weight * 0.5 ** (age / half_life))


def retrain(head: Head, table: Table, job: Job) -> Head:
    """The head of the job, trained on rows as `held_back` gives them. Raises PredictorError."""
    if job.method == "refit":
        return refit(head, table, RefitSettings(steps=job.steps))
    try:
        from swarmx.neural.training.fit import FitSettings, fit
    except ImportError as error:
        raise PredictorError(
            f'training a head anew needs torch ({error}); install "swarmx[train]", or leave the method at "refit".'
        ) from None
    return fit(table, job.spec, FitSettings(nets=len(head.nets), hidden=head.nets[0].hidden.shape[1], emphasis=0.0))


def run(folder: Path) -> JobResult:
    """Do the job that is described in the folder. Raises PredictorError."""
    try:
        job = msgspec.json.decode((folder / JOB).read_bytes(), type=Job)
    except (OSError, msgspec.MsgspecError) as error:
        raise PredictorError(f"there is no job to do in {folder}: {error}.") from None
    head, card = load_head(folder / BEFORE, job.spec)
    table = held_back(read_rows(folder / ROWS), job.half_life)
    checked = table.part("validation")
    new = retrain(head, table, job)
    before, after = weighted_loss(head, checked), weighted_loss(new, checked)
    version = ""
    if after < before * (1.0 - job.gain):
        story: dict[str, Any] = {
            "licence": card.licence,
            "data": {"memory": "records of finished calls"},
            "counts": {"train": len(table) - len(checked), "validation": len(checked)},
            "metrics": {"held_back_loss": after, "held_back_loss_before": before},
            "settings": {"method": job.method, "half_life": job.half_life, "before": card.version},
        }
        version = save_head(folder / AFTER, new, story).version
    result = JobResult(version=version, loss_before=before, loss_after=after, rows=len(table))
    draft = folder / (RESULT + ".new")
    draft.write_bytes(msgspec.json.encode(result))
    draft.replace(folder / RESULT)
    return result


def main(arguments: list[str]) -> int:
    """Exit status 0, or 1 with one line of reason on stderr."""
    os.nice(_NICE)
    try:
        run(Path(arguments[0]))
    except PredictorError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
