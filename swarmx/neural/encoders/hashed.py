"""The default encoder: hashed words and word pairs, looked up in one small table; no torch, tens of microseconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from swarmx.core.errors import PredictorError
from swarmx.core.prompts import PromptText
from swarmx.neural.checkpoint import Arrays, Card, load_arrays, save_arrays
from swarmx.neural.encoders.bag import COUNTS, Bag, bag_of
from swarmx.neural.net import Floats32

NAME = "encoder_hashed"
_FAR = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HashedEncoder:
    """A mixture of linear experts over a bag of n-grams and a few counts.

    With the bag x of a prompt (1 + log tf, times idf, of length one) and its standardised counts s:

        gate    = softmax(x @ table[:, gates] + gate_bias)                     which kind of text this is   [experts]
        effect  = (1, gate) @ (x @ table[:, effects] + s @ dense + dense_bias)  log length, relative to its kind
        vector  = (x @ table[:, themes], gate, effect * spread(gate), s)       [dimension]

    What a word says about length depends on the kind of text around it, so that one linear map misleads; experts do
    not. `table` [2^bits, themes + experts + 1 + experts], `idf` [2^bits], `dense` [counts, 1 + experts],
    `spread` [experts] is the standard deviation of the effect by kind.
    """

    name: ClassVar[str] = "hashed"
    slow: ClassVar[bool] = False

    bits: int
    themes: int
    experts: int
    table: Floats32
    idf: Floats32
    dense: Floats32
    dense_bias: Floats32
    gate_bias: Floats32
    spread: Floats32
    count_mean: Floats32
    count_scale: Floats32
    version: str = ""

    @property
    def dimension(self) -> int:
        return self.themes + self.experts + 1 + len(COUNTS)

    @property
    def parameters(self) -> int:
        """How many numbers the encoder holds."""
        return sum(int(getattr(self, name).size) for name in _ARRAYS)

    def encode(self, prompts: Sequence[PromptText]) -> Floats32:
        """[prompts, dimension] float32."""
        out = np.empty((len(prompts), self.dimension), dtype=np.float32)
        for row, prompt in zip(out, prompts, strict=True):
            row[:] = self.encode_one(prompt)
        return out

    def encode_one(self, prompt: PromptText) -> Floats32:
        """[dimension] float32, for one prompt."""
        return self.of_bag(bag_of(prompt, self.bits))

    def of_bag(self, bag: Bag) -> Floats32:
        """[dimension] float32, for a bag of `self.bits`."""
        themes, experts = self.themes, self.experts
        x = self.idf.take(bag.ids)
        x *= bag.weights
        length = np.sqrt(x @ x)
        looked_up = x @ self.table.take(bag.ids, axis=0)
        if length > 0.0:
            looked_up /= length
        counts = (bag.counts - self.count_mean) / self.count_scale
        np.maximum(counts, -_FAR, out=counts)
        np.minimum(counts, _FAR, out=counts)
        gate = looked_up[themes : themes + experts] + self.gate_bias
        gate -= gate.max()
        np.exp(gate, out=gate)
        gate /= gate.sum()
        effects = looked_up[themes + experts :] + counts @ self.dense
        effects += self.dense_bias
        effect = (effects[0] + gate @ effects[1:]) * (gate @ self.spread)
        return np.concatenate((looked_up[:themes], gate, (effect,), counts), dtype=np.float32)

    def kind_of(self, vector: Floats32) -> int:
        """The kind of text, 0 to experts - 1, that a vector of this encoder tells."""
        return int(vector[self.themes : self.themes + self.experts].argmax())

    def effect_of(self, vector: Floats32) -> float:
        """How much longer than usual for its kind, as a logarithm, answers to such a prompt are."""
        return float(vector[self.themes + self.experts])

    def with_effects(self, vector: Floats32, effects: Floats32) -> Floats32:
        """The vector, with effects (shared, experts) [1 + experts] of another reader of the prompt added to its own."""
        gate = vector[self.themes : self.themes + self.experts]
        moved = vector.copy()
        moved[self.themes + self.experts] += (effects[0] + gate @ effects[1:]) * (gate @ self.spread)
        return moved

    def save(self, folder: Path, card: Mapping[str, Any], *, name: str = NAME, more: Arrays | None = None) -> Card:
        """Write the encoder beside the heads that read it, with `more` arrays in the same file."""
        sizes = {"bits": self.bits, "themes": self.themes, "experts": self.experts}
        arrays: dict[str, NDArray[Any]] = {name: getattr(self, name) for name in _ARRAYS}
        halved = self.table.astype(np.float16)  # as trained ones are
        arrays["table"] = halved if np.array_equal(halved, self.table) else self.table
        return save_arrays(folder, name, {**arrays, **(more or {})}, {"extra": sizes, **card})


_ARRAYS = ("table", "idf", "dense", "dense_bias", "gate_bias", "spread", "count_mean", "count_scale")


def load_hashed(folder: Path) -> HashedEncoder:
    """The encoder in a folder. Raises PredictorError when there is none or it is damaged."""
    return read_hashed(*load_arrays(folder, NAME))


def read_hashed(arrays: Arrays, card: Card) -> HashedEncoder:
    """The encoder among these arrays. Raises PredictorError."""
    try:
        bits, themes, experts = (int(card.extra[name]) for name in ("bits", "themes", "experts"))
        shapes = _shapes(bits, themes, experts)
        found = {name: _f32(arrays[name], shapes[name]) for name in _ARRAYS}
    except (KeyError, TypeError, ValueError) as error:
        raise PredictorError(
            f"the encoder {card.version} is not one that this version reads: {error}; train it again."
        ) from None
    return HashedEncoder(bits=bits, themes=themes, experts=experts, version=card.version, **found)


def _shapes(bits: int, themes: int, experts: int) -> dict[str, tuple[int, ...]]:
    counts = len(COUNTS)
    return {
        "table": (1 << bits, themes + 2 * experts + 1),
        "idf": (1 << bits,),
        "dense": (counts, 1 + experts),
        "dense_bias": (1 + experts,),
        "gate_bias": (experts,),
        "spread": (experts,),
        "count_mean": (counts,),
        "count_scale": (counts,),
    }


def _f32(array: NDArray[Any], shape: tuple[int, ...]) -> Floats32:
    if array.shape != shape:
        raise ValueError(f"shape {array.shape}, expected {shape}")
    return np.ascontiguousarray(array, dtype=np.float32)
