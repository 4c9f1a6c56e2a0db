"""From a folder of prompts and output lengths to an encoder, a memory and the training table of the length head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from swarmx.core.errors import PredictorError
from swarmx.core.prompts import cut
from swarmx.neural.encoders.bag import Bag, bag_of
from swarmx.neural.encoders.hashed import HashedEncoder
from swarmx.neural.head import Floats
from swarmx.neural.heads.length import LengthMemory, length_spec
from swarmx.neural.net import Floats32
from swarmx.neural.splits import split_of
from swarmx.neural.table import Table
from swarmx.neural.training.hashed import HashedSettings, HashedTrainer, corpus_of

FEW = (0, 3, 10, 30, 100)
_QUERIES, _NEWBORN_QUERIES = 120, 600
_SIDE = 0.3  # the weight of a row that is met with less than everything known
_COLUMNS = {"lengths": ("prompt_id", "model", "out_tokens", "limit"), "prompts": ("prompt_id", "category", "text")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Answers [rows] of models to prompts: the index of the prompt, the model, the role, tokens, limit (NaN: none).

    `prompt_split` [prompts] and `model_split` [rows] are the frozen splits; `texts` and `bags` [prompts].
    """

    prompt: NDArray[np.int64]
    model: NDArray[np.str_]
    role: NDArray[np.str_]
    tokens: Floats
    limit: Floats
    model_split: NDArray[np.str_]
    prompt_split: NDArray[np.str_]
    texts: list[str]
    bags: list[Bag]

    def rows(self, prompt_split: str, model_split: str) -> NDArray[np.bool_]:
        """Which rows have a prompt and a model of these splits; validation models count as seen for "train"."""
        models = self.model_split == "test" if model_split == "test" else self.model_split != "test"
        rows: NDArray[np.bool_] = (self.prompt_split[self.prompt] == prompt_split) & models
        return rows


