"""Names of prompt blocks: equal where, and only where, the whole beginning is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from eval.workloads.plan import BLOCK_TOKENS
from eval.workloads.text import BlockNames, Piece, first_tokens, key_of, tokens_of

_pieces = st.lists(st.builds(Piece, st.integers(0, 3), st.integers(0, 200)), max_size=5)


def _spelled(pieces: list[Piece]) -> list[tuple[int, int]]:
    """The same text token by token: each token is its place in its piece's text."""
    return [(key, place) for key, tokens in pieces for place in range(tokens)]


@given(_pieces, _pieces)
def test_two_texts_share_a_block_name_only_where_they_are_equal_up_to_its_end(
    one: list[Piece], other: list[Piece]
) -> None:
    names = BlockNames()
    for i, (a, b) in enumerate(zip(names.of(one), names.of(other), strict=False)):
        end = (i + 1) * BLOCK_TOKENS
        assert a != b or _spelled(one)[:end] == _spelled(other)[:end]


@given(_pieces, st.lists(st.builds(Piece, st.integers(4, 6), st.integers(1, 200)), max_size=3))
def test_a_text_keeps_the_names_of_its_beginning_whatever_follows(start: list[Piece], more: list[Piece]) -> None:
    names = BlockNames()
    before = names.of(start)
    assert names.of([*start, *more])[: len(before)] == before


@given(_pieces)
def test_only_full_blocks_have_names_and_each_its_own(pieces: list[Piece]) -> None:
    found = BlockNames().of(pieces)
    assert len(found) == tokens_of(pieces) // BLOCK_TOKENS
    assert len(set(found)) == len(found)


@given(_pieces, st.integers(0, 500))
def test_the_first_tokens_of_a_text_have_the_names_of_its_first_blocks(pieces: list[Piece], tokens: int) -> None:
    names = BlockNames()
    cut = first_tokens(pieces, tokens)
    assert tokens_of(cut) == min(tokens, tokens_of(pieces))
    assert names.of(cut) == names.of(pieces)[: tokens_of(cut) // BLOCK_TOKENS]


def test_different_names_are_different_texts() -> None:
    assert key_of("a", 1) != key_of("a", 2) != key_of("a1")
