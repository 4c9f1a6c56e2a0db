"""Trains an isomorphic encoder end to end: what prompts tell about the length of their answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from swarmx.core.errors import PredictorError
from swarmx.core.forecast import LEVELS
from swarmx.core.prompts import PromptText
from swarmx.neural.checkpoint import middle_of
from swarmx.neural.encoders.isomorphic import IsomorphicEncoder, build, pooled
from swarmx.neural.head import Floats
from swarmx.neural.training.reduce import arrays_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Lessons:
    """What an encoder learns from, one entry a prompt.

    `residuals` are the outcomes of a prompt [answers]: log(tokens) less what was to be expected without reading it;
    `classes` names its kind: a feature may mean something else in another kind of prompt.
    """

    prompts: Sequence[PromptText]
    residuals: Sequence[Floats]
    classes: Sequence[str]
    split: NDArray[np.str_]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSettings:
    """How an encoder is trained. The last layer's quantiles are first fitted alone (`probe_epochs`), so that what the
    network brings along is not shaken off (Kumar et al., ICLR 2022)."""

    epochs: int = 2
    probe_epochs: int = 60
    batch: int = 16
    learning_rate: float = 2e-5
    probe_learning_rate: float = 3e-3
    weight_decay: float = 0.1
    dropout: float = 0.2
    train_table: bool = False
    patience: int = 2
    seed: int = 0


class _Probe(nn.Module):
    """Quantiles of the residual [prompts, K] from vectors [prompts, dimension]: one linear map for all classes, and
    one a class around it."""

    def __init__(self, vectors: torch.Tensor, classes: int, dropout: float) -> None:
        super().__init__()
        k, size = len(LEVELS), vectors.shape[1]
        self.mean, self.scale = nn.Buffer(vectors.mean(0)), nn.Buffer(vectors.std(0) + 1e-4)
        self.middle = middle_of(LEVELS)
        self.shared = nn.Parameter(torch.zeros(size, k))
        self.own = nn.Parameter(torch.zeros(classes, size, k))
        self.bias = nn.Parameter(torch.full((classes, k), -1.5))
        with torch.no_grad():
            self.bias[:, self.middle] = 0.0
        self.dropout = nn.Dropout(dropout)

    def forward(self, vectors: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
        x = self.dropout(((vectors - self.mean) / self.scale).clamp(-6.0, 6.0)) / math.sqrt(len(self.mean))
        z = x @ self.shared + torch.einsum("nd,ndk->nk", x, self.own[kinds]) + self.bias[kinds]
        steps = (z + torch.sqrt(z * z + 4.0)) / 2.0
        centre = z[:, self.middle : self.middle + 1]
        above = centre + torch.cumsum(steps[:, self.middle + 1 :], 1)
        below = centre - torch.cumsum(steps[:, : self.middle].flip(1), 1).flip(1)
        return torch.cat([below, centre, above], 1)


class _Course:
    """The outcomes as tensors: [prompts, answers] in units of the class's deviation, and which of them there are."""

    def __init__(self, lessons: Lessons, train: NDArray[np.intp]) -> None:
        classes = np.asarray(lessons.classes)
        self.names = sorted(set(lessons.classes))
        self.kinds = torch.tensor([self.names.index(name) for name in lessons.classes])
        counts = [len(r) for r in lessons.residuals]
        outcomes = np.zeros((len(counts), max(1, *counts)), dtype=np.float32)
        means = np.zeros(len(counts))
        for i, residuals in enumerate(lessons.residuals):
            outcomes[i, : counts[i]] = residuals
            means[i] = np.mean(residuals) if counts[i] else 0.0
        for name in self.names:
            of_class = means[train][classes[train] == name]
            outcomes[classes == name] /= max(float(of_class.std()), 0.05) if len(of_class) > 1 else 1.0
        self.outcomes = torch.from_numpy(outcomes)
        self.there = torch.arange(outcomes.shape[1])[None, :] < torch.tensor(counts)[:, None]
        self.tau = torch.tensor(LEVELS)

    def loss(self, probe: _Probe, vectors: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Pinball loss of the vectors [rows, dimension] of these prompts; each prompt counts the same."""
        error = self.outcomes[rows][:, :, None] - probe(vectors, self.kinds[rows])[:, None, :]
        loss = torch.maximum(self.tau * error, (self.tau - 1.0) * error).mean(2)
        there = self.there[rows]
        return ((loss * there).sum(1) / there.sum(1).clamp(min=1)).mean()

    def score(self, probe: _Probe, vectors: torch.Tensor, rows: torch.Tensor) -> float:
        """The same without dropout or gradients."""
        probe.eval()
        with torch.no_grad():
            value = float(self.loss(probe, vectors, rows))
        probe.train()
        return value


def fit_encoder(
    encoder: IsomorphicEncoder,
    lessons: Lessons,
    settings: EncoderSettings,
    *,
    progress: Callable[[int, float], None] = lambda epoch, loss: None,
) -> IsomorphicEncoder:
    """A better encoder of the same architecture, by the validation prompts; perhaps the one that was given.

    Pinball loss of the quantiles of each prompt's outcomes, in units of its class's deviation. The test prompts are
    not looked at. `progress` is told (epoch, validation loss); epoch 0 is the given encoder with a fitted last layer.

    Raises PredictorError when there is too little to learn from.
    """
    train, held = (np.flatnonzero(lessons.split == part) for part in ("train", "validation"))
    if len(train) < 32 or len(held) < 8:
        raise PredictorError(
            f"an encoder needs at least 32 prompts to train and 8 to validate on, got {len(train)} and {len(held)}; "
            "give it more data."
        )
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    course, tokens = _Course(lessons, train), [encoder.tokens(prompt) for prompt in lessons.prompts]
    train_rows, held_rows = torch.from_numpy(train), torch.from_numpy(held)
    vectors = torch.from_numpy(encoder.encode(lessons.prompts))
    probe = _Probe(vectors[train_rows], len(course.names), settings.dropout)
    best = _fit_probe(probe, course, vectors, train_rows, held_rows, settings, generator)
    module = build(encoder.config)
    module.load_state_dict(encoder.module.state_dict())
    found = arrays_of(module)
    progress(0, best)
    learnt = [p for n, p in module.named_parameters() if settings.train_table or not n.endswith("embed_tokens.weight")]
    rates = (settings.learning_rate, settings.probe_learning_rate / 10.0)
    groups: list[dict[str, Any]] = [{"params": learnt}, {"params": probe.parameters()}]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.01)
    stale, step, steps = 0, 0, settings.epochs * math.ceil(len(train) / settings.batch)
    for epoch in range(1, settings.epochs + 1):
        module.train()
        for rows in _batches(train_rows, tokens, settings.batch, generator):
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * min(1.0, (step + 1) / 50.0) * (1.0 - step / steps)
            loss = course.loss(probe, pooled(module, [tokens[i] for i in rows.tolist()]), rows)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(learnt, 1.0)
            optimiser.step()
            step += 1
        module.eval()
        score = course.score(probe, _vectors(module, tokens, held_rows), held_rows)
        progress(epoch, score)
        stale += 1
        if score < best:
            best, found, stale = score, arrays_of(module), 0
        if stale >= settings.patience:
            break
    return encoder.with_weights(found)


def _fit_probe(
    probe: _Probe,
    course: _Course,
    vectors: torch.Tensor,
    train: torch.Tensor,
    held: torch.Tensor,
    settings: EncoderSettings,
    generator: torch.Generator,
) -> float:
    """Fits the last layer to the given vectors and leaves it at its best; returns the validation loss."""
    optimiser = torch.optim.AdamW(
        probe.parameters(), lr=settings.probe_learning_rate, weight_decay=settings.weight_decay
    )
    best, found = math.inf, {name: value.clone() for name, value in probe.state_dict().items()}
    for _ in range(settings.probe_epochs):
        for rows in torch.split(train[torch.randperm(len(train), generator=generator)], 128):
            loss = course.loss(probe, vectors[rows], rows)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        score = course.score(probe, vectors[held], held)
        if score < best:
            best, found = score, {name: value.clone() for name, value in probe.state_dict().items()}
    probe.load_state_dict(found)
    return best


def _batches(
    rows: torch.Tensor, tokens: Sequence[Sequence[int]], size: int, generator: torch.Generator
) -> list[torch.Tensor]:
    """Batches of prompts of like length, so that little is padding, in random order."""
    noisy = torch.tensor([float(len(tokens[i])) for i in rows.tolist()])
    noisy = noisy * (1.0 + torch.rand(len(rows), generator=generator))
    batches = list(torch.split(rows[noisy.argsort()], size))
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def _vectors(module: nn.Module, tokens: Sequence[Sequence[int]], rows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([pooled(module, [tokens[i] for i in part.tolist()]) for part in torch.split(rows, 8)])
