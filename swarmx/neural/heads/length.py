"""The length head: how many tokens a call will bring, from its prompt's vector and what its model did before."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from swarmx.core.errors import PredictorError
from swarmx.neural.checkpoint import Card, load_arrays, save_arrays
from swarmx.neural.encoders.bag import COUNTS
from swarmx.neural.head import HeadSpec
from swarmx.neural.net import Floats32

SOFTENING = 1.0
MEMORY = "length_memory"
_SHIPPED = 30.0

_STATE = (
    "role_offset",
    "model_offset",
    "model_kind_offset",
    "model_role_offset",
    "log_role_seen",
    "log_model_seen",
    "log_model_kind_seen",
    "log_model_role_seen",
    "log_model_spread",
    "log_model_kind_spread",
    "log_model_role_spread",
    "model_kind_cube",
    "model_role_cube",
    "slope",
    "slope_effect",
    "anchor",
    "log_params",
)
_SIZE = re.compile(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)b(?![a-z])")


def length_spec(themes: int, experts: int) -> HeadSpec:
    """The spec of a length head over a hashed encoder with so many themes and experts."""
    vector = [f"theme{i}" for i in range(themes)] + [f"gate{i}" for i in range(experts)]
    return HeadSpec(
        name="length",
        version=2,
        features=(*vector, "effect", *COUNTS, *_STATE),
        unit="tokens",
        softening=SOFTENING,
    )


@dataclass(slots=True)
class _Running:
    """Mean and mean square of a stream, in which an observation fades as `cap` others follow."""

    n: float = 0.0
    mean: float = 0.0
    square: float = 0.0
    cube: float = 0.0

    def add(self, value: float, cap: float) -> None:
        self.n = min(self.n + 1.0, cap)
        step = 1.0 / self.n
        self.mean += (value - self.mean) * step
        self.square += (value * value - self.square) * step
        self.cube += (value * value * value - self.cube) * step

    def shrunk(self, doubt: float) -> float:
        """The mean, drawn to zero as if `doubt` observations had been zero."""
        return self.mean * self.n / (self.n + doubt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Doubts:
    """How many observations it takes to believe an offset half, by level; `cap` is the memory's length."""

    role: float = 20.0
    model: float = 2.0
    model_kind: float = 4.0
    model_role: float = 8.0
    spread: float = 10.0
    slope: float = 3.0
    cap: float = 500.0


_Key = tuple[str, str, int]


class Reading(Protocol):
    """How the vectors of an encoder are laid out: themes first, then gates, then the effect."""

    @property
    def themes(self) -> int: ...
    @property
    def experts(self) -> int: ...


