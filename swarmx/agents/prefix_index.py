"""The router's memory of prompts: which replica of a model probably still caches how much of one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container
from itertools import pairwise

import numpy as np

from swarmx.core.fleet import Floats
from swarmx.core.prefixes import BLOCK_BYTES, BOUNDARIES

MOST_SESSIONS = 100_000
TOKENS = tuple(count * (BLOCK_BYTES / 4.0) for count in BOUNDARIES)
"""In the beginning with each name."""
_SHARES = tuple(end - start for start, end in pairwise((0.0, *TOKENS)))

_FEW = 12


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
        """Tokens of the prompt that each slot holds, shape [slots].

        Who holds a name holds those before it, so the masks only lose bits along the prefix, and bisection finds where.
        """
        tokens = np.zeros(slots)
        holders, last = self._holders, len(prefix) - 1
        i, mask = 0, holders.get(prefix[0], 0) if prefix else 0
        end = holders.get(prefix[last], 0) if mask else 0
        while mask != end:
            least, most = i, last  # the mask of `least` is still this one, that of `most` is not
            while most - least > 1:
                middle = (least + most) // 2
                if holders.get(prefix[middle], 0) == mask:
                    least = middle
                else:
                    most = middle
            i, held = most, holders.get(prefix[most], 0)
            _fill(tokens, mask & ~held, TOKENS[least])
            mask = held
        if mask:
            _fill(tokens, mask, TOKENS[last])
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
        bit, total, holders = 1 << slot, self._tokens.get(slot, 0.0), self._holders
        known = _held_of(prefix, held)
        if known < len(prefix):
            total += TOKENS[len(prefix) - 1] - (TOKENS[known - 1] if known else 0.0)
            others = _held_of(prefix, holders)
            for name in prefix[known:others]:
                holders[name] |= bit
            holders.update(dict.fromkeys(prefix[others:], bit))
            shares = _SHARES[known : len(prefix)]
            held.update(zip(reversed(prefix[known:]), reversed(shares), strict=True))
        move_to_end = held.move_to_end
        for name in reversed(prefix[:known]):  # the beginning was used last: it is worth most
            move_to_end(name)
        while total > capacity_tokens and held:
            name, share = held.popitem(last=False)
            total -= share
            if holders[name] == bit:
                del holders[name]
            else:
                holders[name] ^= bit
        self._tokens[slot] = total

    def forget(self, slot: int) -> None:
        """The replica is gone, and its cache with it."""
        bit = 1 << slot
        for name in self._held.pop(slot, ()):
            self._holders[name] ^= bit
            if not self._holders[name]:
                del self._holders[name]
        self._tokens.pop(slot, None)
        for session in [session for session, home in self._homes.items() if home == slot]:
            del self._homes[session]


def _held_of(prefix: tuple[int, ...], held: Container[int]) -> int:
    """How many names of the prefix are held; they come first."""
    least, most = 0, len(prefix)
    while least < most:
        middle = (least + most) // 2
        if prefix[middle] in held:
            least = middle + 1
        else:
            most = middle
    return least


def _fill(tokens: Floats, mask: int, value: float) -> None:
    """Set the slots of the mask to the value."""
    if mask.bit_count() > _FEW:
        raw = np.frombuffer(mask.to_bytes((len(tokens) + 7) // 8, "little"), dtype=np.uint8)
        tokens[np.flatnonzero(np.unpackbits(raw, count=len(tokens), bitorder="little"))] = value
        return
    while mask:
        low = mask & -mask
        tokens[low.bit_length() - 1] = value
        mask ^= low
