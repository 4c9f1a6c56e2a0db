"""Trains the hashed encoder: k-means for the kinds of text, then one ridge regression for all experts together.

Closed form in numpy: a few thousand prompts take seconds, and the same seed gives the same encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swarmx.neural.encoders.bag import Bag
from swarmx.neural.encoders.hashed import HashedEncoder
from swarmx.neural.head import Floats
from swarmx.neural.net import Floats32

_FAR = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HashedSettings:
    """Shape and regularisation of the encoder.

    `ridge` is the penalty against a kernel whose diagonal is about `shared` + 1; `count_weight` what the counts are
    worth beside the words; `sharpness` turns similarities to the centres of the kinds into gates; a prompt with few
    observations weighs less (`noise` is the variance of one of them relative to that of the prompts).
    """

    bits: int = 15
    themes: int = 0
    experts: int = 6
    least_documents: int = 3
    ridge: float = 0.4
    shared: float = 0.1
    count_weight: float = 4.0
    sharpness: float = 30.0
    noise: float = 2.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Corpus:
    """The bags of the prompts as they enter the regression: words [prompts, 2^bits], counts [prompts, counts]."""

    words: Floats32
    counts: Floats32


def corpus_of(bags: Sequence[Bag], bits: int) -> Corpus:
    """Dense on purpose: thousands of prompts at 2^14 places fit in memory, and BLAS does the rest."""
    words = np.zeros((len(bags), 1 << bits), dtype=np.float32)
    for row, bag in enumerate(bags):
        words[row, bag.ids] = bag.weights
    return Corpus(words, np.stack([bag.counts for bag in bags]))


class HashedTrainer:
    """What does not depend on the lengths, done once: weights of words, kinds of text, kernels, themes.

    `known` [prompts] are the prompts that may be learnt from. With `vectors` [prompts, d] of another encoder, centred
    and of length one, the experts read these beside the words.
    """

    def __init__(
        self,
        corpus: Corpus,
        known: NDArray[np.bool_],
        settings: HashedSettings,
        vectors: Floats32 | None = None,
    ) -> None:
        self.settings = settings
        rows = known.nonzero()[0]
        seen = (corpus.words[rows] > 0).sum(axis=0)
        self.idf = np.where(seen >= settings.least_documents, np.log((1 + len(rows)) / (1 + seen)) + 1.0, 0.0).astype(
            np.float32
        )
        words = corpus.words * self.idf
        words /= np.maximum(np.sqrt((words * words).sum(axis=1, keepdims=True)), 1e-9)
        self.words = words
        self.count_mean = corpus.counts[rows].mean(axis=0)
        self.count_scale = np.maximum(corpus.counts[rows].std(axis=0), 0.05)
        self.counts = np.clip((corpus.counts - self.count_mean) / self.count_scale, -_FAR, _FAR).astype(np.float32)
        rng = np.random.default_rng(settings.seed)
        self.centres = _k_means(words[rows], settings.experts, rng)
        logits = settings.sharpness * (words @ self.centres.T - 0.5 * (self.centres**2).sum(axis=1))
        logits -= logits.max(axis=1, keepdims=True)
        gates = np.exp(logits)
        self.gates: Floats = gates / gates.sum(axis=1, keepdims=True)
        self.themes = _themes(words[rows], settings.themes)
        weight = settings.count_weight**2 / self.counts.shape[1]
        self.kernel: Floats = (words @ words.T + weight * (self.counts @ self.counts.T)).astype(np.float64)
        self.vectors = vectors
        if vectors is not None:
            self.kernel += vectors @ vectors.T
        self.kernel *= settings.shared + self.gates @ self.gates.T

    def train(self, effects: Floats, observations: NDArray[np.int64], rows: NDArray[np.int64]) -> HashedEncoder:
        """An encoder from the mean log effects [prompts], each of so many observations, of the prompts in `rows`."""
        return self.train_both(effects, observations, rows)[0]

    def train_both(
        self, effects: Floats, observations: NDArray[np.int64], rows: NDArray[np.int64]
    ) -> tuple[HashedEncoder, Floats32 | None]:
        """The encoder, and the map [d, 1 + experts] of the other encoder's vectors to what they add to its effects."""
        settings = self.settings
        variance = self.gates[rows].T @ effects[rows] ** 2 / np.maximum(self.gates[rows].sum(axis=0), 1e-9)
        spread = np.sqrt(np.maximum(variance, 1e-4))
        target = effects[rows] / (self.gates[rows] @ spread)
        reliable = 1.0 / np.sqrt(1.0 + settings.noise / np.maximum(observations[rows], 1))
        kernel = self.kernel[np.ix_(rows, rows)] * reliable[:, None] * reliable[None, :]
        kernel[np.diag_indices_from(kernel)] += settings.ridge
        dual = np.linalg.solve(kernel, target * reliable) * reliable
        mixed = np.column_stack([np.full(len(rows), settings.shared), self.gates[rows]]) * dual[:, None]
        by_word = self.words[rows].T @ mixed.astype(np.float32)
        dense = self.counts[rows].T @ mixed.astype(np.float32)
        dense *= settings.count_weight**2 / self.counts.shape[1]
        gate_table = settings.sharpness * self.centres.T
        by_vector = None if self.vectors is None else (self.vectors[rows].T @ mixed).astype(np.float32)
        encoder = HashedEncoder(
            bits=settings.bits,
            themes=settings.themes,
            experts=settings.experts,
            table=_halved(np.concatenate([self.themes, gate_table, by_word], axis=1)),
            idf=self.idf,
            dense=dense.astype(np.float32),
            dense_bias=np.zeros(1 + settings.experts, dtype=np.float32),
            gate_bias=(-0.5 * settings.sharpness * (self.centres**2).sum(axis=1)).astype(np.float32),
            spread=spread.astype(np.float32),
            count_mean=self.count_mean.astype(np.float32),
            count_scale=self.count_scale.astype(np.float32),
        )
        return encoder, by_vector


