"""What a call would really answer. Only the emulator knows; nothing of it leaves before the answer itself does."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b, shake_128
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, Literal

import msgspec

from swarmx.core.errors import ConfigError
from swarmx.core.prompt_key import prompt_key
from swarmx.providers.emulated.schema import Schema, minimal, satisfies

BYTES_PER_TOKEN = 4.5

_LABEL = "[emulated]"
_WORDS = (
    " the", " of", " and", " a", " to", " in", " is", " it", " for", " on", " as", " with", " by", " that", " step",
    " plan", " test", " value", " call", " data", " code", " list", " note", " read", " then", " item", " part",
    " each", " result", " check", " short", " state", " input", " file", " line", " name", " answer", " field",
)  # fmt: skip


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """One recorded answer of a real model."""

    key: str
    model: str
    prompt_tokens: int
    output_tokens: int
    finish_reason: str
    reply: Any
    role: str = ""
    difficulty: Any = None
    system_key: str | None = None


class SizeClass(msgspec.Struct, frozen=True, kw_only=True):
    """How one model size lengthens one answer of the reference model (docs/reference/calibration.md)."""

    offset: float
    predictive_slope: float
    predictive_residual_sd: float


class LengthFactors(msgspec.Struct, frozen=True, kw_only=True):
    """The fitted size classes; `reference` names the recorded one, `run_noise_sd` is how two runs of a model differ."""

    classes: dict[str, SizeClass]
    run_noise_sd: float
    reference: str = "small"


UNSTRETCHED = LengthFactors(classes={}, run_noise_sd=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """The parts of a request that decide about its answer. `schema` is None where free text is wanted."""

    system: str
    user: str
    text: str
    max_tokens: int
    schema: Schema | None = None
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A whole answer: token `i` is `pieces[i]`, of the arguments where it calls a `tool`, else of the text."""

    pieces: Sequence[str]
    finish_reason: Literal["stop", "length", "tool_calls"]
    tool: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """Looks answers up in recordings: the same prompt always gets the same answer under the same model and seed.

    The row is that of the prompt's key; else one of the same instructions, else any, picked by hash. Where two
    recordings share a key the first one counts. Raises ConfigError without any recording.
    """

    rows: Sequence[Recorded]
    model: str
    size_class: str = "small"
    factors: LengthFactors = UNSTRETCHED
    seed: int = 0
    _by_key: dict[str, Recorded] = field(init=False, default_factory=dict)
    _pivots: dict[str, float] = field(init=False, default_factory=dict)
    _by_system: dict[str, list[Recorded]] = field(init=False, default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        if not self.rows:
            raise ConfigError(
                "there are no recorded answers, expected JSON lines in a recording: run eval.record_lengths"
            )
        known = {self.factors.reference, *self.factors.classes}
        if self.size_class not in known and self.factors is not UNSTRETCHED:
            raise ConfigError(f"size class {self.size_class!r} is unknown, expected one of {', '.join(sorted(known))}")
        for row in self.rows:
            if self._by_key.setdefault(row.key, row) is row and row.system_key is not None:
                self._by_system[row.system_key].append(row)

        logs: dict[str, list[float]] = defaultdict(list)
        for row in self.rows:
            logs[row.role].append(math.log(max(1, row.output_tokens)))
        self._pivots.update({role: sum(values) / len(values) for role, values in logs.items()})

    def answer(self, prompt: Prompt) -> Answer:
        """The answer to the prompt, never longer than `max_tokens`."""
        key = prompt_key(prompt.system, prompt.user)
        row, related = self._row(key, prompt.system)
        if prompt.ignore_eos:
            return Answer(pieces=self._filler(prompt.max_tokens, prompt), finish_reason="length")
        if prompt.schema is not None or (related and row.reply is not None):
            pieces = _structured(row, prompt.schema)
        else:
            pieces = self._filler(min(self._length(row, prompt), prompt.max_tokens + 1), prompt)
        if len(pieces) > prompt.max_tokens:
            return Answer(pieces=pieces[: prompt.max_tokens], finish_reason="length")
        return Answer(pieces=pieces, finish_reason="stop")

    def _row(self, key: str, system: str) -> tuple[Recorded, bool]:
        """The row to answer from, and whether it belongs to the same instructions."""
        exact = self._by_key.get(key)
        if exact is not None:
            return exact, True
        rows = self._by_system.get(prompt_key(system, ""))
        pool = rows or self.rows
        return pool[_hash(key, self.seed) % len(pool)], rows is not None

    def _length(self, row: Recorded, prompt: Prompt) -> int:
        """log L = pivot + offset + slope (log base - pivot) + noise; the pivot is the mean log length of the role.

        The part of the noise that is the prompt's stays the same in every run, the part that is the run's hangs on the
        seed; together they have the fitted residual.
        """
        base, run_sd = math.log(max(1, row.output_tokens)), self.factors.run_noise_sd
        log_length = base + run_sd * _normal(_hash(prompt.text, self.model, self.seed))
        stretch = self.factors.classes.get(self.size_class)
        if stretch is not None and self.size_class != self.factors.reference:
            pivot = self._pivots[row.role]
            prompt_sd = math.sqrt(max(0.0, stretch.predictive_residual_sd**2 - run_sd**2))
            log_length += pivot + stretch.offset + stretch.predictive_slope * (base - pivot) - base
            log_length += prompt_sd * _normal(_hash(prompt.text, self.model))
        return max(1, round(math.exp(min(20.0, log_length))))

    def _filler(self, tokens: int, prompt: Prompt) -> list[str]:
        draws = shake_128(str(_hash(prompt.text, self.model, self.seed)).encode()).digest(tokens)
        return [_LABEL, *(_WORDS[draw % len(_WORDS)] for draw in draws[1:])]


def prompt_tokens(text: str) -> int:
    """How many tokens the emulator takes a prompt to have."""
    return max(1, math.ceil(len(text.encode()) / BYTES_PER_TOKEN))


def prefix_hashes(text: str, block_tokens: int) -> tuple[int, ...]:
    """Chained hashes of the full blocks of a prompt: equal where the texts are equal from their beginning on."""
    data, size = text.encode(), int(block_tokens * BYTES_PER_TOKEN)
    chain, hashes = b"", []
    for start in range(0, len(data) - size + 1, size):
        chain = blake2b(chain + data[start : start + size], digest_size=8).digest()
        hashes.append(int.from_bytes(chain))
    return tuple(hashes)


def recorded(folder: Traversable | None = None) -> list[Recorded]:
    """All recordings of a folder (those that ship with SwarmX by default), file by file in order of name."""
    folder = files("swarmx.providers.emulated").joinpath("recorded") if folder is None else folder
    names = sorted((f for f in folder.iterdir() if f.name.endswith(".jsonl")), key=lambda f: f.name)
    return [row for file in names for row in _rows(file)]


def length_factors() -> LengthFactors:
    """The fitted size classes that ship with SwarmX."""
    file = files("swarmx.core").joinpath("data/length_factors.json")
    return msgspec.json.decode(file.read_bytes(), type=LengthFactors) if file.is_file() else UNSTRETCHED


def _rows(file: Traversable) -> Iterable[Recorded]:
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            yield msgspec.json.decode(line, type=Recorded)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{file}:{number} is not a recorded answer: {error}") from error


def _structured(row: Recorded, schema: Schema | None) -> list[str]:
    """The recorded reply in as many pieces as it had tokens, or the smallest instance where it breaks the schema."""
    if row.reply is not None and (schema is None or satisfies(row.reply, schema)):
        text = msgspec.json.encode(row.reply).decode()
        tokens = max(1, row.output_tokens)
    else:
        text = msgspec.json.encode(minimal(schema or {"type": "object"})).decode()
        tokens = prompt_tokens(text)
    return [text[i * len(text) // tokens : (i + 1) * len(text) // tokens] for i in range(tokens)]


def _hash(*parts: str | int) -> int:
    return int.from_bytes(blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest())


def _normal(digest: int) -> float:
    """A standard normal number from 64 random bits (Box-Muller)."""
    u, v = (digest >> 32) + 1, digest & 0xFFFFFFFF
    return math.sqrt(-2.0 * math.log(u / 2**32)) * math.cos(2.0 * math.pi * v / 2**32)
