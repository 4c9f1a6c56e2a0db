"""The test split of a folder of prompts and lengths, forecast by weights that never saw it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from swarmx.core.errors import PredictorError
from swarmx.neural.forecaster import NeuralForecaster
from swarmx.neural.heads.length import LengthMemory
from swarmx.neural.scores import ScoreSet, score_set
from swarmx.neural.training.lengths import Lengths, ask, encode_all, read_lengths, teach

_REGIMES = (
    ("Unseen prompts", "Test prompts, answered by models that training may know.", "test", "train"),
    (
        "Unseen prompts and models",
        "Test prompts, answered by test models, of which no answer is known.",
        "test",
        "test",
    ),
)
_WARM = "The memory has seen the answers to the train prompts, as after some days of calls with the same roles."
_COLD = "The memory is the one that comes with the weights, as on the first day: every role is new to it."


def sets_of_data(forecaster: NeuralForecaster, data: Path, *, seed: int = 0) -> list[ScoreSet]:
    """Scores of the frozen test split: with a memory that has seen the train rows, and with the one of the weights.

    Raises PredictorError.
    """
    folder = data / "prompts" if (data / "prompts").is_dir() else data
    encoder = forecaster.encoder
    lengths = read_lengths(folder, encoder.bits)
    vectors = encode_all(encoder, lengths.bags)
    warm = forecaster.memory.copy()
    known = lengths.rows("train", "train") & (lengths.model_split == "train")
    teach(warm, encoder, vectors, lengths, np.random.default_rng(seed).permutation(known.nonzero()[0]))
    found = []
    for memory, ending, told in ((warm, "", _WARM), (forecaster.memory, ", on the first day", _COLD)):
        for name, about, prompts, models in _REGIMES:
            rows = lengths.rows(prompts, models).nonzero()[0]
            if len(rows):
                found.append(_scored(forecaster, memory, lengths, vectors, rows, f"{name}{ending}", f"{about} {told}"))
    if not found:
        raise PredictorError(
            f"none of the {len(lengths.texts)} prompts in {folder} is in the test split; a report needs more prompts."
        )
    return found


def _scored(
    forecaster: NeuralForecaster,
    memory: LengthMemory,
    lengths: Lengths,
    vectors: NDArray[np.float32],
    rows: NDArray[np.int64],
    name: str,
    about: str,
) -> ScoreSet:
    encoder, head = forecaster.encoder, forecaster.head
    features, anchor = ask(memory, encoder, vectors, lengths, rows)
    kinds = [f"kind{encoder.kind_of(vectors[i])}" for i in lengths.prompt[rows]]
    limit = np.nan_to_num(lengths.limit[rows], nan=np.inf)
    quantiles = np.minimum(head.quantiles(features, anchor, kinds), limit[:, None])
    labels = {"model": lengths.model[rows], "role": lengths.role[rows], "kind of text": np.array(kinds)}
    return score_set(name, about, lengths.tokens[rows], quantiles, head.spec.levels, labels)
