"""The house forecaster: hashed encoder, memory, neural head, and what follows its outcomes; numpy only."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from swarmx.core.errors import PredictorError
from swarmx.core.forecast import Forecast, Source, point
from swarmx.core.nouns import Call
from swarmx.core.ports import Encoder
from swarmx.core.prompts import Encoding, PromptText
from swarmx.core.records import CallRecord
from swarmx.neural.checkpoint import load_head
from swarmx.neural.encoders.adapted import AdaptedEncoder, load_adapted
from swarmx.neural.encoders.hashed import HashedEncoder, load_hashed
from swarmx.neural.head import Floats, Head
from swarmx.neural.heads.length import SOFTENING, LengthMemory, length_spec, load_memory
from swarmx.neural.leader import FollowTheLeader
from swarmx.neural.net import Floats32

_FEWEST, _MOST = 0.0, 16.0  # e^16: nine million tokens
_REPLAYED = 128  # outcomes that a correction begins with after a swap


class Correction(Protocol):
    """What follows the errors of a head while it serves; `neural.tracking` has it."""

    def correct(self, prompt_class: str, device: str, log_q: Floats) -> Floats: ...
    def observe(self, prompt_class: str, device: str, log_q: Floats, log_y: float) -> None: ...
    def reset(self) -> None: ...


class _Outcome(NamedTuple):
    features: Floats32
    anchor: float
    group: str
    prompt_class: str
    log_y: float


class NeuralForecaster:
    """Implements `core.ports.Forecaster`: the length of answers, as eight quantiles.

    The encoder reads the prompt once; memory adds what this model and role did before, as recently as the last call;
    the head turns both into quantiles, `correction` shifts them by its own recent errors, `leader` takes what calls of
    the same model and role came to where that did better of late, and the call's limit caps them. A model that was
    never seen is forecast like the average one, and the source is "prior". Images are known from the request.
    """

    name = "neural"

    def __init__(
        self,
        encoder: HashedEncoder,
        memory: LengthMemory,
        head: Head,
        correction: Correction | None = None,
        leader: FollowTheLeader | None = None,
    ) -> None:
        self.encoder = encoder
        self.memory = memory
        self.head = head
        self.correction = correction
        self.leader = leader
        self._latest: deque[_Outcome] = deque(maxlen=_REPLAYED)

    @classmethod
    def load(
        cls, weights: Path | None = None, correction: Correction | None = None, leader: FollowTheLeader | None = None
    ) -> NeuralForecaster:
        """From a folder that `swarmx train` wrote, or with the weights that ship. Raises PredictorError."""
        folder = shipped_weights() if weights is None else weights
        encoder = load_hashed(folder)
        return cls(encoder, *_reading(folder, encoder, encoder.version), correction, leader)

    @classmethod
    def load_second(
        cls, weights: Path, slow: Encoder, correction: Correction | None = None, leader: FollowTheLeader | None = None
    ) -> tuple[AdaptedEncoder, NeuralForecaster]:
        """From a folder that `swarmx train length --encoder` wrote for the slow encoder: the one that reads prompts
        off the loop, and who forecasts from what it has read. Raises PredictorError."""
        adapted = load_adapted(weights, slow)
        layout = replace(adapted.hashed, version=adapted.version)
        return adapted, cls(layout, *_reading(weights, layout, adapted.version), correction, leader)

    @property
    def version(self) -> str:
        return self.head.version

    def swap(self, head: Head) -> Head:
        """Put another head of the same spec in force; returns the one until now.

        The correction starts anew with what the other head would have said of the latest outcomes.
        """
        previous, self.head = self.head, head
        if self.correction is not None:
            self.correction.reset()
            for seen in self._latest:
                log_q = head.log_quantiles_of(seen.features, seen.anchor, seen.group)
                self.correction.observe(seen.prompt_class, "", log_q, seen.log_y)
        if self.leader is not None:
            self.leader.forget_losses()
        return previous

    def encode(self, call: Call, prompt: PromptText) -> Encoding:
        """The vector of the prompt, [dimension]."""
        if call.kind != "llm":
            return Encoding(encoder="", vector=np.zeros(0, dtype=np.float32))
        return Encoding(encoder=self.encoder.version, vector=self.encoder.encode_one(prompt))

    def forecast(self, call: Call, encoding: Encoding) -> Forecast:
        """Shape [8]: quantiles of the output tokens at `core.forecast.LEVELS`."""
        if call.kind == "image":
            return point(call.work_limit, unit="work")
        role = role_of(call)
        quantiles = self.served(f"{call.model}|{role}", self.log_quantiles(call.model, role, encoding))
        source: Source = "neural" if self.memory.seen(call.model, role)[0] else "prior"
        return Forecast(
            levels=self.head.spec.levels,
            quantiles=tuple(np.minimum(quantiles, call.work_limit).tolist()),
            unit="tokens",
            source=source,
            version=self.head.version,
        )

    def log_quantiles(self, model: str, role: str, encoding: Encoding) -> Floats:
        """[8] quantiles of log(tokens + 1), before correction and limit."""
        return self.head.log_quantiles_of(*self._features(model, role, encoding))

    def _features(self, model: str, role: str, encoding: Encoding) -> tuple[Floats32, float, str]:
        features, anchor = self.memory.features(self.encoder, encoding.vector, model, role)
        return features, anchor, f"kind{self.encoder.kind_of(encoding.vector)}"

    def observe(self, call: Call, encoding: Encoding, work_done: float) -> None:
        """Learn from what the call came to; what cannot be an amount of work teaches nothing.

        An answer that was cut off at its limit counts as what was to be expected of those that get that far.
        """
        if call.kind == "image" or not (0.0 <= work_done < np.inf) or encoding.encoder != self.encoder.version:
            return
        role = role_of(call)
        features, anchor, group = self._features(call.model, role, encoding)
        log_q = self.head.log_quantiles_of(features, anchor, group)
        log_y = math.log(work_done + SOFTENING)
        prompt_class = f"{call.model}|{role}"
        corrected = self._corrected(prompt_class, log_q)
        if work_done >= call.work_limit:
            log_y = max(log_y, _median_beyond(log_y, corrected, self.head.spec.levels))
        if self.leader is not None:
            self.leader.observe(prompt_class, self._tokens(corrected), math.exp(log_y) - SOFTENING)
        if self.correction is not None:
            self.correction.observe(prompt_class, "", log_q, log_y)
            self._latest.append(_Outcome(features, anchor, group, prompt_class, log_y))
        self.memory.learn(self.encoder, encoding.vector, call.model, role, math.exp(log_y) - SOFTENING)

    def served(self, prompt_class: str, log_q: Floats) -> Floats:
        """[8] quantiles of the tokens from those of the head's logarithm: corrected, or those of the past instead."""
        quantiles = self._tokens(self._corrected(prompt_class, log_q))
        return quantiles if self.leader is None else self.leader.choose(prompt_class, quantiles)

    def _corrected(self, prompt_class: str, log_q: Floats) -> Floats:
        return log_q if self.correction is None else self.correction.correct(prompt_class, "", log_q)

    @staticmethod
    def _tokens(log_q: Floats) -> Floats:
        quantiles: Floats = np.exp(np.minimum(np.maximum(log_q, _FEWEST), _MOST))
        quantiles -= SOFTENING
        return quantiles


