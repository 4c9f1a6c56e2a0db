"""Why a length forecast is what it is: which words and which knowledge moved it, and which prompts were like it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from swarmx.core.errors import PredictorError
from swarmx.core.prompts import PromptText
from swarmx.core.records import CallRecord
from swarmx.neural.checkpoint import middle_of
from swarmx.neural.encoders.bag import COUNTS, bag_of
from swarmx.neural.encoders.hashed import HashedEncoder
from swarmx.neural.forecaster import NeuralForecaster
from swarmx.neural.head import Floats
from swarmx.neural.net import Floats32
from swarmx.neural.replayed import vector_of

GROUPS = ("kind of text", "words", "size and marks", "role", "model", "recent outcomes", "limit")
_KIND, _WORDS, _COUNTS, _ROLE, _MODEL, _OUTCOMES, _LIMIT = range(len(GROUPS))
_ALL = (1 << len(GROUPS)) - 1
_NOBODY = "\x00"  # a model and role that no memory has seen; an empty role is none
_MOST_WORDS = 200
_MOST_CHARACTERS = 40
_PIECE = re.compile(rb"[A-Za-z\x80-\xff]+|[0-9]+|[^A-Za-z0-9\x80-\xff\x00-\x20\x7f]")  # as `encoders.bag` cuts


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """What one kind of knowledge adds to the logarithm of the median (of tokens + 1)."""

    name: str
    log: float

    @property
    def factor(self) -> float:
        return math.exp(self.log)


@dataclass(frozen=True, slots=True, kw_only=True)
class WordMove:
    """What a word, or a pair of words, adds to the logarithm of the median: how far it falls without it.

    `words` are all those of the prompt that share its place in the encoder's table, mostly one; numbers count by
    their length. `times` is how often they occur.
    """

    words: tuple[str, ...]
    times: int
    log: float

    @property
    def factor(self) -> float:
        return math.exp(self.log)


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """A forecast taken apart.

    `quantiles` [K] in tokens, at `levels`, after the limit. `base` is the median, in tokens, for a prompt, model, role
    and limit of which nothing is known: log(base + 1) and the `moves` add up to log(median + 1). `words` are single
    occlusions, the largest first; they overlap and do not add up. `untried` n-grams weigh less than those that were
    tried. `kind` is the kind of text that the encoder sees, with its share.
    """

    levels: tuple[float, ...]
    quantiles: tuple[float, ...]
    base: float
    median: float
    moves: tuple[Move, ...]
    words: tuple[WordMove, ...]
    untried: int
    kind: int
    kind_share: float
    model_seen: int
    role_seen: int
    head: str
    encoder: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour:
    """A finished call whose prompt was like this one; `similarity` is a cosine, 1 for the same prompt."""

    call_id: str
    model: str
    role: str
    tokens: float
    similarity: float


def explain_prompt(
    forecaster: NeuralForecaster, prompt: PromptText, *, model: str, role: str, limit: float = math.inf
) -> Explanation:
    """Take the forecast for a prompt apart, words included. `limit` is in tokens.

    A word's move is exact: the prompt is encoded again without its place in the bag. Its length and counts stay, and
    pairs that it is part of are places of their own. Words are judged before the limit caps the forecast.
    Raises PredictorError for a limit that is not positive.
    """
    encoder = forecaster.encoder
    bag = bag_of(prompt, encoder.bits)
    found = explain_vector(forecaster, encoder.of_bag(bag), model=model, role=role, limit=limit)
    named = ngrams_of(prompt.text, encoder.bits)
    weight = np.abs(encoder.idf.take(bag.ids) * bag.weights)
    weight *= np.linalg.norm(encoder.table.take(bag.ids, axis=0), axis=1)
    heavy = np.argsort(-weight, kind="stable")[: np.count_nonzero(weight)]
    known = _Question(forecaster, encoder.of_bag(bag), model, role, limit)
    whole = known.log_median()
    moves: list[WordMove] = []
    for place in heavy[:_MOST_WORDS].tolist():
        keep = np.arange(len(bag.ids)) != place
        vector = encoder.of_bag(replace(bag, ids=bag.ids[keep], weights=bag.weights[keep]))
        without = _Question(forecaster, vector, model, role, limit).log_median()
        words, times = named[int(bag.ids[place])]
        moves.append(WordMove(words=words, times=times, log=whole - without))
    moves.sort(key=lambda move: -abs(move.log))
    return replace(found, words=tuple(moves), untried=len(heavy) - len(moves))


def explain_vector(
    forecaster: NeuralForecaster, vector: Floats32, *, model: str, role: str, limit: float = math.inf
) -> Explanation:
    """Take the forecast for the vector of a prompt apart, by what is known of it.

    The moves are Shapley values (1953; Lundberg and Lee, NeurIPS 2017), exact over the 2^7 sets of `GROUPS`: what a
    kind of knowledge adds on average over all orders of getting to know. Raises PredictorError for a limit that is not
    positive.
    """
    if not limit > 0.0:
        raise PredictorError(f"the limit is {limit}, a positive number of tokens was expected; leave it out for none.")
    question = _Question(forecaster, vector, model, role, limit)
    values = [question.value(known) for known in range(1 << len(GROUPS))]
    moves = tuple(Move(name=name, log=log) for name, log in zip(GROUPS, _shapley(values), strict=True))
    encoder, spec = forecaster.encoder, forecaster.head.spec
    quantiles = np.minimum(np.exp(np.maximum(question.log_quantiles(), 0.0)) - spec.softening, limit)
    model_seen, role_seen = forecaster.memory.seen(model, role)
    kind = encoder.kind_of(vector)
    return Explanation(
        levels=spec.levels,
        quantiles=tuple(quantiles.tolist()),
        base=math.exp(values[0]) - spec.softening,
        median=math.exp(values[-1]) - spec.softening,
        moves=moves,
        words=(),
        untried=0,
        kind=kind,
        kind_share=float(vector[encoder.themes + kind]),
        model_seen=model_seen,
        role_seen=role_seen,
        head=forecaster.head.version,
        encoder=encoder.version,
    )


def nearest(
    forecaster: NeuralForecaster, vector: Floats32, records: Sequence[CallRecord], count: int = 5
) -> list[Neighbour]:
    """The finished calls whose encodings are most like `vector`, nearest first; each prompt key once.

    Similar in what the head reads: every number of the vector in standard deviations of the training data.
    """
    known = [(record, v) for record in records if (v := vector_of(record, forecaster.encoder)) is not None]
    if not known:
        return []
    head, size = forecaster.head, forecaster.encoder.dimension
    rows = (np.stack([v for _, v in known]) - head.mean[:size]) / head.scale[:size]
    asked = (vector - head.mean[:size]) / head.scale[:size]
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(asked)
    similarity = np.divide(rows @ asked, lengths, out=np.zeros(len(rows)), where=lengths > 0.0)
    found: dict[tuple[str, str, str], Neighbour] = {}
    for place in np.argsort(-similarity, kind="stable").tolist():
        record = known[place][0]
        found.setdefault(
            (record.prompt_key, record.model, record.role),
            Neighbour(
                call_id=record.call_id,
                model=record.model,
                role=record.role,
                tokens=record.work_done,
                similarity=float(similarity[place]),
            ),
        )
        if len(found) == count:
            break
    return list(found.values())


def ngrams_of(text: bytes, bits: int) -> dict[int, tuple[tuple[str, ...], int]]:
    """The places of a text's bag of 2^`bits`, each with the words and pairs that fall there and how many they are."""
    pieces = _PIECE.findall(text)
    alone = {piece: int(_bag(piece, bits)[0]) for piece in set(pieces)}
    together: dict[tuple[bytes, bytes], int] = {}
    for first, second in set(pairwise(pieces)):
        three = Counter(_bag(first + b" " + second, bits))
        three.subtract((alone[first], alone[second]))
        together[first, second] = next(three.elements())
    found: dict[int, Counter[str]] = {}
    for piece in pieces:
        found.setdefault(alone[piece], Counter())[_shown(piece)] += 1
    for pair in pairwise(pieces):
        found.setdefault(together[pair], Counter())[f"{_shown(pair[0])} {_shown(pair[1])}"] += 1
    return {place: (tuple(words), words.total()) for place, words in found.items()}


