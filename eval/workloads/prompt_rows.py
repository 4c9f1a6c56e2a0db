"""Recorded prompts and what models answered: where the truth of a language model's call comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from eval.workloads.casting import CONTEXT_TOKENS, ROLES, STANDS_FOR, size_class
from eval.workloads.draft import Drawn
from eval.workloads.invented import INVENTED
from eval.workloads.reading import Part, belongs, read_table, refuse, table_file
from swarmx.core.errors import ConfigError
from swarmx.neural.heads.length import log_params
from swarmx.neural.splits import split_of

_PROMPTS = ("prompt_id", "category", "text", "prompt_tokens")
_LENGTHS = ("prompt_id", "model", "out_tokens")
_MOST_EMPTY = 0.05


def prompt_files(source: Path) -> list[Path]:
    """prompts.parquet and lengths.parquet of a folder, or one file with the columns of both."""
    if not source.is_dir():
        return [table_file(source, "prompts.parquet")]
    return [table_file(source, "prompts.parquet"), table_file(source, "lengths.parquet")]


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Draws a row for a role and model, from rows by category and model of the fleet.

    `stand_ins` says where `casting` could not be kept to.
    """

    pools: Mapping[tuple[str, str], Sequence[Drawn]]
    stand_ins: tuple[str, ...] = ()

    def draw(self, role: str, model: str, rng: np.random.Generator) -> Drawn:
        """A row of one of the role's categories; of any, where the table has none of them."""
        weights = {c: w for c, w in ROLES[role].items() if (c, model) in self.pools}
        weights = weights or {c: 1.0 for c, m in sorted(self.pools) if m == model}
        shares = np.cumsum(list(weights.values()))
        category = list(weights)[int(np.searchsorted(shares, rng.random() * shares[-1], side="right"))]
        rows = self.pools[category, model]
        return rows[int(rng.integers(len(rows)))]


def read_prompts(source: Path, part: Part) -> PromptRows:
    """Read and check the tables; prompts of `part` only.

    Answers of no tokens, which some models really gave, are left out; more than 5 % of them are an error, as are
    prompts without tokens, negative counts, answers to unknown prompts, and rows that are longer than the context of
    the model that they stand for. Raises ConfigError.
    """
    files = prompt_files(source)
    if len(files) == 1:
        rows = read_table(files[0], (*_PROMPTS, *_LENGTHS[1:]), ("limit",))
    else:
        prompts = read_table(files[0], _PROMPTS)
        refuse(prompts, pl.col("prompt_id").is_duplicated(), files[0], "the id of another prompt", "prompt_id")
        lengths = read_table(files[1], _LENGTHS, ("limit",))
        unknown = lengths.join(prompts, on="prompt_id", how="anti")
        refuse(unknown, pl.lit(True), files[1], f"a prompt that {files[0].name} lacks", "prompt_id")
        rows = lengths.join(prompts, on="prompt_id", maintain_order="left")
    _check(rows, files[-1])
    rows = rows.filter(pl.col("out_tokens") > 0)
    kept = [key for key in rows["prompt_id"].unique().to_list() if belongs(part, "prompt", key)]
    rows = rows.filter(pl.col("prompt_id").is_in(kept)).sort("prompt_id", "model", "out_tokens", maintain_order=True)
    if rows.is_empty():
        raise ConfigError(f"{source} has no prompt of the {part} part; give more prompts, or another split.")
    return _pools(rows, source)


def _check(rows: pl.DataFrame, path: Path) -> None:
    refuse(rows, pl.col("text").is_null() | pl.col("category").is_null(), path, "no text or category", "prompt_id")
    refuse(rows, pl.col("prompt_tokens") <= 0, path, "prompts of no tokens", "prompt_id")
    refuse(rows, pl.col("model").is_null() | (pl.col("model") == ""), path, "no model", "prompt_id")
    refuse(rows, pl.col("out_tokens") < 0, path, "fewer than no tokens, or none given", "prompt_id")
    longest = pl.col("prompt_tokens") + pl.col("out_tokens") > min(CONTEXT_TOKENS.values())
    refuse(rows, longest, path, f"more tokens than a context of {min(CONTEXT_TOKENS.values())}", "prompt_id")
    empty = (rows["out_tokens"] == 0).sum() / rows.height
    if empty > _MOST_EMPTY:
        raise ConfigError(f"{path}: {empty:.0%} of the answers have no tokens, expected less than {_MOST_EMPTY:.0%}.")


def _pools(rows: pl.DataFrame, source: Path) -> PromptRows:
    hints = _hints(rows)
    numbers = {prompt: number for number, prompt in enumerate(sorted(hints))}
    pools: dict[tuple[str, str], list[Drawn]] = {}
    stand_ins: list[str] = []
    for (category,), of_category in rows.group_by("category", maintain_order=True):
        for model, wanted in STANDS_FOR.items():
            name = wanted.get(str(category), "")
            found = of_category.filter(pl.col("model") == name)
            if found.is_empty():
                found = _of_size(of_category, model)
                if found.height and any(category in categories for categories in ROLES.values()):
                    stand_ins.append(f"{category} on {model}: {found['model'].n_unique()} models of its size")
            if found.height:
                pools[str(category), model] = [_drawn(row, hints, numbers) for row in found.iter_rows(named=True)]
    for model in STANDS_FOR:
        if not any(m == model for _, m in pools):
            raise ConfigError(
                f"{source} has no answers of a model that could stand for {model}; it has those of "
                f"{', '.join(sorted(rows['model'].unique().to_list())[:10])}."
            )
    present = {category for category, _ in pools}
    for role, categories in ROLES.items():
        if not present & set(categories):
            stand_ins.append(f"{role}: any category, for want of {', '.join(categories)}")
    return PromptRows(pools, tuple(stand_ins))


def _of_size(rows: pl.DataFrame, model: str) -> pl.DataFrame:
    """Rows of models in the size class of `model`: of the train split where there are such."""
    fitting = [name for name in sorted(rows["model"].unique().to_list()) if size_class(_params_b(name)) == model]
    known = [name for name in fitting if split_of("model", name) == "train"]
    return rows.filter(pl.col("model").is_in(known or fitting))


def _params_b(model: str) -> float | None:
    size = log_params(model)
    return None if math.isnan(size) else math.exp(size)


def _hints(rows: pl.DataFrame) -> dict[str, float]:
    """The standardised log length of each prompt among those of its category."""
    prompts = rows.unique("prompt_id", maintain_order=True)
    size = pl.col("prompt_tokens").log()
    spread = size.std().over("category").fill_null(1.0).clip(lower_bound=0.1)
    scores = prompts.select("prompt_id", hint=(size - size.mean().over("category")) / spread)
    return dict(scores.iter_rows())


def _drawn(row: dict[str, Any], hints: Mapping[str, float], numbers: Mapping[str, int]) -> Drawn:
    work = int(row["out_tokens"])
    limit = float(row["limit"] or INVENTED["work_limit"].middle)
    return Drawn(
        text=row["text"], data_model=row["model"], prompt_tokens=int(row["prompt_tokens"]), work=work,
        work_limit=max(limit, float(work)), hint=hints[row["prompt_id"]], source=numbers[row["prompt_id"]],
    )  # fmt: skip
