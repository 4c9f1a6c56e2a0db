"""A slow encoder's view of a prompt, brought into the layout of the hashed one, so that one length head reads both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from swarmx.core.errors import PredictorError
from swarmx.core.ports import Encoder
from swarmx.core.prompts import PromptText
from swarmx.neural.checkpoint import Card, load_arrays
from swarmx.neural.encoders.hashed import HashedEncoder, read_hashed
from swarmx.neural.net import Floats32

NAME = "encoder_adapted"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptedEncoder:
    """Implements `core.ports.Encoder`: the vector of `hashed`, whose effect counts in what `slow` has read.

    The vectors of `slow` are centred at `centre` [d] and brought to length one; `by_vector` [d, 1 + experts] turns
    them into effects. Words and vectors were trained together (`neural.training.hashed`), so this `hashed` is another
    than the default encoder.
    """

    name: ClassVar[str] = "adapted"
    slow_: Encoder
    hashed: HashedEncoder
    centre: Floats32
    by_vector: Floats32
    version: str = ""

    @property
    def slow(self) -> bool:
        return self.slow_.slow

    @property
    def dimension(self) -> int:
        return self.hashed.dimension

    @property
    def themes(self) -> int:
        return self.hashed.themes

    @property
    def experts(self) -> int:
        return self.hashed.experts

    def encode(self, prompts: Sequence[PromptText]) -> Floats32:
        """[prompts, dimension] float32."""
        effects = centred(self.slow_.encode(prompts), self.centre) @ self.by_vector
        read = [self.hashed.encode_one(prompt) for prompt in prompts]
        rows = [self.hashed.with_effects(vector, more) for vector, more in zip(read, effects, strict=True)]
        return np.stack(rows) if rows else np.zeros((0, self.dimension), dtype=np.float32)

    def encode_one(self, prompt: PromptText) -> Floats32:
        """[dimension] float32, for one prompt."""
        vector: Floats32 = self.encode([prompt])[0]
        return vector

    def kind_of(self, vector: Floats32) -> int:
        """The kind of text that a vector tells."""
        return self.hashed.kind_of(vector)

    def save(self, folder: Path, card: Mapping[str, Any]) -> Card:
        """Write everything but the slow encoder, whose version is kept."""
        more = {"centre": self.centre, "by_vector": self.by_vector}
        return self.hashed.save(folder, {**card, "settings": {"slow": self.slow_.version}}, name=NAME, more=more)


def load_adapted(folder: Path, slow: Encoder) -> AdaptedEncoder:
    """The adapted encoder in a folder, over `slow`. Raises PredictorError when it was trained on another encoder."""
    arrays, card = load_arrays(folder, NAME)
    trained_on = card.settings.get("slow")
    if trained_on != slow.version:
        raise PredictorError(
            f"{card.version} in {folder} reads the vectors of {trained_on}, not of {slow.version}; "
            "train it again with `swarmx train length --encoder`."
        )
    hashed = read_hashed(arrays, card)
    shapes = {"centre": (slow.dimension,), "by_vector": (slow.dimension, 1 + hashed.experts)}
    for name, shape in shapes.items():
        if name not in arrays or arrays[name].shape != shape:
            raise PredictorError(f"{card.version} in {folder} has no usable array {name!r} of shape {shape}.")
    return AdaptedEncoder(
        slow_=slow,
        hashed=hashed,
        centre=arrays["centre"].astype(np.float32),
        by_vector=arrays["by_vector"].astype(np.float32),
        version=card.version,
    )


def centred(vectors: Floats32, centre: Floats32) -> Floats32:
    """Vectors [prompts, d] less their centre, of length one."""
    moved = vectors - centre
    moved /= np.maximum(np.sqrt((moved * moved).sum(axis=1, keepdims=True)), 1e-9)
    return moved
