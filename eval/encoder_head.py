"""The same length head behind every encoder: what a prompt's vector adds to the means of its model and kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from eval.splits import split_of
from swarmx.core.prompts import PromptText, cut
from swarmx.neural.encoders.bag import COUNTS, bag_of
from swarmx.neural.head import Floats, HeadSpec
from swarmx.neural.losses import pinball
from swarmx.neural.net import Floats32
from swarmx.neural.table import Table
from swarmx.neural.training.fit import FitSettings, fit

Ints = NDArray[np.int64]

FOLDS = 5
RIDGES = (0.1, 1.0, 3.0)
THEMES = 32
_SHRINK = 5.0
_SHARED = 0.3
_COUNT_WEIGHT = 0.15
_FAR = 6.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthData:
    """Prompts [prompts] and the lengths of their answers [rows]; models of the test split are left out.

    `kind` of a prompt is its source, the open conversations taken together; `split` is that of the prompt.
    """

    prompts: list[PromptText]
    kind: NDArray[np.str_]
    split: NDArray[np.str_]
    counts: Floats32
    prompt: Ints
    model: Ints
    tokens: Floats

    @property
    def kinds(self) -> Ints:
        return np.unique(self.kind, return_inverse=True)[1].astype(np.int64)


def read_lengths(folder: Path, *, most_prompts: int | None = None) -> LengthData:
    """From `prompts.parquet` and `lengths.parquet`; with `most_prompts`, every so-many-th prompt only."""
    wanted = pl.read_parquet(folder / "prompts.parquet", columns=["prompt_id", "source", "text"])
    wanted = wanted.with_columns(pl.col("prompt_id", "source").cast(pl.String))
    lengths = pl.read_parquet(folder / "lengths.parquet", columns=["prompt_id", "model", "out_tokens"])
    lengths = lengths.with_columns(pl.col("prompt_id", "model").cast(pl.String)).filter(pl.col("out_tokens") > 0)
    keep = [model for model in lengths["model"].unique().to_list() if split_of("model", model) != "test"]
    lengths = lengths.filter(pl.col("model").is_in(keep))
    wanted = wanted.join(lengths.select("prompt_id").unique(), on="prompt_id", how="semi").sort("prompt_id")
    if most_prompts is not None:
        wanted = wanted.gather_every(max(1, len(wanted) // most_prompts))
    place = {key: i for i, key in enumerate(wanted["prompt_id"].to_list())}
    lengths = lengths.filter(pl.col("prompt_id").is_in(list(place)))
    prompts = [cut(text.encode()) for text in wanted["text"].to_list()]
    return LengthData(
        prompts=prompts,
        kind=np.array([_kind(source) for source in wanted["source"].to_list()]),
        split=np.array([split_of("prompt", key) for key in place]),
        counts=np.stack([bag_of(prompt, 10).counts for prompt in prompts]),
        prompt=np.array([place[key] for key in lengths["prompt_id"].to_list()]),
        model=np.unique(lengths["model"].to_numpy().astype(str), return_inverse=True)[1].astype(np.int64),
        tokens=lengths["out_tokens"].to_numpy().astype(np.float64),
    )


def _kind(source: str) -> str:
    return source if source.startswith(("zeroeval/", "math")) else "chat"


class Downstream:
    """What does not depend on the encoder, done once: means by model and kind, and the effects of prompts on them."""

    def __init__(self, data: LengthData) -> None:
        self.data = data
        self.log = np.log(data.tokens)
        self.row_split = data.split[data.prompt]
        self.known = self.row_split == "train"
        self.kinds = data.kinds
        row_kind = self.kinds[data.prompt]
        self.by_model = self._mean(data.model, np.full(len(self.log), self.log[self.known].mean()))
        self.expected = self._mean(data.model * 100 + row_kind, self.by_model)
        residual = self.log - self.expected
        self.row_spread = np.sqrt(self._mean(data.model * 100 + row_kind, np.full(len(self.log), 0.1), residual**2))
        self.train, self.train_counts, effects = self._effects(residual, "train")
        self.held, _, held_effects = self._effects(residual, "validation")
        self.unit = np.ones(len(data.prompts))
        for kind in np.unique(self.kinds):
            of_kind = self.kinds[self.train] == kind
            if of_kind.sum() > 1:
                self.unit[self.kinds == kind] = max(float(effects[of_kind].std()), 0.05)
        self.effects = effects / self.unit[self.train]
        self.held_effects = held_effects / self.unit[self.held]
        self.counts = _standardised(data.counts, self.train)
        self.same_kind = _SHARED + (self.kinds[:, None] == self.kinds[None, :])

    def _mean(self, key: Ints, prior: Floats, values: Floats | None = None) -> Floats:
        """Means of log lengths by key on training rows, drawn to the prior as if it were five observations."""
        values = self.log if values is None else values
        _, place = np.unique(key, return_inverse=True)
        count = np.bincount(place[self.known], minlength=place.max() + 1)
        total = np.bincount(place[self.known], weights=values[self.known], minlength=place.max() + 1)
        mean: Floats = (total[place] + _SHRINK * prior) / (count[place] + _SHRINK)
        return mean

    def _effects(self, residual: Floats, split: str) -> tuple[Ints, Ints, Floats]:
        """(prompts, how many rows each, mean residual of each) in a split."""
        rows = self.row_split == split
        count = np.bincount(self.data.prompt[rows], minlength=len(self.data.prompts))
        total = np.bincount(self.data.prompt[rows], weights=residual[rows], minlength=len(count))
        there = np.flatnonzero(count)
        return there, count[there], total[there] / count[there]

    def linear(self, vectors: Floats32 | None, *, sparse: bool = False) -> tuple[Floats, float]:
        """The effect [prompts] of each prompt in units of its kind, by kernel ridge regression, and the penalty.

        Kernel: vectors, and counts at a small weight, times (0.3 + same kind): one linear map for all kinds and one
        for each. The penalty is chosen on held-out folds of the training prompts, whose own effects are those of the
        folds they were left out of: what the head then reads is as good on training prompts as on others.
        """
        kernel = self.counts @ self.counts.T
        if vectors is not None:
            x = vectors if sparse else _standardised(vectors, self.train)
            kernel = _COUNT_WEIGHT * kernel + x @ x.T
        kernel = (kernel * self.same_kind).astype(np.float64)
        return self.out_of_fold(lambda rows, ridge: self._solve(kernel, rows, ridge), RIDGES)

    def out_of_fold(self, train: Callable[[Ints, float], Floats], ridges: tuple[float, ...]) -> tuple[Floats, float]:
        """The effects that `train(places of training prompts, ridge)` finds, with the best ridge."""
        fold = np.random.default_rng(0).permutation(len(self.train)) % FOLDS
        tried = []
        for ridge in ridges:
            own = np.zeros(len(self.train))
            for left_out in range(FOLDS):
                found = train(np.flatnonzero(fold != left_out), ridge)
                own[fold == left_out] = found[self.train][fold == left_out]
            tried.append((float(((own - self.effects) ** 2).mean()), ridge, own))
        _, ridge, own = min(tried, key=lambda item: item[0])
        effects = train(np.arange(len(self.train)), ridge)
        effects[self.train] = own
        return effects, ridge

    def _solve(self, kernel: Floats, places: Ints, ridge: float) -> Floats:
        rows = self.train[places]
        reliable = 1.0 / np.sqrt(0.3 + 1.0 / self.train_counts[places])
        system = kernel[np.ix_(rows, rows)] * reliable[:, None] * reliable[None, :]
        system[np.diag_indices_from(system)] += ridge
        dual = np.linalg.solve(system, self.effects[places] * reliable) * reliable
        effects: Floats = kernel[:, rows] @ dual
        return effects

    def explained(self, effects: Floats) -> tuple[float, float]:
        """R² of the effects of training prompts (left out of the fit) and of validation prompts."""
        out = []
        for prompts, truth in ((self.train, self.effects), (self.held, self.held_effects)):
            out.append(1.0 - float(((effects[prompts] - truth) ** 2).sum() / (truth**2).sum()))
        return out[0], out[1]

    def table(self, effects: Floats | None, vectors: Floats32 | None, *, counts: bool = True) -> tuple[Table, HeadSpec]:
        """The rows of the head: means, and if given the effect, the main directions of the vectors, the counts."""
        data, prompts = self.data, self.data.prompt
        columns: dict[str, Floats] = {
            "by_model": self.by_model,
            "expected": self.expected,
            "spread": self.row_spread,
        }
        for kind in np.unique(self.kinds):
            columns[f"kind_{kind}"] = (self.kinds[prompts] == kind).astype(np.float64)
        anchor = self.expected
        if effects is not None:
            columns["effect_units"] = effects[prompts]
            columns["effect"] = (effects * self.unit)[prompts]
            anchor = anchor + columns["effect"]
        if counts:
            columns |= {name: data.counts[prompts, i].astype(np.float64) for i, name in enumerate(COUNTS)}
        if vectors is not None:
            themes = _themes(_standardised(vectors, self.train), self.train)
            columns |= {f"theme_{i}": themes[prompts, i] for i in range(themes.shape[1])}
        spec = HeadSpec(name="sweep", version=1, features=tuple(columns), unit="tokens", softening=1.0)
        features = np.stack(list(columns.values()), axis=1).astype(np.float32)
        rows = len(data.tokens)
        table = Table(
            features=features,
            anchor=anchor,
            target=data.tokens,
            censored=np.zeros(rows, dtype=np.bool_),
            weight=np.ones(rows),
            group=np.full(rows, ""),
            split=self.row_split,
        )
        return table, spec


def score(table: Table, spec: HeadSpec, seed: int, *, epochs: int = 30) -> dict[str, float]:
    """Mean pinball loss [tokens] on validation and test prompts of one head that is trained with this seed."""
    settings = FitSettings(nets=1, hidden=32, epochs=epochs, patience=6, batch=1024, seed=seed)
    head = fit(table, spec, settings)
    out = {}
    for split in ("validation", "test"):
        rows = table.part(split)
        out[split] = float(pinball(rows.target, head.quantiles(rows.features, rows.anchor), spec.levels).mean())
    return out


def _standardised(vectors: Floats32, train: Ints) -> Floats32:
    """Zero mean, unit variance and a mean squared length of 1 on the training prompts; far values are held."""
    mean, scale = vectors[train].mean(axis=0), vectors[train].std(axis=0) + 1e-6
    x = np.clip((vectors - mean) / scale, -_FAR, _FAR)
    x /= np.sqrt((x[train] ** 2).sum(axis=1).mean())
    out: Floats32 = x.astype(np.float32)
    return out


def _themes(x: Floats32, train: Ints) -> Floats:
    """[prompts, THEMES at most]: the main directions of the training prompts, of unit variance."""
    _, _, directions = np.linalg.svd(x[train].astype(np.float64), full_matrices=False)
    themes: Floats = x @ directions[:THEMES].T
    themes /= np.maximum(themes[train].std(axis=0), 1e-9)
    return themes
