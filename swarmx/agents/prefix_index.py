"""The router's memory of prompts: which replica of a model probably still caches how much of one."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from swarmx.core.fleet import Floats
from swarmx.core.prefixes import BLOCK_BYTES, BOUNDARIES

MOST_SESSIONS = 100_000
_TOKENS_PER_BLOCK = BLOCK_BYTES / 4.0


class PrefixIndex:
    """Names of prompt beginnings by replica slot, the least recently used ones forgotten as an engine would.

    Sets of slots are bit masks: bit s stands for slot s. Slots are numbers that a replica keeps for its whole life.
    """

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}
        self._held: dict[int, OrderedDict[int, float]] = {}  # by slot: name -> tokens between it and the one before
        self._tokens: dict[int, float] = {}
        self._homes: OrderedDict[str, int] = OrderedDict()

    def cached(self, prefix: tuple[int, ...], slots: int) -> Floats:
        """Tokens of the prompt that each slot holds, shape [slots]."""
        tokens = np.zeros(slots)
        mask, holders = 0, self._holders
        for i, name in enumerate(prefix):
            held = holders.get(name, 0)
            if i:
                held &= mask
            if gone := mask & ~held:
                tokens[_slots_of(gone, slots)] = BOUNDARIES[i - 1] * _TOKENS_PER_BLOCK
            mask = held
            if not mask:
                return tokens
        if mask:
            tokens[_slots_of(mask, slots)] = BOUNDARIES[len(prefix) - 1] * _TOKENS_PER_BLOCK
        return tokens

    def home(self, session: str) -> int | None:
        """The slot that served the session last."""
        return self._homes.get(session) if session else None

    def dispatched(self, slot: int, prefix: tuple[int, ...], session: str, capacity_tokens: float) -> None:
        """The prompt goes to the slot, whose cache holds so many tokens."""
        if session:
            self._homes[session] = slot
            self._homes.move_to_end(session)
            if len(self._homes) > MOST_SESSIONS:
                self._homes.popitem(last=False)
        if not prefix:
            return
        held = self._held.setdefault(slot, OrderedDict())
        bit, total, before = 1 << slot, self._tokens.get(slot, 0.0), 0
        for i, name in enumerate(prefix):
            if name not in held:
                share = (BOUNDARIES[i] - before) * _TOKENS_PER_BLOCK
                held[name] = share
                total += share
                self._holders[name] = self._holders.get(name, 0) | bit
            before = BOUNDARIES[i]
        for name in reversed(prefix):  # the beginning was used last: it is worth most
            held.move_to_end(name)
        while total > capacity_tokens and held:
            name, share = held.popitem(last=False)
            total -= share
            self._drop(name, bit)
        self._tokens[slot] = total

    def forget(self, slot: int) -> None:
        """The replica is gone, and its cache with it."""
        bit = 1 << slot
        for name in self._held.pop(slot, ()):
            self._drop(name, bit)
        self._tokens.pop(slot, None)
        for session in [session for session, home in self._homes.items() if home == slot]:
            del self._homes[session]

    def _drop(self, name: int, bit: int) -> None:
        left = self._holders[name] & ~bit
        if left:
            self._holders[name] = left
        else:
            del self._holders[name]


def _slots_of(mask: int, slots: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The positions of the bits that are set."""
    raw = np.frombuffer(mask.to_bytes((slots + 7) // 8, "little"), dtype=np.uint8)
    return np.flatnonzero(np.unpackbits(raw, count=slots, bitorder="little"))
