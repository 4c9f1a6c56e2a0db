"""Real output lengths and latencies, with small heads that forecast them: the grounds on which drifts are laid."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from zlib import crc32

import numpy as np
import polars as pl
from numpy.typing import NDArray

from eval.splits import Split, split_of
from swarmx.neural.calibration import conformal_shifts
from swarmx.neural.head import Floats, Head, HeadSpec
from swarmx.neural.table import Table
from swarmx.neural.training.fit import FitSettings, fit

_WORDS = 48
_PROMPT_CHARS, _ANSWER_CHARS = 3.2, 4.4  # a token, in the table of latencies
_WORD = re.compile(r"[a-z']+")
LENGTH = HeadSpec(
    name="drift-length",
    version=1,
    features=(
        "log_prompt_tokens",
        "log_prompt_chars",
        "model_mean",
        "category_mean",
        "model_category_mean",
        *(f"word{i}" for i in range(_WORDS)),
    ),
    unit="tokens",
    softening=1.0,
)


LATENCY = HeadSpec(
    name="drift-latency",
    version=1,
    features=("log_prompt_tokens", "log_output_tokens", "running", "waiting", "kv_usage", "anchor"),
    unit="s",
    softening=0.05,
)
_FIT = FitSettings(nets=1, hidden=32, epochs=15, emphasis=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """Rows that no head was trained on, the head that forecasts them, and the rows to scale a drift by.

    `rows` are those of the validation or the test split, their `group` is the prompt class; `train` are the others'.
    """

    head: Head
    rows: Table
    train: Table


def length_ground(folder: Path, split: Split) -> Ground:
    """Output lengths of `prompts.parquet` and `lengths.parquet`, permissive ones of models that were trained on.

    Prompts are split by the frozen hash. The features are simple on purpose (means of the training rows, the prompt's
    size, hashed words): the question here is how a forecast follows a change, not how sharp it is.
    """
    return _ground(_length_table(folder), LENGTH, split)


def latency_ground(folder: Path, split: Split) -> Ground:
    """Times from arrival to the end of `measured_requests_vllm_state.parquet`, given how much was written.

    The anchor is a product of powers of the answer's length and of the load that it meets, fitted to the training rows.
    """
    rows = pl.read_parquet(folder / "measured_requests_vllm_state.parquet").drop_nulls("running_at_arrival")
    key = [f"{run}/{req}" for run, req in rows.select("run", "req").iter_rows()]
    splits = np.array([split_of("row", each) for each in key])
    prompt = rows["prompt_tokens"].to_numpy().astype(np.float64)
    chars = rows["out_chars_incl_prompt"].to_numpy().astype(np.float64)
    output = np.log(np.maximum(1.0, (chars - _PROMPT_CHARS * prompt) / _ANSWER_CHARS))
    running, waiting = rows["running_at_arrival"].to_numpy(), rows["pending_at_arrival"].to_numpy()
    load = np.log1p(running + waiting)
    target = rows["e2e_s"].to_numpy().astype(np.float64)
    log_y, train = np.log(target + LATENCY.softening), splits == "train"
    terms = np.column_stack([np.ones(len(output)), output, load, output * load, running + waiting])
    weights, *_ = np.linalg.lstsq(terms[train], log_y[train], rcond=None)
    anchor = terms @ weights
    features = [np.log1p(prompt), output, running, waiting, rows["kv_usage_pct_at_arrival"].to_numpy(), anchor]
    table = _table(np.column_stack(features), anchor, target, np.full(len(target), "all"), splits)
    return _ground(table, LATENCY, split)


def _ground(table: Table, spec: HeadSpec, split: Split) -> Ground:
    head = fit(table, spec, _FIT)
    head = replace(head, shifts=conformal_shifts(head, table.part("validation")))
    return Ground(head=head, rows=table.part(split), train=table.part("train"))


def _length_table(folder: Path) -> Table:
    prompts = pl.read_parquet(folder / "prompts.parquet").filter(pl.col("source") != "alpaca_eval")
    lengths = pl.read_parquet(folder / "lengths.parquet").with_columns(
        pl.col("prompt_id").cast(pl.String), pl.col("model").cast(pl.String)
    )
    joined = lengths.select("prompt_id", "model", "out_tokens").join(
        prompts.select("prompt_id", "category", "text", "prompt_tokens", "prompt_chars"), on="prompt_id"
    )
    models = [m for m in joined["model"].unique().to_list() if split_of("model", m) == "train"]
    rows = joined.filter(pl.col("model").is_in(models)).sort("prompt_id", "model")
    splits = {key: split_of("prompt", key) for key in rows["prompt_id"].unique().to_list()}
    split = np.array([splits[key] for key in rows["prompt_id"].to_list()])
    target = rows["out_tokens"].to_numpy().astype(np.float64)
    log_y, train = np.log(target + LENGTH.softening), split == "train"
    model, category = rows["model"].to_numpy().astype(str), rows["category"].to_numpy().astype(str)
    model_mean, category_mean = _means(model, log_y, train), _means(category, log_y, train)
    pair = np.char.add(np.char.add(model, "/"), category)
    pair_mean = _means(pair, log_y, train, prior=(model_mean + category_mean) / 2.0)
    words = {key: _words(text) for key, text in zip(prompts["prompt_id"], prompts["text"], strict=True)}
    features = [
        np.log1p(rows["prompt_tokens"].to_numpy()),
        np.log1p(rows["prompt_chars"].to_numpy()),
        model_mean,
        category_mean,
        pair_mean,
        np.stack([words[key] for key in rows["prompt_id"]]),
    ]
    return _table(np.column_stack(features), pair_mean, target, category, split)


def _table(
    features: NDArray[np.float64], anchor: Floats, target: Floats, group: NDArray[np.str_], split: NDArray[np.str_]
) -> Table:
    return Table(
        features=features.astype(np.float32),
        anchor=anchor,
        target=target,
        censored=np.zeros(len(target), dtype=np.bool_),
        weight=np.ones(len(target)),
        group=group,
        split=split,
    )


def _means(keys: NDArray[np.str_], log_y: Floats, train: NDArray[np.bool_], prior: Floats | None = None) -> Floats:
    """Mean of the training rows with each row's key, drawn to the prior by four rows' weight."""
    before = np.full(len(keys), log_y[train].mean()) if prior is None else prior
    means = np.empty(len(keys))
    for key in np.unique(keys):
        rows = keys == key
        seen = log_y[rows & train]
        means[rows] = (seen.sum() + 4.0 * before[rows]) / (len(seen) + 4.0)
    return means


def _words(text: str) -> NDArray[np.float32]:
    counts = np.zeros(_WORDS, dtype=np.float32)
    for word in _WORD.findall(text[:4000].lower()):
        counts[crc32(word.encode()) % _WORDS] += 1.0
    return np.log1p(counts)