def _median_beyond(value: float, quantiles: Floats, levels: Sequence[float]) -> float:
    """The median of what is above `value`, by quantiles [K]; the highest quantile where nothing is."""
    below = float(np.interp(value, quantiles, levels, left=0.0, right=1.0))
    return float(np.interp((1.0 + below) / 2.0, levels, quantiles))


def _reading(folder: Path, encoder: HashedEncoder, version: str) -> tuple[LengthMemory, Head]:
    """The memory and head in a folder. Raises PredictorError when their cards name another encoder than this one."""
    memory, memory_card = load_memory(folder, encoder.experts)
    head, head_card = load_head(folder, length_spec(encoder.themes, encoder.experts))
    for card in (memory_card, head_card):
        trained_on = card.settings.get("encoder", version)
        if trained_on != version:
            raise PredictorError(
                f"{card.version} in {folder} was trained on what {trained_on} reads, and the encoder there is "
                f"{version}; take all files of one training."
            )
    return memory, head


def role_of(call: Call | CallRecord) -> str:
    """What the call is for: roles of different kinds of workflows share nothing but their name."""
    return f"{call.workflow_kind}/{call.role}"


def shipped_weights() -> Path:
    """The folder of the weights that come with SwarmX."""
    return Path(str(files("swarmx.neural").joinpath("weights")))
