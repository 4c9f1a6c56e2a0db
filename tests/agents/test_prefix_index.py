"""Which replica probably caches how much of a prompt."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from swarmx.agents.prefix_index import PrefixIndex
from swarmx.core.prefixes import BOUNDARIES

TOKENS = 64.0


def test_a_replica_holds_what_was_sent_to_it_and_no_more() -> None:
    index = PrefixIndex()
    index.dispatched(1, (10, 11, 12), "s", 1e6)
    assert index.cached((10, 11, 12, 13), 3).tolist() == [0.0, 3 * TOKENS, 0.0]
    assert index.cached((10, 11, 99), 3).tolist() == [0.0, 2 * TOKENS, 0.0]
    assert index.cached((99, 11), 3).tolist() == [0.0, 0.0, 0.0]
    assert index.home("s") == 1
    assert index.home("t") is None


def test_the_prompt_that_was_used_longest_ago_is_forgotten_first_and_from_its_end() -> None:
    index = PrefixIndex()
    index.dispatched(0, (1, 2, 3), "", 4 * TOKENS)
    index.dispatched(0, (7, 8), "", 4 * TOKENS)
    assert index.cached((1, 2, 3), 1).tolist() == [2 * TOKENS]
    assert index.cached((7, 8), 1).tolist() == [2 * TOKENS]


def test_a_replica_that_is_gone_holds_nothing_and_is_nobodys_home() -> None:
    index = PrefixIndex()
    index.dispatched(0, (1, 2), "s", 1e6)
    index.dispatched(1, (1,), "t", 1e6)
    index.forget(0)
    assert index.cached((1, 2), 2).tolist() == [0.0, TOKENS]
    assert index.home("s") is None
    assert index.home("t") == 1


chains = st.lists(st.integers(0, 3), min_size=1, max_size=80)


@given(sent=st.lists(st.tuples(st.integers(0, 69), chains), max_size=12), asked=chains)
def test_the_index_says_the_same_as_comparing_with_every_prompt(
    sent: list[tuple[int, list[int]]], asked: list[int]
) -> None:
    def names(path: list[int]) -> tuple[int, ...]:
        return tuple(hash(tuple(path[: i + 1])) for i in range(len(path)))

    index, expected = PrefixIndex(), [0.0] * 70
    for slot, path in sent:
        index.dispatched(slot, names(path), "", 1e9)
        same = 0
        while same < min(len(path), len(asked)) and path[same] == asked[same]:
            same += 1
        expected[slot] = max(expected[slot], BOUNDARIES[same - 1] * TOKENS if same else 0.0)
    assert index.cached(names(asked), 70).tolist() == expected