def _bag(text: bytes, bits: int) -> list[int]:
    """The places of a text, each as often as it occurs."""
    bag = bag_of(PromptText(text=text, total_bytes=len(text)), bits)
    times = np.rint(np.exp(bag.weights - 1.0)).astype(np.int64)
    places: list[int] = np.repeat(bag.ids, times).tolist()
    return places


def _shown(piece: bytes) -> str:
    """A word as it may be printed anywhere: no control character survives, and what the bag folds is folded."""
    if piece[:1].isdigit():
        return f"<{len(piece)} digits>" if len(piece) > 1 else "<1 digit>"
    text = piece.decode(errors="replace").lower()
    text = "".join(character if character.isprintable() else "�" for character in text)
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 1] + "…"


@dataclass(frozen=True, slots=True)
class _Question:
    """A forecast that can be asked for with only some of `GROUPS` known (a set of bits)."""

    forecaster: NeuralForecaster
    vector: Floats32
    model: str
    role: str
    limit: float

    def log_quantiles(self, known: int = _ALL) -> Floats:
        """[K] quantiles of log(tokens + 1), before the limit caps them."""
        forecaster = self.forecaster
        encoder, head = forecaster.encoder, forecaster.head
        vector = self._vector(known)
        features, anchor = forecaster.memory.features(
            encoder,
            vector,
            self.model if _has(known, _MODEL) else _NOBODY,
            self.role if self.role and _has(known, _ROLE) else _NOBODY,
        )
        group = f"kind{encoder.kind_of(vector)}"
        if not _has(known, _KIND):  # then it is not known either what the model does with such a text
            place = {name: i for i, name in enumerate(head.spec.features)}
            offset = float(features[place["model_kind_offset"]])
            anchor -= offset
            features[place["anchor"]] -= offset
            features[[place["model_kind_offset"], place["log_model_kind_seen"]]] = 0.0
            features[[place["log_model_kind_spread"], place["model_kind_cube"]]] = np.nan
            group = ""
        q: Floats = head.log_quantiles(features[None, :], np.array([anchor]), group)[0]
        if _has(known, _OUTCOMES):
            q = np.log(forecaster.served(f"{self.model}|{self.role}", q) + head.spec.softening)
        return q

    def log_median(self) -> float:
        """With all that is known, before the limit caps it."""
        return float(self.log_quantiles()[middle_of(self.forecaster.head.spec.levels)])

    def value(self, known: int) -> float:
        """log(median + 1), capped where the limit is known."""
        q = max(0.0, float(self.log_quantiles(known)[middle_of(self.forecaster.head.spec.levels)]))
        return min(q, math.log(self.limit + self.forecaster.head.spec.softening)) if _has(known, _LIMIT) else q

    def _vector(self, known: int) -> Floats32:
        """The vector with what is not known at its mean: gate and themes of the training data, counts, no effect."""
        if all(_has(known, part) for part in (_KIND, _WORDS, _COUNTS)):
            return self.vector
        encoder, mean = self.forecaster.encoder, self.forecaster.head.mean
        themes, experts = encoder.themes, encoder.experts
        vector = self.vector.copy()
        gate = vector[themes : themes + experts].copy()
        counts = vector[themes + experts + 1 :].copy()
        words = float(vector[themes + experts]) - _effect(encoder, gate, counts)
        if not _has(known, _KIND):
            gate = _shares(mean[themes : themes + experts])
            vector[:themes], vector[themes : themes + experts] = mean[:themes], gate
        if not _has(known, _COUNTS):
            counts = np.zeros(len(COUNTS), dtype=np.float32)
        vector[themes + experts] = _effect(encoder, gate, counts) + (words if _has(known, _WORDS) else 0.0)
        vector[themes + experts + 1 :] = counts
        return vector


def _shares(gate: Floats32) -> Floats32:
    """The gate as shares that add up to one, whatever a head has as its mean."""
    shares: Floats32 = np.maximum(gate, 1e-6)
    shares /= shares.sum()
    return shares


def _effect(encoder: HashedEncoder, gate: Floats32, counts: Floats32) -> float:
    """What counts, and nothing, say of the effect of a prompt; words say the rest (see `HashedEncoder`)."""
    effects = counts @ encoder.dense + encoder.dense_bias
    return float((effects[0] + gate @ effects[1:]) * (gate @ encoder.spread))


def _shapley(values: Sequence[float]) -> list[float]:
    """The Shapley value of each of n players, from the value of each set of them [2^n], a set as bits."""
    n = len(values).bit_length() - 1
    order = [math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n) for size in range(n)]
    return [
        sum(
            order[known.bit_count()] * (values[known | 1 << player] - values[known])
            for known in range(len(values))
            if not _has(known, player)
        )
        for player in range(n)
    ]


def _has(known: int, part: int) -> bool:
    return bool(known >> part & 1)
