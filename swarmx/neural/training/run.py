"""Training of the heads from files: what `swarmx train` runs, one function a head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swarmx.core.errors import PredictorError
from swarmx.core.ports import Encoder
from swarmx.core.prompts import cut
from swarmx.neural.calibration import conformal_shifts
from swarmx.neural.checkpoint import Card, save_head
from swarmx.neural.encoders.adapted import AdaptedEncoder, centred
from swarmx.neural.head import Head, HeadSpec
from swarmx.neural.heads.images import IMAGE
from swarmx.neural.heads.latency import COMPLETION, TTFT
from swarmx.neural.heads.length import length_spec
from swarmx.neural.heads.structure import SPECS as STRUCTURE
from swarmx.neural.heads.structure import remaining_quantiles
from swarmx.neural.losses import coverage as covered
from swarmx.neural.losses import crps, kendall_tau, pinball
from swarmx.neural.net import Floats32
from swarmx.neural.table import Table
from swarmx.neural.training import images, latency, structure
from swarmx.neural.training.fit import FitSettings, fit
from swarmx.neural.training.hashed import HashedSettings
from swarmx.neural.training.lengths import LengthData, Lengths, ask, length_data, read_lengths

LENGTH_SETTINGS = FitSettings(
    nets=1, hidden=64, epochs=20, patience=5, batch=2048, learning_rate=1.5e-3, dropout=0.15, emphasis=0.25
)
PERMISSIVE = "trained on facts of data under Apache-2.0, MIT, BSD-3-Clause; no text and no weights of others"
_PLOTTED = (0.05, 0.1, 0.25, 0.5, 0.75, 0.8, 0.9, 0.95, 0.99)

Progress = Callable[[str], None]


def _silent(text: str) -> None:
    pass


def train(
    heads: Sequence[str],
    data: Path,
    out: Path,
    *,
    seed: int = 0,
    resume: Path | None = None,
    licence: str = PERMISSIVE,
    progress: Progress = _silent,
) -> list[Card]:
    """Train the heads named, from the folders of `data` that hold their files, and write weights and cards to `out`.

    The same data and seed give the same bytes on the same machine. Raises PredictorError.
    """
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    cards: list[Card] = []
    for name in heads:
        if name not in HEADS:
            raise PredictorError(f"there is no head {name!r}; there are: {', '.join(HEADS)}.")
        progress(f"{name}: reading {data}")
        cards += HEADS[name](data, out, seed, resume, licence, progress)
    return cards


def train_length(
    lengths: Lengths,
    *,
    seed: int = 0,
    encoder: HashedSettings | None = None,
    settings: FitSettings = LENGTH_SETTINGS,
    slow: Floats32 | None = None,
    resume: Path | None = None,
    progress: Progress = _silent,
) -> tuple[LengthData, Head]:
    """Encoder, memory and length head, calibrated; the test rows are not looked at. `slow` as in `length_data`."""
    encoder = replace(encoder or HashedSettings(), seed=seed)
    data = length_data(lengths, encoder, seed=seed, slow=slow, progress=progress)
    spec = length_spec(encoder.themes, encoder.experts)
    head = fit(data.table, spec, replace(settings, seed=seed), resume=resume, progress=_epochs("length", progress))
    return data, calibrated(head, data)


def calibrated(head: Head, data: LengthData) -> Head:
    """The head with conformal shifts from all rows that were read with the full memory.

    Encoder and memory saw none of them (`length_data` cross-fits), and a network of a few thousand numbers hardly
    remembers tens of thousands of rows. Validation rows alone are too few prompts: the share of answers below the
    median has a standard error of two points among them.
    """
    return replace(head, shifts=conformal_shifts(head, data.table.where(data.table.weight >= 1.0)))


def train_adapted(
    slow: Encoder,
    data: Path,
    out: Path,
    *,
    seed: int = 0,
    resume: Path | None = None,
    licence: str = PERMISSIVE,
    progress: Progress = _silent,
) -> list[Card]:
    """Train what lets the length head read a slower encoder, whose own weights stay as they are. Raises PredictorError.

    The folder `out` is then what `predictor.encoder_weights` wants to be set to.
    """
    return _length(data, out, seed, resume, licence, progress, slow)


def _length(
    data: Path,
    out: Path,
    seed: int,
    resume: Path | None,
    licence: str,
    progress: Progress,
    slow: Encoder | None = None,
) -> list[Card]:
    folder = _within(data, "prompts")
    settings = HashedSettings(seed=seed)
    lengths = read_lengths(folder, settings.bits)
    read, centre = None, None
    if slow is not None:
        progress(f"length: the encoder {slow.name} reads {len(lengths.texts)} prompts")
        vectors = np.concatenate([slow.encode([cut(text.encode())]) for text in lengths.texts])
        centre = vectors[lengths.prompt_split == "train"].mean(axis=0)
        read = centred(vectors, centre)
    made, head = train_length(lengths, seed=seed, encoder=settings, slow=read, resume=resume, progress=progress)
    rows = lengths.rows("test", "train").nonzero()[0]
    features, anchor = ask(made.memory, made.encoder, made.vectors, lengths, rows)
    kinds = [f"kind{made.encoder.kind_of(made.vectors[i])}" for i in lengths.prompt[rows]]
    quantiles = head.quantiles(features, anchor, kinds)
    story: dict[str, Any] = {
        "licence": licence,
        "data": _hashes([folder / "prompts.parquet", folder / "lengths.parquet"]),
    }
    story["counts"] = {
        str(split): int(n) for split, n in zip(*np.unique(made.table.split, return_counts=True), strict=True)
    }
    if slow is None or centre is None or made.by_vector is None:
        encoder_card = made.encoder.save(out, {**story, "settings": asdict(settings)})
    else:
        adapted = AdaptedEncoder(slow_=slow, hashed=made.encoder, centre=centre, by_vector=made.by_vector)
        encoder_card = adapted.save(out, story)
    memory_card = made.shipped.save(out, {**story, "settings": {"encoder": encoder_card.version}})
    story |= _judged(lengths.tokens[rows], quantiles, head.spec.levels)
    story["counts"] |= {"test": len(rows)}
    return [
        encoder_card,
        memory_card,
        save_head(out, head, {**story, "settings": {**asdict(LENGTH_SETTINGS), "encoder": encoder_card.version}}),
    ]


def _latency(data: Path, out: Path, seed: int, resume: Path | None, licence: str, progress: Progress) -> list[Card]:
    folder = _within(data, "engine")
    settings = {TTFT.name: latency.TTFT_SETTINGS, COMPLETION.name: latency.COMPLETION_SETTINGS}
    tables = latency.tables(folder)
    files = sorted(folder.glob("measured_*.parquet")) + sorted(folder.glob("gpu_specs.csv"))
    return [
        _table_head(spec, tables[spec.name], settings[spec.name], files, out, seed, resume, licence, progress)
        for spec in (TTFT, COMPLETION)
    ]


def _image(data: Path, out: Path, seed: int, resume: Path | None, licence: str, progress: Progress) -> list[Card]:
    folder = _within(data, "engine")
    files = [folder / "measured_comfyui_flows.parquet", folder / "comfyui_flow_graphs.csv"]
    table = images.tables(folder)[IMAGE.name]
    return [_table_head(IMAGE, table, images.IMAGE_SETTINGS, files, out, seed, resume, licence, progress)]


def _structure(data: Path, out: Path, seed: int, resume: Path | None, licence: str, progress: Progress) -> list[Card]:
    folder = _within(data, "agents")
    sessions = structure.load_sessions(folder)
    rows = structure.rows_of(sessions, seed=seed)
    file = folder / structure.FILE if folder.is_dir() else folder
    known = [session for session in sessions if session.split == "train"]
    memory_story = {"licence": licence, "data": _hashes([file]), "counts": {"train": len(known)}}
    cards = [structure.memory_of(known).save(out, memory_story)]
    for quantity, spec in STRUCTURE.items():
        table = structure.told(rows, quantity)
        settings = replace(structure.SETTINGS, seed=seed)
        head = fit(table, spec, settings, resume=resume, progress=_epochs(spec.name, progress))
        test = table.split == "test"
        recalled = rows.recalled[quantity][np.isfinite(rows.tables[quantity].target)][test]
        quantiles = remaining_quantiles(head, table.features[test], recalled, list(table.group[test]))
        story = _judged(table.target[test], quantiles, spec.levels)
        cards.append(_saved(out, head, table, [file], settings, licence, story))
    return cards


HEADS: Mapping[str, Callable[[Path, Path, int, Path | None, str, Progress], list[Card]]] = {
    "length": _length,
    "latency": _latency,
    "structure": _structure,
    "image": _image,
}


def _table_head(
    spec: HeadSpec,
    table: Table,
    settings: FitSettings,
    files: Sequence[Path],
    out: Path,
    seed: int,
    resume: Path | None,
    licence: str,
    progress: Progress,
) -> Card:
    """A head that a table says everything about: fitted, and judged on the test rows.

    Only TTFT is shifted by its validation rows: for completion and images they are other models and pairs than those
    of the test, and shifts that fit them made its scores worse (`eval/LOG.md`); online tracking has to do it there.
    """
    settings = replace(settings, seed=seed)
    head = fit(table, spec, settings, resume=resume, progress=_epochs(spec.name, progress))
    if spec == TTFT:
        head = replace(head, shifts=conformal_shifts(head, table.part("validation")))
    test = table.part("test")
    story = _judged(test.target, head.quantiles(test.features, test.anchor, list(test.group)), spec.levels)
    return _saved(out, head, table, files, settings, licence, story)


def _saved(
    out: Path,
    head: Head,
    table: Table,
    files: Sequence[Path],
    settings: FitSettings,
    licence: str,
    story: dict[str, Any],
) -> Card:
    counts = {str(split): int(n) for split, n in zip(*np.unique(table.split, return_counts=True), strict=True)}
    common = {"licence": licence, "data": _hashes(files), "counts": counts, "settings": asdict(settings)}
    return save_head(out, head, {**common, **story})


def _judged(target: np.ndarray, quantiles: np.ndarray, levels: Sequence[float]) -> dict[str, Any]:
    """What the card says of the test rows: scores, and the share of outcomes at or below the quantile of each level."""
    middle = quantiles[:, list(levels).index(0.5)]
    log_q = np.log(np.maximum(quantiles, 1e-9) + 1e-3)
    return {
        "metrics": {
            "pinball": float(pinball(target, quantiles, levels).mean()),
            "pinball_log": float(pinball(np.log(target + 1e-3), log_q, levels).mean()),
            "crps": float(crps(target, quantiles, levels).mean()),
            "kendall_tau": kendall_tau(target, middle),
        },
        "calibration": {f"{level:g}": covered(target, quantiles, levels, level) for level in _PLOTTED},
    }


def _epochs(name: str, progress: Progress) -> Callable[[int, int, float], None]:
    def told(net: int, epoch: int, loss: float) -> None:
        progress(f"{name}: network {net + 1}, epoch {epoch + 1}, validation loss {loss:.5f}")

    return told


def _within(data: Path, part: str) -> Path:
    """The folder `part` of the data, or the data itself where it is that folder already."""
    return data / part if (data / part).is_dir() else data


def _hashes(files: Sequence[Path]) -> dict[str, str]:
    return {file.name: sha256(file.read_bytes()).hexdigest() for file in files if file.exists()}