def _halved(table: Floats32) -> Floats32:
    """What will be left of the numbers on disk, where two bytes each are enough."""
    halved: Floats32 = table.astype(np.float16).astype(np.float32)
    return halved


def _themes(words: Floats32, count: int) -> Floats32:
    """[2^bits, count]: the main directions of the bags (latent semantic analysis), of unit variance."""
    if count == 0:
        return np.zeros((words.shape[1], 0), dtype=np.float32)
    values, vectors = np.linalg.eigh((words @ words.T).astype(np.float64))
    values, vectors = values[::-1][:count], vectors[:, ::-1][:, :count]
    signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(vectors.shape[1])])
    directions: Floats32 = words.T @ (vectors * signs / np.sqrt(np.maximum(values, 1e-9))).astype(np.float32)
    scale = (words @ directions).std(axis=0)
    table = np.zeros((words.shape[1], count), dtype=np.float32)
    table[:, : directions.shape[1]] = directions / np.maximum(scale, 1e-9)
    return table


def _k_means(words: Floats32, count: int, rng: np.random.Generator, rounds: int = 30) -> Floats32:
    """[count, 2^bits]: centres of `count` clusters, k-means++ (Arthur and Vassilvitskii, 2007) and Lloyd's rounds."""
    centres = words[rng.integers(len(words))][None, :]
    while len(centres) < count:
        distance = np.maximum(0.0, 1.0 + (centres**2).sum(axis=1) - 2.0 * words @ centres.T).min(axis=1)
        centres = np.vstack([centres, words[rng.choice(len(words), p=distance / distance.sum())]])
    for _ in range(rounds):
        nearest = ((centres**2).sum(axis=1) - 2.0 * words @ centres.T).argmin(axis=1)
        moved = np.stack(
            [words[nearest == c].mean(axis=0) if (nearest == c).any() else centres[c] for c in range(count)]
        )
        if np.allclose(moved, centres, atol=1e-6):
            break
        centres = moved
    found: Floats32 = centres.astype(np.float32)
    return found
