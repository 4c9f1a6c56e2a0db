"""The KV cache of an engine in blocks: who holds how many, and which prompt prefixes are still there."""

from __future__ import annotations

from collections.abc import Sequence


class BlockPool:
    """Blocks are private to a sequence, shared by hash, or idle: cached, held by nobody, the oldest evicted first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._private = 0
        self._holders: dict[int, int] = {}
        self._idle: dict[int, None] = {}

    @property
    def used(self) -> int:
        """Blocks that someone holds."""
        return self._private + len(self._holders)

    @property
    def available(self) -> int:
        """Blocks that can be had: free ones and idle ones."""
        return self.capacity - self.used

    def cached(self, prefix: Sequence[int]) -> int:
        """How many leading blocks are there."""
        for i, block in enumerate(prefix):
            if block not in self._holders and block not in self._idle:
                return i
        return len(prefix)

    def fits(self, hits: Sequence[int], fresh: int) -> bool:
        """Whether one can hold the cached `hits` and `fresh` blocks more."""
        return fresh + sum(block in self._idle for block in hits) <= self.available

    def share(self, hits: Sequence[int]) -> None:
        """Hold these cached blocks."""
        for block in hits:
            self._idle.pop(block, None)
            self._holders[block] = self._holders.get(block, 0) + 1

    def take(self, fresh: int) -> None:
        """Hold `fresh` private blocks; idle ones make room."""
        self._private += fresh
        while self._idle and self.used + len(self._idle) > self.capacity:
            del self._idle[next(iter(self._idle))]

    def publish(self, block: int) -> bool:
        """Turn a private block into a shared one; false if another sequence was first and this one keeps its copy."""
        if block in self._holders or block in self._idle:
            return False
        self._private -= 1
        self._holders[block] = 1
        return True

    def clear(self) -> None:
        """Forget the idle blocks."""
        self._idle.clear()

    def release(self, shared: Sequence[int], private: int) -> None:
        """Let go of blocks; the shared ones stay cached."""
        self._private -= private
        for block in reversed(shared):  # the end of a chain goes first, its beginning is worth more
            self._holders[block] -= 1
            if not self._holders[block]:
                del self._holders[block]
                self._idle[block] = None
