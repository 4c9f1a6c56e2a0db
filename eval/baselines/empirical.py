"""Forecasts of output length from what was seen before: quantiles by model and category, and moving histograms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from swarmx.core.forecast import LEVELS
from swarmx.neural.encoders.bag import COUNTS
from swarmx.neural.head import Floats
from swarmx.neural.losses import pinball
from swarmx.neural.training.lengths import Lengths

Rows = NDArray[np.int64]
Group = Literal["", "category", "model", "model_category"]

_LOG_BYTES = COUNTS.index("log_bytes")


class Grouping(NamedTuple):
    """Quantiles of a group, drawn to those of its parent as if `doubt` observations had been the parent's.

    The parent of a model is everybody; that of a (model, category) is the model, the category, or ("sum") the
    category moved by the model's usual distance from it.
    """

    group: Group
    doubt: float = 0.0
    parent: Literal["model", "category", "sum"] = "model"


class Histogram(NamedTuple):
    """Counts of output lengths by bucket of log2(input length), as AIBrix keeps them, and by model if it may.

    The last `window` observations count; `bins` a doubling; a model's bucket with fewer than `enough` of them is
    that of all models.
    """

    by_model: bool
    window: int
    bins: int
    enough: int


def groupings(group: Group) -> list[Grouping]:
    """What validation chooses among."""
    if group == "":
        return [Grouping("")]
    doubts = (0.0, 2.0, 5.0, 10.0, 20.0, 50.0)
    parents = ("model", "category", "sum") if group == "model_category" else ("model",)
    return [Grouping(group, doubt, parent) for doubt, parent in product(doubts, parents)]  # type: ignore[arg-type]


def histograms(*, by_model: bool) -> list[Histogram]:
    """What validation chooses among."""
    enough = (5, 20, 50) if by_model else (1,)
    return [Histogram(by_model, *rest) for rest in product((200, 1000, 10**6), (1, 4), enough)]


def grouped(lengths: Lengths, known: Rows, asked: Rows, choice: Grouping) -> Floats:
    """[asked, K] quantiles in tokens; shrunk in logarithms."""
    y = np.log(lengths.tokens + 1.0)
    everybody = _quantiles(y[known])
    category, model = _numbers(lengths.role), _numbers(lengths.model)
    out = np.tile(everybody, (len(asked), 1))
    if choice.group == "":
        return _tokens(out)
    if choice.group == "category":
        return _tokens(_shrunk(y, category, known, asked, out, choice.doubt))
    if choice.group == "model":
        return _tokens(_shrunk(y, model, known, asked, out, choice.doubt))
    if choice.parent == "model":
        out = _shrunk(y, model, known, asked, out, 5.0)
    else:
        out = _shrunk(y, category, known, asked, out, 5.0)
        if choice.parent == "sum":
            rest = y - _means(y, category, known, 5.0)
            out = out + _means(rest - rest[known].mean(), model, known, 2.0)[asked, None]
    both = category * (model.max() + 1) + model
    return _tokens(_shrunk(y, both, known, asked, out, choice.doubt))


def histogram(lengths: Lengths, known: Rows, asked: Rows, choice: Histogram, seed: int = 0) -> Floats:
    """[asked, K] quantiles in tokens; what is known arrived in the order of `seed`."""
    order = np.random.default_rng(seed).permutation(known)
    size = np.log2(np.expm1(np.array([bag.counts[_LOG_BYTES] for bag in lengths.bags])) + 1.0)
    bucket = np.floor(size).astype(np.int64)[lengths.prompt]
    model = _numbers(lengths.model)
    places = np.floor(choice.bins * np.log2(lengths.tokens)).astype(np.int64)
    found: dict[tuple[int, int], Floats] = {}
    out = np.empty((len(asked), len(LEVELS)))
    for row, i in enumerate(asked):
        key = (int(bucket[i]), int(model[i]) if choice.by_model else -1)
        if key not in found:
            in_bucket = order[bucket[order] == key[0]]
            if not len(in_bucket):
                in_bucket = order[np.abs(bucket[order] - key[0]).argsort(kind="stable")[: choice.window]]
            of_model = in_bucket[model[in_bucket] == key[1]]
            chosen = of_model if choice.by_model and len(of_model) >= choice.enough else in_bucket
            found[key] = _of_histogram(places[chosen[-choice.window :]], choice.bins)
        out[row] = found[key]
    return out


def losses(lengths: Lengths, rows: Rows, quantiles: Floats) -> Floats:
    """[rows]: pinball loss in tokens, mean over the levels; no forecast exceeds the limit of its call."""
    loss: Floats = pinball(lengths.tokens[rows], capped(lengths, rows, quantiles), LEVELS).mean(axis=1)
    return loss


def capped(lengths: Lengths, rows: Rows, quantiles: Floats) -> Floats:
    """The quantiles [rows, K] under the limits of their calls, where there are any."""
    limit = lengths.limit[rows]
    held: Floats = np.minimum(quantiles, np.where(np.isnan(limit), np.inf, limit)[:, None])
    return held


def pairs_of(lengths: Lengths, rows: Rows, few: int | None, rng: np.random.Generator) -> Iterator[Rows]:
    """The rows of each model in `rows`: all of them, or `few` at random of those that have as many."""
    for model in np.unique(lengths.model[rows]):
        of_model = rows[lengths.model[rows] == model]
        if few is None:
            yield of_model
        elif len(of_model) >= few:
            yield rng.choice(of_model, few, replace=False)


def _quantiles(y: Floats) -> Floats:
    return np.asarray(np.quantile(y, LEVELS), dtype=np.float64)


def _shrunk(y: Floats, group: Rows, known: Rows, asked: Rows, parents: Floats, doubt: float) -> Floats:
    out = parents.copy()
    order = known[np.argsort(group[known], kind="stable")]
    edges = np.searchsorted(group[order], np.arange(group.max() + 2))
    for name in np.unique(group[asked]):
        seen = y[order[edges[name] : edges[name + 1]]]
        if len(seen):
            places = group[asked] == name
            share = len(seen) / (len(seen) + doubt)
            out[places] = share * _quantiles(seen) + (1.0 - share) * parents[places]
    return out


def _means(y: Floats, group: Rows, known: Rows, doubt: float) -> Floats:
    size = int(group.max()) + 1
    overall = float(y[known].mean())
    sums = np.bincount(group[known], y[known], size) + doubt * overall
    means: Floats = sums / (np.bincount(group[known], minlength=size) + doubt)
    return means[group]


def _of_histogram(places: Rows, bins: int) -> Floats:
    values, counts = np.unique(places, return_counts=True)
    edges = np.exp2(np.concatenate([values / bins, (values[-1:] + 1) / bins]))
    upper = np.exp2((values + 1) / bins)
    cumulated = np.concatenate([[0.0], np.cumsum(counts) / counts.sum()])
    out = np.empty(len(LEVELS))
    for k, level in enumerate(LEVELS):
        i = min(int(np.searchsorted(cumulated, level, side="left")) - 1, len(values) - 1)
        share = (level - cumulated[i]) / (cumulated[i + 1] - cumulated[i])
        out[k] = edges[i] + share * (upper[i] - edges[i])
    return out


def _numbers(names: Sequence[str] | NDArray[np.str_]) -> Rows:
    return np.unique(np.asarray(names), return_inverse=True)[1].astype(np.int64)


def _tokens(log_quantiles: Floats) -> Floats:
    return np.maximum(np.exp(log_quantiles) - 1.0, 0.0)
