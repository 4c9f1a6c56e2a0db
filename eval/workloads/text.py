"""Prompts as pieces of text: which calls share a beginning, without the text itself."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from typing import NamedTuple

from eval.workloads.plan import BLOCK_TOKENS


class Piece(NamedTuple):
    """`tokens` tokens of the text called `key`, from its beginning: pieces of one key have one beginning."""

    key: int
    tokens: int

    def first(self, tokens: int) -> Piece:
        """At most so many tokens of it."""
        return self if tokens >= self.tokens else Piece(self.key, tokens)


def key_of(*names: str | int) -> int:
    """A number that stands for a text with these names."""
    return int.from_bytes(sha256("|".join(map(str, names)).encode()).digest()[:8])


def tokens_of(pieces: Iterable[Piece]) -> int:
    """Of all the pieces together."""
    return sum(piece.tokens for piece in pieces)


def first_tokens(pieces: Iterable[Piece], tokens: int) -> list[Piece]:
    """The beginning of a text, at most `tokens` long."""
    kept: list[Piece] = []
    for piece in pieces:
        if tokens <= 0:
            break
        kept.append(piece.first(tokens))
        tokens -= piece.tokens
    return kept


class BlockNames:
    """Names blocks of `BLOCK_TOKENS` tokens so that equal names mean equal text from the very beginning to their end.

    Names count from 0 in the order in which the blocks were first named.
    """

    def __init__(self) -> None:
        self._names: dict[int, int] = {}

    def of(self, pieces: Iterable[Piece]) -> tuple[int, ...]:
        """The names of the full blocks of these pieces, one after the other."""
        before, at = 0, 0
        ends: list[int] = []
        for key, tokens in pieces:
            if tokens <= 0:
                continue
            # All that stands before, and the key, as 64 bits; adding the place leaves chance collisions only.
            mixed = _mixed(before, key)
            ends += range(mixed + BLOCK_TOKENS - at % BLOCK_TOKENS, mixed + tokens + 1, BLOCK_TOKENS)
            before, at = _mixed(mixed, tokens), at + tokens
        names = self._names
        return tuple([names.setdefault(end, len(names)) for end in ends])


_MASK = (1 << 64) - 1


def _mixed(one: int, other: int) -> int:
    """splitmix64 of both (Steele, Lea and Flood, OOPSLA 2014)."""
    z = (one * 0x9E3779B97F4A7C15 + other + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
