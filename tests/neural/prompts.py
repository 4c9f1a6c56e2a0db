"""A folder of prompts and lengths with a law that can be learnt; all of it is made up here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

TOPICS = ("rivers", "bridges", "engines", "gardens", "letters", "numbers", "planets", "recipes")
MODELS = {
    f"house-{size}b": offset for size, offset in ((1, -0.5), (3, -0.2), (7, 0.0), (13, 0.2), (34, 0.4), (70, 0.6))
}


def write_lengths(folder: Path, *, prompts: int = 300, seed: int = 0) -> None:
    """Answers are three times as long to "explain" as to "name", and again by model; the rest is noise of 20 %."""
    rng = np.random.default_rng(seed)
    texts, rows = [], []
    for i in range(prompts):
        long = bool(rng.random() < 0.5)
        topic = TOPICS[rng.integers(len(TOPICS))]
        verb = "Explain in detail, with examples, how" if long else "Name in one word what"
        key = f"p{seed}-{i}"
        texts.append(
            {"prompt_id": key, "category": "long" if long else "short", "text": f"{verb} {topic} do, case {i}."}
        )
        for model, offset in MODELS.items():
            log_tokens = np.log(300.0 if long else 100.0) + offset + 0.2 * rng.normal()
            rows.append({"prompt_id": key, "model": model, "out_tokens": int(np.exp(log_tokens)), "limit": 4096})
    folder.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(texts).write_parquet(folder / "prompts.parquet")
    pl.DataFrame(rows).write_parquet(folder / "lengths.parquet")
