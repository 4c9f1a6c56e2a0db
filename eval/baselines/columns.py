"""What the regressions read: TF-IDF directions, counts, and target encodings of the length by model and category.

The baselines get every idea that our head has: offsets that shrink, out-of-fold target encodings, a prompt effect that
was learnt without the row's own prompt, and training rows on which a model is a stranger with few answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from eval.baselines.empirical import Rows
from swarmx.core.prompts import HEAD_BYTES
from swarmx.neural.encoders.bag import COUNTS
from swarmx.neural.head import Floats
from swarmx.neural.heads.length import log_params
from swarmx.neural.net import Floats32
from swarmx.neural.training.lengths import LengthData, Lengths

Text = Literal["svd", "svd+effect", "embedding", "embedding_oof"]

FEW = (0, 50)
_FOLDS = 6
_STRANGERS = 120
_DIRECTIONS = 64
_OFFSETS = 8


class Encodings(NamedTuple):
    """How many observations it takes to believe an offset half."""

    category: float = 20.0
    model: float = 2.0
    both: float = 8.0
    spread: float = 10.0


@dataclass(frozen=True, slots=True)
class Prompts:
    """Features of all prompts by kind of text, and a similarity for the ridge regression of effects.

    `columns` [prompts, features] by name; `kernel` [prompts, prompts]. Only train prompts shaped them.
    """

    columns: dict[Text, Floats]
    kernel: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """Rows for a regression of log(tokens + 1): x [rows, features], target and anchor [rows], weight [rows].

    The last column of `x` is the model as a category, NaN for a stranger. `rows` are those of the lengths, or empty.
    """

    rows: Rows
    x: Floats
    target: Floats
    anchor: Floats
    weight: Floats


def prompts_of(lengths: Lengths, data: LengthData) -> Prompts:
    """TF-IDF directions, counts, and the frozen vector of our encoder, as it is and with out-of-fold effects."""
    known = np.flatnonzero(lengths.prompt_split == "train")
    word = r"(?u)\b\w+\b"  # of one letter, too
    vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2, token_pattern=word)
    texts = [text[: 2 * HEAD_BYTES] or "empty" for text in lengths.texts]
    vectorizer.fit([texts[i] for i in known])
    words = vectorizer.transform(texts)
    directions = min(_DIRECTIONS, words.shape[1] - 1, len(known) - 1)
    svd = TruncatedSVD(directions, random_state=0).fit(words[known])
    counts = np.stack([bag.counts for bag in lengths.bags]).astype(np.float64)
    standard = (counts - counts[known].mean(axis=0)) / np.maximum(counts[known].std(axis=0), 0.05)
    standard = np.clip(standard, -5.0, 5.0)
    kernel = (words @ words.T).toarray() + 0.5 * standard @ standard.T / len(COUNTS)
    with_svd = np.hstack([svd.transform(words), counts])
    frozen = data.vectors.astype(np.float64)
    return Prompts({
        "svd": with_svd, "svd+effect": with_svd, "embedding": frozen, "embedding_oof": out_of_fold(frozen, data),
    }, kernel)  # fmt: skip


def out_of_fold(vectors: Floats, data: LengthData) -> Floats:
    """The vectors [prompts, dimension] with the effects of train prompts from encoders that did not learn from them.

    The training table of our head holds those; a row of it is found by the counts of its prompt.
    """
    encoder = data.encoder
    at = encoder.themes + encoder.experts
    counts = slice(at + 1, at + 1 + len(COUNTS))
    rows = data.table.features[data.table.split == "train"]
    effects = {row[counts].tobytes(): row[at] for row in np.ascontiguousarray(rows, dtype=np.float32)}
    crossed = vectors.copy()
    for row, vector in zip(crossed, data.vectors, strict=True):
        row[at] = effects.get(np.ascontiguousarray(vector[counts]).tobytes(), row[at])
    return crossed


class Ground:
    """The features of one text, for what is known: fits the prompt effects and offsets, makes the designs."""

    def __init__(
        self,
        lengths: Lengths,
        prompts: Prompts,
        data: LengthData,
        text: Text,
        known: Rows,
        *,
        ridge: float = 1.0,
        encodings: Encodings = Encodings(),  # noqa: B008
        seed: int = 0,
    ) -> None:
        self.lengths, self.encodings, self.known = lengths, encodings, known
        self.columns = prompts.columns[text]
        self.y = np.log(lengths.tokens + 1.0)
        self.category = np.unique(lengths.role, return_inverse=True)[1]
        self.categories = int(self.category.max()) + 1
        names, self.model = np.unique(lengths.model, return_inverse=True)
        self.models = len(names)
        self.log_params = np.array([log_params(str(name)) for name in names])
        self.rng = np.random.default_rng(seed)
        train = np.unique(lengths.prompt[known])
        self.fold = np.full(len(lengths.texts), -1)
        self.fold[train] = self.rng.permutation(len(train)) % _FOLDS
        if text.startswith("embedding"):
            place = data.encoder.themes + data.encoder.experts
            self.effect = self.columns[:, place]
        elif text == "svd+effect":
            self.effect = self._effects(prompts.kernel, ridge)
            self.columns = np.column_stack([self.columns, self.effect])
        else:
            self.effect = np.zeros(len(lengths.texts))

    def train(self) -> Design:
        """The known rows, each with encodings of the other folds, and again with its model as a stranger."""
        parts: list[Design] = []
        fold = self.fold[self.lengths.prompt[self.known]]
        for held in range(_FOLDS):
            known, asked = self.known[fold != held], self.known[fold == held]
            if not len(known) or not len(asked):
                continue
            parts.append(self._design(known, self.model[known], asked, self.model[asked], self.model[asked], 1.0))
            copies, named, queries = [known], [self.model[known]], []
            for model in np.unique(self.model[asked]):
                of_model = self.rng.permutation(known[self.model[known] == model])
                for place, few in enumerate(FEW):
                    if few > len(of_model):
                        continue
                    name = self.models + place * self.models + model
                    copies.append(of_model[:few])
                    named.append(np.full(few, name))
                    mine = self.rng.permutation(asked[self.model[asked] == model])[: _STRANGERS // _FOLDS]
                    queries.append((mine, np.full(len(mine), name)))
            rows = np.concatenate([mine for mine, _ in queries])
            names = np.concatenate([name for _, name in queries])
            parts.append(self._design(np.concatenate(copies), np.concatenate(named), rows, names, None, 0.3))
        return _joined(parts)

    def asked(self, rows: Rows) -> Design:
        """Rows with the encodings of everything that is known."""
        seen = np.isin(self.model[rows], self.model[self.known])
        identity = np.where(seen, self.model[rows], np.nan)
        return self._design(self.known, self.model[self.known], rows, self.model[rows], identity, 1.0)

    def explained(self, rows: Rows) -> float:
        """The share of the variance of prompt means in `rows` that the effects explain, offsets removed."""
        design = self.asked(rows)
        residual = self.y[rows] - (design.anchor - self.effect[self.lengths.prompt[rows]])
        _, prompt = np.unique(self.lengths.prompt[rows], return_inverse=True)
        mean = np.bincount(prompt, residual) / np.bincount(prompt)
        said = np.bincount(prompt, self.effect[self.lengths.prompt[rows]]) / np.bincount(prompt)
        return float(1.0 - np.mean((mean - said) ** 2) / np.mean(mean**2))

    def _effects(self, kernel: Floats, ridge: float) -> Floats:
        """[prompts]: by kernel ridge regression; for train prompts by folds."""
        prompts = len(self.lengths.texts)
        known = self.known
        self.effect = np.zeros(prompts)
        rest = self.y[known] - self._offsets(known, self.model[known], known, self.model[known])[0][:, -1]
        count = np.bincount(self.lengths.prompt[known], minlength=prompts)
        mean = np.bincount(self.lengths.prompt[known], rest, prompts) / np.maximum(count, 1)
        effect = np.zeros(prompts)
        for held in range(-1, _FOLDS):
            rows = np.flatnonzero((self.fold >= 0) & (self.fold != held))
            asked = np.flatnonzero(self.fold == held)
            if len(rows) and len(asked):
                system = kernel[np.ix_(rows, rows)] + np.diag(ridge * (1.0 + 2.0 / np.maximum(count[rows], 1)))
                effect[asked] = kernel[np.ix_(asked, rows)] @ np.linalg.solve(system, mean[rows])
        return effect

    def _design(
        self, known: Rows, known_model: Rows, rows: Rows, model: Rows, identity: Floats | Rows | None, weight: float
    ) -> Design:
        encoded, anchor = self._offsets(known, known_model, rows, model)
        prompt = self.lengths.prompt[rows]
        anchor = anchor + self.effect[prompt]
        category = np.eye(self.categories)[self.category[rows]]
        named = np.full(len(rows), np.nan) if identity is None else identity.astype(np.float64)
        limit = np.log1p(self.lengths.limit[rows])
        size = self.log_params[self.model[rows]]
        x = np.column_stack([self.columns[prompt], encoded, anchor, category, limit, size, named])
        return Design(rows=rows, x=x, target=self.y[rows], anchor=anchor, weight=np.full(len(rows), weight))

    def _offsets(self, known: Rows, known_model: Rows, rows: Rows, model: Rows) -> tuple[Floats, Floats]:
        """Columns [rows, `_OFFSETS`] (the last is the sum) and the sum [rows], from what `known` leave over effects."""
        rest = self.y[known] - self.effect[self.lengths.prompt[known]]
        overall = float(rest.mean())
        rest = rest - overall
        total = np.full(len(rows), overall)
        names = max(int(known_model.max(initial=0)), int(model.max(initial=0))) + 1
        keys = (
            (self.category[known], self.category[rows], self.encodings.category),
            (known_model, model, self.encodings.model),
            (self.category[known] * names + known_model, self.category[rows] * names + model, self.encodings.both),
        )
        columns: list[Floats] = []
        for mine, asked, doubt in keys:
            size = int(max(mine.max(initial=0), asked.max(initial=0))) + 1
            count = np.bincount(mine, minlength=size)
            mean = np.bincount(mine, rest, size) / (count + doubt)
            rest = rest - mean[mine]
            total = total + mean[asked]
            columns += [mean[asked], np.log1p(count[asked])]
        usual = float(np.mean(rest**2))
        square = np.bincount(known_model, rest**2, names) + self.encodings.spread * usual
        spread = square / (np.bincount(known_model, minlength=names) + self.encodings.spread)
        columns.append(0.5 * np.log(spread[model]))
        return np.column_stack([*columns, total]), total


def _joined(parts: Sequence[Design]) -> Design:
    return Design(
        rows=np.concatenate([part.rows for part in parts]),
        x=np.concatenate([part.x for part in parts]),
        target=np.concatenate([part.target for part in parts]),
        anchor=np.concatenate([part.anchor for part in parts]),
        weight=np.concatenate([part.weight for part in parts]),
    )


def table_design(data: LengthData, split: str) -> Design:
    """The rows that our own head learns from, for the boosting that reads our memory: an ablation, no baseline."""
    table = data.table.part(split)
    if split != "train":
        table = table.where(table.weight >= 1.0)
    return features_design(table.features, table.anchor, np.log(table.target + 1.0), table.weight)


def features_design(features: Floats32, anchor: Floats, target: Floats, weight: Floats) -> Design:
    """Our features as a design; there is no column for the model."""
    x = np.column_stack([features.astype(np.float64), np.full(len(features), np.nan)])
    return Design(rows=np.zeros(0, dtype=np.int64), x=x, target=target, anchor=anchor, weight=weight)


def with_other_answers(ground: Ground, answered: NDArray[np.bool_]) -> Callable[[Design], Design]:
    """Lets designs read what other models answered to the same prompt: a bound, not a forecast.

    `answered` [all rows] may be read. The ground's offsets are then those that are left when the prompts' effects are
    known, and a row reads mean, spread and number of the other answers to its prompt instead of the text.
    """
    lengths = ground.lengths
    rest = ground.y - ground.asked(np.arange(len(ground.y))).anchor
    prompts = len(lengths.texts)
    where = lengths.prompt[answered]
    count = np.bincount(where, minlength=prompts)
    total = np.bincount(where, rest[answered], prompts)
    square = np.bincount(where, rest[answered] ** 2, prompts)
    ground.effect = total / (count + 1.0)
    width = ground.columns.shape[1]

    def read(design: Design) -> Design:
        rows = design.rows
        prompt, mine = lengths.prompt[rows], answered[rows].astype(np.float64)
        others = count[prompt] - mine
        mean = (total[prompt] - mine * rest[rows]) / (others + 1.0)
        variance = (square[prompt] - mine * rest[rows] ** 2) / np.maximum(others, 1.0) - mean**2
        offsets = design.x[:, width : width + _OFFSETS]
        anchor = offsets[:, -1] + mean
        spread = np.sqrt(np.maximum(variance, 0.0))
        x = np.column_stack([mean, spread, others, offsets, anchor, design.x[:, width + _OFFSETS + 1 :]])
        return replace(design, x=x, anchor=anchor)

    return read
