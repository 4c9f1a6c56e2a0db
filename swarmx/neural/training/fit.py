"""Fits the networks of a head: weighted pinball loss, AdamW, early stopping, resumable, the same from the same seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from swarmx.core.errors import PredictorError
from swarmx.neural.checkpoint import middle_of
from swarmx.neural.head import Head, HeadSpec
from swarmx.neural.net import QuantileNet
from swarmx.neural.table import Table

_PARTS = ("hidden", "hidden_bias", "out", "skip", "out_bias")
_FAR = 6.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FitSettings:
    """How a head is trained. `nets` networks with seeds from `seed` on are averaged.

    `tail_weight` is the weight of the levels from 0.9 on, against 1 for the others. `emphasis` weighs a row by
    exp(anchor) to this power, relative to the median row: 0 counts relative errors, 1 absolute ones.
    """

    nets: int = 3
    hidden: int = 64
    epochs: int = 60
    patience: int = 8
    batch: int = 512
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    dropout: float = 0.1
    noise: float = 0.05
    tail_weight: float = 1.0
    emphasis: float = 0.5
    seed: int = 0


class TorchQuantileNet(nn.Module):
    """The same function as `neural.net.QuantileNet`, with gradients and dropout."""

    def __init__(self, features: int, hidden: int, levels: tuple[float, ...], dropout: float) -> None:
        super().__init__()
        k = len(levels)
        self.middle = middle_of(levels)
        self.hidden = nn.Parameter(torch.randn(features, hidden) * math.sqrt(1.0 / features))
        self.hidden_bias = nn.Parameter(torch.zeros(hidden))
        self.out = nn.Parameter(torch.randn(hidden, k) * math.sqrt(0.1 / hidden))
        self.skip = nn.Parameter(torch.zeros(features, k))
        bias = torch.full((k,), -1.5)
        bias[self.middle] = 0.0
        self.out_bias = nn.Parameter(bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.dropout(torch.relu(x @ self.hidden + self.hidden_bias))
        z = inner @ self.out + x @ self.skip + self.out_bias
        steps = (z + torch.sqrt(z * z + 4.0)) / 2.0
        centre = z[:, self.middle : self.middle + 1]
        above = centre + torch.cumsum(steps[:, self.middle + 1 :], 1)
        below = centre - torch.cumsum(steps[:, : self.middle].flip(1), 1).flip(1)
        return torch.cat([below, centre, above], 1)

    def numpy(self) -> QuantileNet:
        """The trained network for inference without torch."""
        parts = {part: getattr(self, part).detach().numpy().astype(np.float32).copy() for part in _PARTS}
        return QuantileNet(middle=self.middle, **parts)


def fit(
    table: Table,
    spec: HeadSpec,
    settings: FitSettings,
    *,
    resume: Path | None = None,
    progress: Callable[[int, int, float], None] = lambda net, epoch, loss: None,
) -> Head:
    """Train on the train rows, stop by the validation rows; the test rows are not looked at.

    With `resume`, every epoch is kept in that folder and a training that was broken off goes on where it was; the
    result is the same as without the break. `progress` is told (network, epoch, validation loss).

    Raises PredictorError when there is too little to learn from, or `resume` belongs to another training.
    """
    train, validation = table.part("train"), table.part("validation")
    if len(train) < 32 or len(validation) < 8:
        raise PredictorError(
            f"the head {spec.name} needs at least 32 rows to train and 8 to validate on, got {len(train)} and "
            f"{len(validation)}; give it more data."
        )
    known = np.where(np.isfinite(train.features), train.features, np.nan)
    with np.errstate(invalid="ignore"):
        mean = np.nan_to_num(np.nanmean(np.where(np.isnan(known).all(0), 0.0, known), axis=0))
        scale = np.nan_to_num(np.nanstd(np.where(np.isnan(known).all(0), 0.0, known), axis=0))
    scale = np.where(scale < 1e-6, 1.0, scale)
    mean32, scale32 = mean.astype(np.float32), scale.astype(np.float32)
    nets = tuple(
        _fit_one(i, _Data.of(train, mean32, scale32, spec, settings), validation, mean32, scale32, spec, settings,
                 resume, progress)
        for i in range(settings.nets)
    )  # fmt: skip
    return Head(spec=spec, mean=mean32, scale=scale32, nets=nets, limit=_FAR)


@dataclass(frozen=True, slots=True)
class _Data:
    x: torch.Tensor
    target: torch.Tensor
    censored: torch.Tensor
    weight: torch.Tensor

    @classmethod
    def of(cls, table: Table, mean: Any, scale: Any, spec: HeadSpec, settings: FitSettings) -> _Data:
        x = np.clip(np.nan_to_num((table.features - mean) / scale, nan=0.0, posinf=_FAR, neginf=-_FAR), -_FAR, _FAR)
        size = np.exp(table.anchor - np.median(table.anchor))
        weight = table.weight * np.clip(size, 0.05, 20.0) ** settings.emphasis
        return cls(
            torch.from_numpy(x.astype(np.float32)),
            torch.from_numpy((np.log(table.target + spec.softening) - table.anchor).astype(np.float32)),
            torch.from_numpy(table.censored.copy()),
            torch.from_numpy((weight / weight.mean()).astype(np.float32)),
        )


def _loss(q: torch.Tensor, data: _Data, rows: torch.Tensor, tau: torch.Tensor, level_weight: torch.Tensor) -> Any:
    """Weighted pinball; where the truth is only known to be above the target, a higher forecast costs nothing."""
    error = data.target[rows, None] - q
    above, below = tau * error, (tau - 1.0) * error
    loss = torch.where(error > 0, above, torch.where(data.censored[rows, None], torch.zeros_like(below), below))
    return (loss * level_weight).mean(1) @ data.weight[rows] / len(rows)


def _fit_one(
    index: int,
    data: _Data,
    validation: Table,
    mean: Any,
    scale: Any,
    spec: HeadSpec,
    settings: FitSettings,
    resume: Path | None,
    progress: Callable[[int, int, float], None],
) -> QuantileNet:
    generator = torch.Generator().manual_seed(settings.seed * 1000 + index)
    torch.manual_seed(settings.seed * 1000 + index)
    net = TorchQuantileNet(len(spec.features), settings.hidden, spec.levels, settings.dropout)
    optimiser = torch.optim.AdamW(net.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    tau = torch.tensor(spec.levels)
    level_weight = torch.where(tau >= 0.9, settings.tail_weight, 1.0)
    checked = _Data.of(validation, mean, scale, spec, settings)
    every = torch.arange(len(validation))
    state = _Progress.begin(resume, index, spec, settings, net, optimiser, generator)
    for epoch in range(state.epoch, settings.epochs):
        if state.stale >= settings.patience:
            break
        share = epoch / max(1, settings.epochs - 1)
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * (0.02 + 0.98 * (1.0 + math.cos(math.pi * share)) / 2.0)
        net.train()
        order = torch.randperm(len(data.target), generator=generator)
        for rows in torch.split(order, settings.batch):
            x = data.x[rows]
            x = x + settings.noise * torch.randn(x.shape, generator=generator)
            loss = _loss(net(x), data, rows, tau, level_weight)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        net.eval()
        with torch.no_grad():
            score = float(_loss(net(checked.x), checked, every, tau, level_weight))
        state.after(epoch, score, net)
        state.keep(net, optimiser, generator)
        progress(index, epoch, score)
    net.load_state_dict(state.best)
    return net.numpy()


class _Progress:
    """Where the training of one network is; kept in a file after every epoch when there is a folder for it."""

    def __init__(self, path: Path | None, key: str, net: nn.Module) -> None:
        self.path, self.key = path, key
        self.epoch, self.stale, self.score = 0, 0, math.inf
        self.best = {name: value.clone() for name, value in net.state_dict().items()}

    @classmethod
    def begin(
        cls,
        folder: Path | None,
        index: int,
        spec: HeadSpec,
        settings: FitSettings,
        net: nn.Module,
        optimiser: torch.optim.Optimizer,
        generator: torch.Generator,
    ) -> _Progress:
        key = f"{spec.key}/{index}/{msgspec.json.encode(asdict(settings)).decode()}"
        state = cls(folder / f"{spec.name}-net{index}" if folder else None, key, net)
        if state.path is not None and state.path.with_suffix(".json").exists():
            state._read(net, optimiser, generator)
        return state

    def after(self, epoch: int, score: float, net: nn.Module) -> None:
        self.epoch = epoch + 1
        if score < self.score - 1e-6:
            self.score, self.stale = score, 0
            self.best = {name: value.clone() for name, value in net.state_dict().items()}
        else:
            self.stale += 1

    def keep(self, net: nn.Module, optimiser: torch.optim.Optimizer, generator: torch.Generator) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"best.{name}": value for name, value in self.best.items()}
        tensors |= {f"net.{name}": value.clone() for name, value in net.state_dict().items()}
        for i, parameter in enumerate(optimiser.state.values()):
            tensors |= {f"adam.{i}.{name}": torch.as_tensor(value).clone() for name, value in parameter.items()}
        tensors["generator"] = generator.get_state()
        tensors["dropout"] = torch.get_rng_state()
        numbers = {"key": self.key, "epoch": self.epoch, "stale": self.stale, "score": self.score}
        draft = self.path.with_suffix(f".{self.epoch % 2}.safetensors")
        save_file(tensors, draft)
        note = self.path.with_suffix(".json.new")
        note.write_bytes(msgspec.json.encode({**numbers, "file": draft.name}))
        note.replace(self.path.with_suffix(".json"))

    def _read(self, net: nn.Module, optimiser: torch.optim.Optimizer, generator: torch.Generator) -> None:
        if self.path is None:
            return
        note = self.path.with_suffix(".json")
        try:
            numbers = msgspec.json.decode(note.read_bytes())
            if numbers["key"] != self.key:
                raise PredictorError(
                    f"{note} belongs to a training with other settings; continue that one, or give another folder."
                )
            tensors = load_file(self.path.parent / numbers["file"])
        except (OSError, KeyError, msgspec.MsgspecError) as error:
            raise PredictorError(f"the training in {note} cannot be continued: {error}; give another folder.") from None
        self.epoch, self.stale, self.score = numbers["epoch"], numbers["stale"], numbers["score"]
        self.best = {name[5:]: value for name, value in tensors.items() if name.startswith("best.")}
        net.load_state_dict({name[4:]: value for name, value in tensors.items() if name.startswith("net.")})
        for i, parameter in enumerate(optimiser.param_groups[0]["params"]):
            prefix = f"adam.{i}."
            optimiser.state[parameter] = {n[len(prefix) :]: v for n, v in tensors.items() if n.startswith(prefix)}
        generator.set_state(tensors["generator"])
        torch.set_rng_state(tensors["dropout"])
