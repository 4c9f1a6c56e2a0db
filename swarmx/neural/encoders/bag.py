"""A prompt as a bag of hashed words and word pairs, and a few counts; numpy only, in tens of microseconds."""

from __future__ import annotations

from dataclasses import dataclass
from math import log1p

import numpy as np
from numpy.typing import NDArray

from swarmx.core.prompts import HEAD_BYTES, TAIL_BYTES, PromptText
from swarmx.neural.net import Floats32

Words = NDArray[np.uint32]

COUNTS = (
    "log_bytes",
    "log_kept",
    "log_words",
    "log_lines",
    "log_numbers",
    "log_distinct",
    "log_messages",
    "log_tools",
    "digit_share",
    "upper_share",
    "mark_share",
    "foreign_share",
    "log_questions",
    "log_equals",
    "log_brackets",
    "log_stops",
)

_MOST = HEAD_BYTES + TAIL_BYTES
_SPACE, _LETTER, _DIGIT, _MARK = 0, 1, 2, 3


def _classes() -> NDArray[np.uint8]:
    table = np.full(256, _MARK, dtype=np.uint8)
    for byte in range(256):
        character = chr(byte)
        if byte >= 128 or character.isalpha():
            table[byte] = _LETTER  # bytes of other scripts make words, too
        elif character.isdigit():
            table[byte] = _DIGIT
        elif byte <= 32 or byte == 127:
            table[byte] = _SPACE
    return table


def _folded() -> Words:
    table = np.arange(1, 257, dtype=np.uint32)
    for byte in range(256):
        if byte < 128 and chr(byte).isdigit():
            table[byte] = ord("0")  # numbers count by their length
        elif byte < 128:
            table[byte] = ord(chr(byte).lower())
    return table


def _counted() -> NDArray[np.float64]:
    """[256, 9]: what a byte adds to lines, digits, upper case, marks, foreign, questions, equals, brackets, stops."""
    table = np.zeros((256, 9))
    classes = _classes()
    for byte in range(256):
        character = chr(byte)
        table[byte] = (
            character == "\n",
            classes[byte] == _DIGIT,
            byte < 128 and character.isupper(),
            classes[byte] == _MARK,
            byte >= 128,
            character == "?",
            character == "=",
            character in "([{",
            character == ".",
        )
    return table


_CLASS, _FOLD, _COUNTED = _classes(), _folded(), _counted()
_FACTOR = 0x9E3779B1  # odd, so it has an inverse modulo 2^32
_MIX = np.uint32(0x85EBCA6B)
_PAIR = np.uint32(0xC2B2AE35)
_NONE: Words = np.zeros(0, dtype=np.uint32)
_WEIGHT = np.concatenate(([0.0], 1.0 + np.log(np.arange(1, _MOST + 1)))).astype(np.float32)


def _powers(factor: int) -> Words:
    powers = np.full(_MOST + 1, factor, dtype=np.uint32)
    powers[0] = 1
    return np.multiply.accumulate(powers)


_POWER = _powers(_FACTOR)
_INVERSE = _powers(pow(_FACTOR, -1, 2**32)) * _MIX  # mixed at once: the upper bits of a product know all of the word


@dataclass(frozen=True, slots=True)
class Bag:
    """`ids` [n] are distinct and rise, `weights` [n] are 1 + log(occurrences), `counts` [len(COUNTS)]."""

    ids: NDArray[np.int32]
    weights: Floats32
    counts: Floats32


def bag_of(prompt: PromptText, bits: int) -> Bag:
    """The bag of a prompt, hashed into 2^`bits` places.

    A word is a run of letters (folded to lower case), a run of digits (counted by length), or one other character.
    The hash of a word is that of Karp and Rabin (1987): with prefix sums of byte * factor^position modulo 2^32, all
    words come out of a handful of array operations. Any bytes will do, also none.
    """
    raw = np.frombuffer(prompt.text, dtype=np.uint8, count=min(len(prompt.text), _MOST))
    n = len(raw)
    histogram = (np.bincount(raw, minlength=256) @ _COUNTED).tolist()
    words, numbers = _words(raw) if n else (_NONE, 0)
    found = len(words)
    hashes = np.empty(max(0, 2 * found - 1), dtype=np.uint32)
    if found:
        hashes[:found] = words
        pairs = hashes[found:]
        np.multiply(words[:-1], _PAIR, out=pairs)
        pairs += words[1:]
    hashes >>= np.uint32(32 - bits)
    hashes.sort()
    ids, times = _runs(hashes.view(np.int32))
    lines, digits, upper, marks, foreign, questions, equals, brackets, stops = histogram
    share = 1.0 / max(n, 1)
    counts = np.array(
        (
            log1p(max(prompt.total_bytes, n)),
            log1p(n),
            log1p(found),
            log1p(lines),
            log1p(numbers),
            log1p(len(ids)),
            log1p(prompt.messages),
            log1p(prompt.tools),
            digits * share,
            upper * share,
            marks * share,
            foreign * share,
            log1p(questions),
            log1p(equals),
            log1p(brackets),
            log1p(stops),
        ),
        dtype=np.float32,
    )
    return Bag(ids, times, counts)


def _words(raw: NDArray[np.uint8]) -> tuple[Words, int]:
    """The hashes of the words of a text that is not empty, and how many of them are numbers."""
    n = len(raw)
    kind = _CLASS.take(raw)
    begins = np.empty(n + 1, dtype=np.bool_)
    begins[0] = begins[n] = True
    np.not_equal(kind[1:], kind[:-1], out=begins[1:n])
    begins[:n] |= kind == _MARK
    edges = begins.nonzero()[0]
    prefix = np.empty(n + 1, dtype=np.uint32)
    prefix[0] = 0
    folded = _FOLD.take(raw)
    folded *= _POWER[:n]
    np.add.accumulate(folded, out=prefix[1:])
    at = prefix.take(edges)
    first = edges[:-1]
    words = at[1:] - at[:-1]
    words *= _INVERSE.take(first)
    kinds = kind.take(first)
    return words[kinds != _SPACE], int(np.count_nonzero(kinds == _DIGIT))


def _runs(ordered: NDArray[np.int32]) -> tuple[NDArray[np.int32], Floats32]:
    """The distinct values of a sorted array, and 1 + log of how often each occurs."""
    n = len(ordered)
    if n == 0:
        return ordered, np.zeros(0, dtype=np.float32)
    first = np.empty(n + 1, dtype=np.bool_)
    first[0] = first[n] = True
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:n])
    starts = first.nonzero()[0]
    times = starts[1:] - starts[:-1]
    return ordered.take(starts[:-1]), _WEIGHT.take(times, mode="clip")
