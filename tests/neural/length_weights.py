"""Small random weights of the length predictor in a folder, for tests that need some and not good ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from swarmx.neural.checkpoint import save_head
from swarmx.neural.encoders.bag import COUNTS
from swarmx.neural.encoders.hashed import HashedEncoder, load_hashed
from swarmx.neural.heads.length import LengthMemory, length_spec
from tests.neural.test_latency import random_head

BITS, THEMES, EXPERTS = 10, 4, 2
_STORY = {"licence": "CC0-1.0"}


def write_weights(folder: Path, *, models: tuple[str, ...] = (), seed: int = 0) -> None:
    """An encoder, a memory that has seen a hundred calls of each model, and a head."""
    rng = np.random.default_rng(seed)

    def array(*shape: int, size: float = 0.1) -> np.ndarray:
        return (size * rng.normal(size=shape)).astype(np.float32)

    HashedEncoder(
        bits=BITS,
        themes=THEMES,
        experts=EXPERTS,
        table=array(1 << BITS, THEMES + 2 * EXPERTS + 1),
        idf=np.ones(1 << BITS, dtype=np.float32),
        dense=array(len(COUNTS), 1 + EXPERTS),
        dense_bias=array(1 + EXPERTS),
        gate_bias=array(EXPERTS),
        spread=np.full(EXPERTS, 0.3, dtype=np.float32),
        count_mean=array(len(COUNTS)),
        count_scale=np.ones(len(COUNTS), dtype=np.float32),
    ).save(folder, _STORY)
    encoder = load_hashed(folder)
    memory = LengthMemory(
        kind_means=np.full(EXPERTS, 5.0, dtype=np.float32), kind_spreads=np.full(EXPERTS, 0.6, dtype=np.float32)
    )
    for model in models:
        for _ in range(100):
            memory.learn(encoder, array(encoder.dimension), model, "k/r", float(rng.lognormal(5.0, 0.6)))
    story = {**_STORY, "settings": {"encoder": encoder.version}}
    memory.save(folder, story)
    save_head(folder, random_head(length_spec(THEMES, EXPERTS), seed=seed), story)
