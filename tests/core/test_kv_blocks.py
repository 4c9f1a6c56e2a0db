"""The pool of KV blocks: what is held, what is cached, and what goes first."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from swarmx.core.kv_blocks import BlockPool
from tests.core.slow_engine import SlowPool


def test_a_prefix_that_someone_holds_needs_no_room() -> None:
    pool = BlockPool(4)
    assert pool.hold((1, 2, 3), 0, 3) == 0
    assert pool.publish((1, 2, 3), 0, 3)
    assert pool.hold((1, 2, 3, 4), 4, 5) is None
    assert pool.hold((1, 2, 3, 4), 4, 4) == 3
    assert (pool.used, pool.available, pool.idle) == (4, 0, 0)


def test_what_is_let_go_stays_cached_until_its_room_is_needed_its_end_first() -> None:
    pool = BlockPool(4)
    pool.hold((1, 2, 3), 0, 4)
    pool.publish((1, 2, 3), 0, 3)
    pool.release((1, 2, 3), 3, 3, 1)
    assert (pool.used, pool.idle, pool.evictable()) == (0, 3, [3, 2, 1])
    pool.take(2)
    assert pool.evictable() == [2, 1]
    assert pool.hold((1, 2, 3), 3, 3) is None
    assert pool.hold((1, 2), 2, 2) == 2


def test_the_blocks_of_an_answer_are_cached_when_it_is_let_go() -> None:
    pool = BlockPool(8)
    pool.hold((1, 2, 3, 4), 0, 2)
    pool.publish((1, 2, 3, 4), 0, 2)
    pool.take(3)
    pool.release((1, 2, 3, 4), 2, 4, 3)
    assert (pool.used, pool.evictable()) == (0, [4, 3, 2, 1])


def test_a_copy_of_what_another_holds_is_freed_and_what_stands_behind_it_is_cached() -> None:
    pool = BlockPool(8)
    pool.hold((1, 2, 3), 0, 3)
    pool.hold((1, 2), 0, 2)
    assert pool.publish((1, 2), 0, 2)
    assert not pool.publish((1, 2, 3), 0, 3)
    pool.release((1, 2, 3), 0, 3, 3)
    assert (pool.used, pool.evictable()) == (2, [3])
    pool.release((1, 2), 2, 2, 0)
    assert (pool.used, pool.evictable()) == (0, [3, 2, 1])


def test_holding_and_letting_go_again_and_again_keeps_the_list_of_releases_short() -> None:
    pool = BlockPool(4096)
    prefix = tuple(range(512))
    pool.hold(prefix, 0, 512)
    pool.publish(prefix, 0, 512)
    for _ in range(100):
        pool.release(prefix, 512, 512, 0)
        assert pool.hold(prefix, 512, 512) == 512
    assert pool._listed <= 1024 + 2 * 512


class Pools(RuleBasedStateMachine):
    """The pool against one that counts the holders of every block, for prefixes that branch out of each other."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.slow = BlockPool(24), SlowPool(24)
        self.held: list[tuple[tuple[int, ...], int, int]] = []  # prefix, shared, all blocks
        self.slow_shared: list[list[int]] = []

    @rule(branch=st.integers(0, 3), cut=st.integers(0, 6), length=st.integers(0, 9), more=st.integers(0, 3))
    def hold(self, branch: int, cut: int, length: int, more: int) -> None:
        prefix = (*range(min(cut, length)), *(1000 * (branch + 1) + 10 * cut + i for i in range(length - cut)))
        hits = self.slow.hits(prefix)
        fresh = len(prefix) + more - len(hits)
        fits = fresh + sum(block in self.slow.cached for block in hits) <= self.slow.available
        assert self.pool.hold(prefix, len(prefix), len(prefix) + more) == (len(hits) if fits else None)
        if not fits:
            return
        for block in hits:
            self.slow.share(block)
        for _ in range(fresh):
            self.slow.take()
        self.held.append((prefix, len(hits), len(prefix) + more))
        self.slow_shared.append(hits)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        i = data.draw(st.integers(0, len(self.held) - 1))
        prefix, shared, blocks = self.held[i]
        if shared == len(prefix):
            return
        full = data.draw(st.integers(shared + 1, len(prefix)))
        there = prefix[shared] in self.slow.holders or prefix[shared] in self.slow.cached
        assert self.pool.publish(prefix, shared, full) is not there
        if there:
            return
        for block in prefix[shared:full]:
            self.slow.private -= 1
            self.slow.share(block)
            self.slow_shared[i].append(block)
        self.held[i] = (prefix, full, blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        i = data.draw(st.integers(0, len(self.held) - 1))
        prefix, shared, blocks = self.held.pop(i)
        full = data.draw(st.integers(shared, len(prefix)))
        self.pool.release(prefix, shared, full, blocks - shared)
        self.slow.release(self.slow_shared.pop(i), prefix[shared:full], blocks - shared)

    @rule()
    def clear(self) -> None:
        self.pool.clear()
        self.slow.cached.clear()

    @invariant()
    def both_say_the_same(self) -> None:
        assert (self.pool.used, self.pool.available) == (self.slow.used, self.slow.available)
        assert self.pool.evictable() == self.slow.cached
        assert self.pool.idle == len(self.slow.cached)
        counted = Counter(block for chain in self.slow_shared for block in chain)
        assert {block for block, n in self.pool._named.items() if n > 0} == set(counted)


TestPools = Pools.TestCase
TestPools.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
