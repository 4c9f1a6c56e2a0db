"""The KV cache of an engine in blocks: who holds how many, and which prompt prefixes are still there."""

from __future__ import annotations

from collections import deque

Prefix = tuple[int, ...]


class BlockPool:
    """Blocks are private to a sequence, shared by name, or idle: cached, held by nobody, the oldest evicted first.

    A name is a chained hash: `prefix[i]` names the first `i + 1` blocks, so it always stands behind `prefix[i - 1]`.
    Whoever holds a block holds all those before it, and an idle block is evicted before those before it. So what is
    held or cached of a prefix is its beginning, which bisection finds; and it is enough to count, for each block, the
    held ones right behind it and the chains that end with it: a beginning that many hold is not touched. The other
    blocks of a chain change hands together.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.idle = 0
        self._private = 0
        self._held = 0
        self._named: dict[int, int] = {}  # held: how often, above zero; idle: minus the release that made it so
        self._releases = 0
        self._released: deque[tuple[int, list[int]]] = deque()  # the blocks of each, some of them held or gone by now
        self._listed = 0  # blocks in there

    @property
    def used(self) -> int:
        """Blocks that someone holds."""
        return self._private + self._held

    @property
    def available(self) -> int:
        """Blocks that can be had: free ones and idle ones."""
        return self.capacity - self._private - self._held

    def hold(self, prefix: Prefix, most: int, blocks: int) -> int | None:
        """Hold `blocks` blocks, of which up to `most` are cached ones of the prefix: how many are; None without room.

        `blocks` is at least `most`.
        """
        held = self._leading_held(prefix, 0, most)
        cached = self._leading_cached(prefix, held, most)
        if blocks - held > self.available:
            return None
        if held:
            self._named[prefix[held - 1]] += 1
        self._named.update(dict.fromkeys(prefix[held:cached], 1))
        self._held += cached - held
        self.idle -= cached - held
        self.take(blocks - cached)
        return cached

    def take(self, fresh: int) -> None:
        """Hold `fresh` private blocks; idle ones make room."""
        self._private += fresh
        excess = self._private + self._held + self.idle - self.capacity
        if excess > 0:
            self._evict(min(excess, self.idle))

    def publish(self, prefix: Prefix, shared: int, full: int) -> bool:
        """Share private blocks: a chain of `shared` blocks goes on to `full`.

        False if another sequence was first and this one keeps its copies.
        """
        if prefix[shared] in self._named:
            return False
        self._named.update(dict.fromkeys(prefix[shared:full], 1))
        self._private -= full - shared
        self._held += full - shared
        return True

    def release(self, prefix: Prefix, shared: int, full: int, private: int) -> None:
        """Let go of the first `shared` blocks of the prefix and of `private` ones, that hold the rest up to `full`.

        All that is named stays cached.
        """
        named = self._named
        self._private -= private
        held = cached = alone = shared
        if shared < full and prefix[shared] in named:
            held = self._leading_held(prefix, shared, full)
            cached = self._leading_cached(prefix, held, full)
        while alone and named[prefix[alone - 1]] == 1:
            alone -= 1
        if alone:
            named[prefix[alone - 1]] -= 1
        self._held -= shared - alone
        self.idle += shared - alone + full - cached
        freed = prefix[alone if held == shared else held : full]
        if freed:
            self._releases += 1
            named.update(dict.fromkeys(freed, -self._releases))
            self._released.append((self._releases, list(freed)))
            self._listed += len(freed)
            if self._listed > 1024 + 2 * self.idle:
                self._forget_stale()

    def clear(self) -> None:
        """Forget the idle blocks."""
        self._evict(self.idle)

    def evictable(self) -> list[int]:
        """The idle blocks, the next one to be evicted first."""
        return [
            name for number, names in self._released for name in reversed(names) if self._named.get(name) == -number
        ]

    def _evict(self, blocks: int) -> None:
        named = self._named
        self.idle -= blocks
        while blocks:
            number, names = self._released[0]
            last = names[-blocks:]  # the end of a chain goes first, its beginning is worth more
            del names[-blocks:]
            self._listed -= len(last)
            for name in last:
                if named.get(name) == -number:
                    del named[name]
                    blocks -= 1
            if not names:
                self._released.popleft()

    def _forget_stale(self) -> None:
        kept = [(number, [n for n in names if self._named.get(n) == -number]) for number, names in self._released]
        self._released = deque((number, names) for number, names in kept if names)
        self._listed = self.idle

    def _leading_held(self, prefix: Prefix, least: int, most: int) -> int:
        """Where the held blocks of a prefix end, between `least` and `most`; none of them is behind another one."""
        named = self._named
        while least < most:
            middle = (least + most) // 2
            if named.get(prefix[middle], 0) > 0:
                least = middle + 1
            else:
                most = middle
        return least

    def _leading_cached(self, prefix: Prefix, least: int, most: int) -> int:
        """Where the blocks of a prefix that are here end, between `least` and `most`."""
        named = self._named
        while least < most:
            middle = (least + most) // 2
            if prefix[middle] in named:
                least = middle + 1
            else:
                most = middle
        return least