@dataclass(slots=True, kw_only=True)
class LengthMemory:
    """Log lengths so far, as a sum of offsets that shrink to nothing where little was seen (James and Stein, 1961):

        log(tokens + 1) ~ kind + effect + role + model + (model, kind) + (model, role)

    `kind` is the text's (soft, from the encoder), `effect` the encoder's word on the prompt, `role` the caller's
    name for what the call is for. Each offset is the running mean of what those before it leave over. A model or role
    never seen costs nothing, and one observation of it already counts. Holds `limit` keys, oldest out first.
    """

    kind_means: Floats32
    kind_spreads: Floats32
    doubts: Doubts = field(default_factory=Doubts)
    limit: int = 20_000
    _seen: OrderedDict[_Key, _Running] = field(default_factory=OrderedDict)

    def features(self, encoder: Reading, vector: Floats32, model: str, role: str) -> tuple[Floats32, float]:
        """The features [features of `length_spec`] and the anchor for one call.

        Its limit is none of them: training data knows few limits, and what it does to an answer is to cut it off.
        """
        d = self.doubts
        gate, effect, kind = _split(encoder, vector)
        by_role = self._get(("", role, -1)) if role else _NOTHING
        by_model = self._get((model, "", -1))
        by_kind = self._get((model, "", kind))
        by_both = self._get((model, role, -1)) if role else _NOTHING
        offsets = (
            by_role.shrunk(d.role),
            by_model.shrunk(d.model),
            by_kind.shrunk(d.model_kind),
            by_both.shrunk(d.model_role),
        )
        usual = float(gate @ self.kind_means)
        spread = math.log(float(gate @ self.kind_spreads))
        on_effect = self._get((model, "", -2))
        slope = on_effect.mean * on_effect.n / (on_effect.square * on_effect.n + d.slope)
        anchor = usual + effect + sum(offsets)
        state = (
            *offsets,
            math.log1p(by_role.n),
            math.log1p(by_model.n),
            math.log1p(by_kind.n),
            math.log1p(by_both.n),
            _log_spread(by_model, spread, d.spread),
            _log_spread(by_kind, spread, d.spread),
            _log_spread(by_both, spread, d.spread),
            math.cbrt(by_kind.cube * by_kind.n / (by_kind.n + d.spread)),
            math.cbrt(by_both.cube * by_both.n / (by_both.n + d.spread)),
            slope,
            slope * effect,
            anchor,
            log_params(model),
        )
        features = np.empty(len(vector) + len(state), dtype=np.float32)
        features[: len(vector)] = vector
        features[len(vector) :] = state
        return features, anchor

    def learn(self, encoder: Reading, vector: Floats32, model: str, role: str, tokens: float) -> None:
        """A call of this model and role came to so many tokens; of a role "" nothing is kept."""
        d = self.doubts
        gate, effect, kind = _split(encoder, vector)
        rest = math.log(tokens + SOFTENING) - float(gate @ self.kind_means) - effect
        levels = [(("", role, -1), d.role)] if role else []
        levels += [((model, "", -1), d.model), ((model, "", kind), d.model_kind)]
        levels += [((model, role, -1), d.model_role)] if role else []
        for key, doubt in levels:
            running = self._keep(key)
            known = running.shrunk(doubt)
            running.add(rest, d.cap)
            rest -= known
        # The model's answer to the effect itself: mean of rest * effect over mean of effect².
        on_effect = self._keep((model, "", -2))
        on_effect.n = min(on_effect.n + 1.0, d.cap)
        on_effect.mean += (rest * effect - on_effect.mean) / on_effect.n
        on_effect.square += (effect * effect - on_effect.square) / on_effect.n

    def forget_model(self, model: str) -> None:
        """As if no call of the model had ever been seen."""
        for key in [key for key in self._seen if key[0] == model]:
            del self._seen[key]

    def as_shipped(self) -> LengthMemory:
        """What another place can use: models, and no roles, which are names of the place where they were seen.

        A model counts as seen `_SHIPPED` times at most, so that what comes next soon has the say.
        """
        left = self.copy()
        for key in [key for key in left._seen if not key[0] or key[1]]:
            del left._seen[key]
        for running in left._seen.values():
            running.n = min(running.n, _SHIPPED)
        return left

    def copy(self) -> LengthMemory:
        """An independent one with the same content."""
        twin = LengthMemory(
            kind_means=self.kind_means, kind_spreads=self.kind_spreads, doubts=self.doubts, limit=self.limit
        )
        for key, running in self._seen.items():
            twin._seen[key] = _Running(running.n, running.mean, running.square, running.cube)
        return twin

    def seen(self, model: str, role: str) -> tuple[int, int]:
        """How many calls of the model, and of the role, the memory counts on."""
        return int(self._get((model, "", -1)).n), int(self._get(("", role, -1)).n) if role else 0

    def save(self, folder: Path, card: Mapping[str, Any]) -> Card:
        """Write what `as_shipped` leaves."""
        kept = list(self.as_shipped()._seen.items())
        numbers = np.array([(r.n, r.mean, r.square, r.cube) for _, r in kept]).reshape(len(kept), 4)
        arrays = {"kind_means": self.kind_means, "kind_spreads": self.kind_spreads, "running": numbers}
        keys = [[model, place] for (model, _, place), _ in kept]
        return save_arrays(folder, MEMORY, arrays, {"extra": {"keys": keys}, **card})

    def _get(self, key: _Key) -> _Running:
        return self._seen.get(key) or _NOTHING

    def _keep(self, key: _Key) -> _Running:
        running = self._seen.get(key)
        if running is None:
            running = self._seen[key] = _Running()
            if len(self._seen) > self.limit:
                self._seen.popitem(last=False)
        else:
            self._seen.move_to_end(key)
        return running


_NOTHING = _Running()


def load_memory(folder: Path, experts: int) -> tuple[LengthMemory, Card]:
    """The memory in a folder, for an encoder with so many experts, and its card. Raises PredictorError."""
    arrays, card = load_arrays(folder, MEMORY)
    try:
        memory = LengthMemory(
            kind_means=arrays["kind_means"].astype(np.float32), kind_spreads=arrays["kind_spreads"].astype(np.float32)
        )
        if memory.kind_means.shape != (experts,) or memory.kind_spreads.shape != (experts,):
            raise ValueError(f"kinds {memory.kind_means.shape}, expected {experts}")
        for (model, place), (n, mean, square, cube) in zip(card.extra["keys"], arrays["running"].tolist(), strict=True):
            memory._seen[str(model), "", int(place)] = _Running(n, mean, square, cube)
    except (KeyError, TypeError, ValueError) as error:
        raise PredictorError(
            f"the memory {card.version} in {folder} cannot be read: {error}; train it again."
        ) from None
    return memory, card


@lru_cache(maxsize=4096)
def log_params(model: str) -> float:
    """The logarithm of a model's size in billions of parameters where its name tells ("…-7B-…"), else NaN."""
    sizes = _SIZE.findall(model.lower())
    return math.log(max(float(size) for size in sizes)) if sizes and float(sizes[0]) > 0.0 else math.nan


def _split(encoder: Reading, vector: Floats32) -> tuple[Floats32, float, int]:
    gate = vector[encoder.themes : encoder.themes + encoder.experts]
    return gate, float(vector[encoder.themes + encoder.experts]), int(gate.argmax())


def _log_spread(running: _Running, prior: float, doubt: float) -> float:
    """The logarithm of a standard deviation, which starts at `prior` (a logarithm) and moves with what is seen."""
    n = running.n
    variance = (n * running.square + doubt * math.exp(2.0 * prior)) / (n + doubt)
    return 0.5 * math.log(max(variance, 1e-6))