def read_lengths(folder: Path, bits: int) -> Lengths:
    """Read `prompts.parquet` and `lengths.parquet` in a folder. Raises PredictorError that names file and column."""
    tables: dict[str, pl.DataFrame] = {}
    for name, columns in _COLUMNS.items():
        path = folder / f"{name}.parquet"
        try:
            table = pl.read_parquet(path)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise PredictorError(f"cannot read {path}: {error}; expected a folder with {name}.parquet.") from None
        if missing := [column for column in columns if column not in table.columns]:
            raise PredictorError(f"{path} lacks the columns {', '.join(missing)}; it has {', '.join(table.columns)}.")
        tables[name] = table.select(columns).with_columns(pl.col(pl.Categorical).cast(pl.String))
    prompts = tables["prompts"].unique("prompt_id", maintain_order=True)
    rows = tables["lengths"].join(prompts.select("prompt_id", "category"), on="prompt_id").filter(
        pl.col("out_tokens") > 0
    )  # fmt: skip
    if rows.is_empty():
        raise PredictorError(f"no row of {folder / 'lengths.parquet'} has a prompt in prompts.parquet and tokens.")
    place = {key: i for i, key in enumerate(prompts["prompt_id"].to_list())}
    models = rows["model"].to_list()
    of_model = {model: split_of("model", model) for model in set(models)}
    texts = prompts["text"].to_list()
    return Lengths(
        prompt=np.array([place[key] for key in rows["prompt_id"].to_list()]),
        model=np.array(models),
        role=np.array(rows["category"].fill_null("").to_list()),
        tokens=rows["out_tokens"].to_numpy().astype(np.float64),
        limit=rows["limit"].cast(pl.Float64).fill_null(float("nan")).to_numpy(),
        model_split=np.array([of_model[model] for model in models]),
        prompt_split=np.array([split_of("prompt", key) for key in place]),
        texts=texts,
        bags=[bag_of(cut(text.encode()), bits) for text in texts],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthData:
    """What `swarmx train length` needs: the encoder, the memory that ships with it, and the rows of the head.

    `memory` knows models and roles; `shipped` was told of no role, as a new installation is of none. `vectors` are
    [prompts, dimension]; `by_vector` is what a slower encoder adds (`AdaptedEncoder`).
    """

    encoder: HashedEncoder
    memory: LengthMemory
    shipped: LengthMemory
    vectors: Floats32
    table: Table
    by_vector: Floats32 | None = None


def length_data(
    lengths: Lengths,
    settings: HashedSettings,
    *,
    folds: int = 8,
    seed: int = 0,
    slow: Floats32 | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> LengthData:
    """Train the encoder and make the rows of the head, so that no row was seen by the encoder or memory it is read by.

    Cross-fitting: for each fold of the training prompts, encoder and memory learn from the other folds. Besides the
    full memory, each model is met again as a stranger of whom `FEW` answers are known, and each role as it is where
    SwarmX has just been installed; so the head learns what an offset is worth after so many observations. With `slow`
    [prompts, d], centred vectors of length one of a slower encoder, the experts read those too.
    """
    corpus = corpus_of(lengths.bags, settings.bits)
    trainer = HashedTrainer(corpus, lengths.prompt_split == "train", settings, slow)
    learnt = lengths.rows("train", "train") & (lengths.model_split == "train")
    rng = np.random.default_rng(seed)
    train_prompts = (lengths.prompt_split == "train").nonzero()[0]
    fold_of = np.full(len(lengths.texts), -1)
    fold_of[train_prompts] = rng.permutation(len(train_prompts)) % folds
    parts: list[_Rows] = []
    for fold in range(folds):
        progress(f"fold {fold + 1} of {folds}")
        known = learnt & (fold_of[lengths.prompt] != fold)
        encoder, memory, vectors, _ = _learn(lengths, trainer, known)
        asked = learnt & (fold_of[lengths.prompt] == fold)
        parts += _ask(lengths, encoder, memory, vectors, known, asked, "train", rng)
    progress("all folds")
    encoder, memory, vectors, by_vector = _learn(lengths, trainer, learnt)
    taught, shipped = memory.copy(), memory.copy()
    teach(shipped, encoder, vectors, lengths, rng.permutation(learnt.nonzero()[0]), roles=False)
    seen, strangers = lengths.model_split == "train", lengths.model_split == "validation"
    validation = lengths.prompt_split[lengths.prompt] == "validation"
    parts += _ask(lengths, encoder, memory, vectors, learnt, validation & seen, "validation", rng)
    of_strangers = (lengths.prompt_split[lengths.prompt] == "train") & strangers
    parts += _ask(lengths, encoder, memory, vectors, of_strangers, validation & strangers, "validation", rng)
    table = _table(parts)
    teach(taught, encoder, vectors, lengths, rng.permutation((learnt | of_strangers).nonzero()[0]))
    return LengthData(
        encoder=encoder, memory=taught, shipped=shipped, vectors=vectors, table=table, by_vector=by_vector
    )


def encode_all(encoder: HashedEncoder, bags: Sequence[Bag]) -> Floats32:
    """[prompts, dimension]."""
    return np.stack([encoder.of_bag(bag) for bag in bags])


def teach(
    memory: LengthMemory,
    encoder: HashedEncoder,
    vectors: Floats32,
    lengths: Lengths,
    rows: NDArray[np.int64],
    *,
    roles: bool = True,
) -> None:
    """Let the memory see these rows, in this order; without `roles` as if nobody had named what they were for."""
    for i in rows:
        vector = vectors[lengths.prompt[i]]
        role = str(lengths.role[i]) if roles else ""
        memory.learn(encoder, vector, str(lengths.model[i]), role, float(lengths.tokens[i]))


def ask(
    memory: LengthMemory,
    encoder: HashedEncoder,
    vectors: Floats32,
    lengths: Lengths,
    rows: NDArray[np.int64],
    *,
    roles: bool = True,
) -> tuple[Floats32, Floats]:
    """Features [rows, features] and anchors [rows] of these rows, from what the memory knows now; without `roles` as
    if theirs were not known."""
    features = np.empty((len(rows), len(length_spec(encoder.themes, encoder.experts).features)), dtype=np.float32)
    anchors = np.empty(len(rows))
    for place, i in enumerate(rows):
        features[place], anchors[place] = memory.features(
            encoder,
            vectors[lengths.prompt[i]],
            str(lengths.model[i]),
            str(lengths.role[i]) if roles else "",
        )
    return features, anchors


@dataclass(frozen=True, slots=True)
class _Rows:
    features: Floats32
    anchor: Floats
    tokens: Floats
    weight: Floats
    group: NDArray[np.str_]
    split: str


def _learn(
    lengths: Lengths, trainer: HashedTrainer, known: NDArray[np.bool_]
) -> tuple[HashedEncoder, LengthMemory, Floats32, Floats32 | None]:
    """An encoder and a memory from these rows alone, all vectors, and what a slower encoder adds to them."""
    log_tokens = np.log(lengths.tokens + 1.0)
    rows = known.nonzero()[0]
    kinds = trainer.gates.argmax(axis=1)[lengths.prompt]
    experts = trainer.gates.shape[1]
    overall = log_tokens[rows].mean()
    count = np.bincount(kinds[rows], minlength=experts)
    kind_mean = (np.bincount(kinds[rows], log_tokens[rows], experts) + 5.0 * overall) / (count + 5.0)
    _, model_index = np.unique(lengths.model, return_inverse=True)
    cell = model_index * experts + kinds
    rest = log_tokens - kind_mean[kinds]
    cells = int(cell.max()) + 1
    usual = np.bincount(cell[rows], rest[rows], cells) / (np.bincount(cell[rows], minlength=cells) + 5.0)
    rest -= usual[cell]
    prompts = len(lengths.texts)
    observations = np.bincount(lengths.prompt[rows], minlength=prompts)
    effects = np.bincount(lengths.prompt[rows], rest[rows], prompts) / np.maximum(observations, 1)
    encoder, by_vector = trainer.train_both(effects, observations, (observations > 0).nonzero()[0])
    vectors = encode_all(encoder, lengths.bags)
    if trainer.vectors is not None and by_vector is not None:
        more = trainer.vectors @ by_vector
        vectors = np.stack([encoder.with_effects(v, m) for v, m in zip(vectors, more, strict=True)])
    spread = np.sqrt((np.bincount(kinds[rows], rest[rows] ** 2, experts) + 5.0 * 0.25) / (count + 5.0))
    memory = LengthMemory(kind_means=kind_mean.astype(np.float32), kind_spreads=spread.astype(np.float32))
    return encoder, memory, vectors, by_vector


def _ask(
    lengths: Lengths,
    encoder: HashedEncoder,
    memory: LengthMemory,
    vectors: Floats32,
    known: NDArray[np.bool_],
    asked: NDArray[np.bool_],
    split: str,
    rng: np.random.Generator,
) -> list[_Rows]:
    """Rows for `asked`: once with all of `known` in the memory.

    A part of them also with few answers of the model known, and as a new installation asks them, which knows models a
    little, and few answers of each role, or none.
    """
    newborn = memory.copy()
    teach(memory, encoder, vectors, lengths, rng.permutation(known.nonzero()[0]))
    parts = [_part(lengths, encoder, memory, vectors, asked.nonzero()[0], split, 1.0)]
    for model in np.unique(lengths.model[asked]):
        of_model = rng.permutation((known & (lengths.model == model)).nonzero()[0])
        queries = rng.permutation((asked & (lengths.model == model)).nonzero()[0])[:_QUERIES]
        stranger = memory.copy()
        stranger.forget_model(model)
        for before, after in zip((0, *FEW[:-1]), FEW, strict=True):
            if after > len(of_model):
                break
            teach(stranger, encoder, vectors, lengths, of_model[before:after])
            parts.append(_part(lengths, encoder, stranger, vectors, queries, split, _SIDE))
    teach(newborn, encoder, vectors, lengths, rng.permutation(known.nonzero()[0]), roles=False)
    newborn = newborn.as_shipped()
    queries = rng.permutation(asked.nonzero()[0])[:_NEWBORN_QUERIES]
    parts.append(_part(lengths, encoder, newborn, vectors, queries, split, _SIDE, roles=False))
    of_role = [
        rng.permutation((known & (lengths.role == role)).nonzero()[0]) for role in np.unique(lengths.role[known])
    ]
    for before, after in zip((0, *FEW[:-1]), FEW, strict=True):
        early = np.concatenate([rows[before:after] for rows in of_role] or [queries[:0]])
        teach(newborn, encoder, vectors, lengths, rng.permutation(early))
        parts.append(_part(lengths, encoder, newborn, vectors, queries, split, _SIDE))
    return parts


def _part(
    lengths: Lengths,
    encoder: HashedEncoder,
    memory: LengthMemory,
    vectors: Floats32,
    rows: NDArray[np.int64],
    split: str,
    weight: float,
    *,
    roles: bool = True,
) -> _Rows:
    features, anchor = ask(memory, encoder, vectors, lengths, rows, roles=roles)
    kinds = vectors[lengths.prompt[rows], encoder.themes : encoder.themes + encoder.experts].argmax(axis=1)
    return _Rows(
        features, anchor, lengths.tokens[rows], np.full(len(rows), weight), np.array([f"kind{k}" for k in kinds]), split
    )


def _table(parts: Sequence[_Rows]) -> Table:
    return Table(
        features=np.concatenate([part.features for part in parts]),
        anchor=np.concatenate([part.anchor for part in parts]),
        target=np.concatenate([part.tokens for part in parts]),
        censored=np.zeros(sum(len(part.tokens) for part in parts), dtype=np.bool_),
        weight=np.concatenate([part.weight for part in parts]),
        group=np.concatenate([part.group for part in parts if len(part.group)]),
        split=np.concatenate([np.full(len(part.tokens), part.split) for part in parts]),
    )
