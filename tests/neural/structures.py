"""Structure heads with random weights, and workflows as tables of sessions, to test with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from swarmx.core.forecast import LEVELS
from swarmx.neural.head import Head
from swarmx.neural.heads.structure import FEATURES, SPECS
from swarmx.neural.net import Floats32, QuantileNet


def random_heads(seed: int = 0, *, size: float = 0.3) -> dict[str, Head]:
    rng = np.random.default_rng(seed)
    width, k = len(FEATURES), len(LEVELS)

    def draw(*shape: int) -> Floats32:
        return (size * rng.normal(size=shape)).astype(np.float32)

    return {
        quantity: Head(
            spec=spec,
            mean=draw(width),
            scale=np.ones(width, dtype=np.float32),
            nets=(
                QuantileNet(
                    hidden=draw(width, 8), hidden_bias=draw(8), out=draw(8, k), skip=draw(width, k), out_bias=draw(k),
                    middle=LEVELS.index(0.5),
                ),
            ),
            version=f"{spec.name}-test",
        )
        for quantity, spec in SPECS.items()
    }  # fmt: skip


def a_step(session: str, step: int, /, **changes: Any) -> dict[str, Any]:
    row = {
        "session": session, "dataset": "shop", "domain": "returns", "task": f"task {session}", "step": step,
        "t_rel_s": 2.0 * (step + 1), "kind": "llm", "agent": "agent", "model": "m", "input_tokens": 100 + 10 * step,
        "output_tokens": 20, "latency_s": 1.5, "gap_to_next_s": None, "tool": None, "success": 1.0,
        "text_tail": "Could you give me your number?", "licence": "MIT",
    }  # fmt: skip
    return row | changes


def sessions_file(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "sessions.parquet"
    pl.DataFrame(rows, infer_schema_length=None).write_parquet(path)
    return path


def counted_sessions(count: int, *, seed: int = 0, dataset: str = "shop") -> list[dict[str, Any]]:
    """Sessions of 3 to 12 calls by two models in turn, whose first prompt says how long they will be."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        length = int(rng.integers(3, 13))
        for step in range(length):
            side = {"agent": ("agent", "user")[step % 2], "model": ("big", "small")[step % 2]}
            text = "Thank you, goodbye!" if step == length - 1 else "And then?"
            rows.append(
                a_step(f"{dataset}-{i}", step, dataset=dataset, input_tokens=100 * length, text_tail=text, **side)
            )
    return rows
