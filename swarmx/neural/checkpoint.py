"""Heads and tables on disk: safetensors for the numbers, a JSON card for everything that a reader should know."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from swarmx.core.errors import PredictorError
from swarmx.neural.head import Head, HeadSpec
from swarmx.neural.net import QuantileNet

FORMAT = 1
_NET = ("hidden", "hidden_bias", "out", "skip", "out_bias")

Arrays = Mapping[str, NDArray[Any]]


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """What weights are: for what, from which data, how good, and which bytes.

    `data` names the files with their sha256, `counts` the rows of each split, `metrics` what was measured on the test
    split; `calibration` is the plot as numbers: level to observed coverage; `settings` are those of the training.
    """

    format: int
    name: str
    version: str
    weights_sha256: str
    created_by: str
    licence: str
    spec: HeadSpec | None = None
    spec_key: str = ""
    groups: tuple[str, ...] = ()
    extra: dict[str, Any] = msgspec.field(default_factory=dict)
    data: dict[str, str] = msgspec.field(default_factory=dict)
    counts: dict[str, int] = msgspec.field(default_factory=dict)
    metrics: dict[str, float] = msgspec.field(default_factory=dict)
    calibration: dict[str, float] = msgspec.field(default_factory=dict)
    settings: dict[str, Any] = msgspec.field(default_factory=dict)


def save_arrays(folder: Path, name: str, arrays: Arrays, card: Mapping[str, Any]) -> Card:
    """Write `name`.safetensors and `name`.json; `card` gives the fields of `Card` beside those that follow.

    The version is the beginning of the weights' hash: equal weights have equal versions. Both files are replaced
    whole, the card last.
    """
    raw = save({key: np.ascontiguousarray(value) for key, value in arrays.items()})
    digest = sha256(raw).hexdigest()
    written = Card(
        format=FORMAT,
        name=name,
        version=f"{name}-{digest[:12]}",
        weights_sha256=digest,
        created_by=f"swarmx {version('swarmx')}",
        **card,
    )
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / f"{name}.safetensors", raw)
    _replace(folder / f"{name}.json", msgspec.json.format(msgspec.json.encode(written), indent=2) + b"\n")
    return written


def load_arrays(folder: Path, name: str) -> tuple[dict[str, NDArray[Any]], Card]:
    """Both files, checked against each other. Raises PredictorError."""
    path = folder / f"{name}.json"
    try:
        card = msgspec.json.decode(path.read_bytes(), type=Card)
        raw = (folder / f"{name}.safetensors").read_bytes()
    except OSError as error:
        raise PredictorError(
            f"the weights {name} cannot be read from {folder}: {error.strerror}; "
            "train them with `swarmx train`, or leave predictor.weights out for those that ship."
        ) from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise PredictorError(f"the card {path} is damaged: {error}; write it again with `swarmx train`.") from None
    if card.format != FORMAT:
        raise PredictorError(f"{path} has format {card.format}, this version of SwarmX reads format {FORMAT}.")
    digest = sha256(raw).hexdigest()
    if digest != card.weights_sha256:
        raise PredictorError(
            f"the weights {name}.safetensors in {folder} are not those of their card: sha256 {digest[:12]}…, expected "
            f"{card.weights_sha256[:12]}…; they were changed or cut short. Train them again, or restore both files."
        )
    if card.name != name or card.version != f"{name}-{digest[:12]}":
        raise PredictorError(
            f"the card {path} says {card.name!r}, version {card.version!r}; expected {name!r}, {name}-{digest[:12]}. "
            "It was changed; restore both files, or train again."
        )
    try:
        arrays = load(raw)
    except (SafetensorError, ValueError, KeyError) as error:
        raise PredictorError(f"the weights {name}.safetensors in {folder} are not safetensors: {error}.") from None
    for key, value in arrays.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise PredictorError(f"the weights {name} in {folder} hold numbers that are not finite, in {key!r}.")
    return arrays, card


def save_head(folder: Path, head: Head, card: Mapping[str, Any]) -> Card:
    """Write a head, with the fields of `Card` that tell its story (`licence`, `data`, `counts`, `metrics` ...)."""
    arrays: dict[str, NDArray[Any]] = {"mean": head.mean, "scale": head.scale}
    for i, net in enumerate(head.nets):
        arrays |= {f"net{i}.{part}": getattr(net, part) for part in _NET}
    groups = tuple(sorted(head.shifts))
    if groups:
        arrays["shifts"] = np.stack([head.shifts[group] for group in groups])
    story = {"spec": head.spec, "spec_key": head.spec.key, "groups": groups, **card}
    return save_arrays(folder, head.spec.name, arrays, story)


def load_head(folder: Path, spec: HeadSpec) -> tuple[Head, Card]:
    """A head for this spec. Raises PredictorError when there is none, it is damaged, or it was trained for another."""
    arrays, card = load_arrays(folder, spec.name)
    if card.spec_key != spec.key:
        raise PredictorError(
            f"the weights {card.version} in {folder} were trained for other features (spec {card.spec_key or 'none'}), "
            f"this version of SwarmX computes spec {spec.key}; train them again with `swarmx train`."
        )
    features, k = len(spec.features), len(spec.levels)
    middle = middle_of(spec.levels)
    try:
        nets: list[QuantileNet] = []
        while f"net{len(nets)}.hidden" in arrays:
            parts = {part: _f32(arrays[f"net{len(nets)}.{part}"]) for part in _NET}
            nets.append(QuantileNet(middle=middle, **parts))
        shifts = dict(zip(card.groups, _f32(arrays["shifts"]), strict=True)) if card.groups else {}
        head = Head(
            spec=spec,
            mean=_f32(arrays["mean"]),
            scale=_f32(arrays["scale"]),
            nets=tuple(nets),
            shifts=shifts,
            version=card.version,
        )
    except (KeyError, ValueError) as error:
        raise PredictorError(f"the weights {card.version} in {folder} are incomplete: {error}.") from None
    shapes = [tuple(getattr(net, part).shape for part in _NET) for net in nets]
    widths = [net.hidden.shape[-1] for net in nets]
    fitting = [((features, width), (width,), (width, k), (features, k), (k,)) for width in widths]
    good = head.mean.shape == head.scale.shape == (features,) and (not shifts or "" in shifts)
    good = good and all(shift.shape == (k,) for shift in shifts.values())
    if not nets or not good or shapes != fitting:
        raise PredictorError(
            f"the weights {card.version} in {folder} have shapes {shapes}, expected {features} features and {k} levels."
        )
    return head, card


def middle_of(levels: tuple[float, ...]) -> int:
    """The position of the level next to the median, from which the quantiles are built outwards."""
    return min(range(len(levels)), key=lambda i: abs(levels[i] - 0.5))


def _f32(array: NDArray[Any]) -> NDArray[np.float32]:
    return array.astype(np.float32, copy=False)


def _replace(path: Path, data: bytes) -> None:
    draft = path.with_suffix(path.suffix + ".new")
    draft.write_bytes(data)
    draft.replace(path)
