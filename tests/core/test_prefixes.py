"""Names of the beginnings of prompts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from swarmx.core.prefixes import BLOCK_BYTES, BOUNDARIES, names_of, names_of_blocks

TEXTS = st.lists(st.binary(max_size=3000), max_size=6)


@given(texts=TEXTS)
def test_a_prompt_has_the_same_names_however_it_is_cut_into_texts(texts: list[bytes]) -> None:
    assert names_of(texts) == names_of([b"".join(texts)])


@given(shared=st.binary(max_size=5000), one=st.binary(max_size=2000), other=st.binary(max_size=2000))
def test_prompts_share_the_names_of_what_they_share_and_no_more(shared: bytes, one: bytes, other: bytes) -> None:
    first, second = names_of([shared, one]), names_of([shared, other])
    common = 0
    while common < min(len(shared + one), len(shared + other)) and (shared + one)[common] == (shared + other)[common]:
        common += 1
    same = sum(a == b for a, b in zip(first, second, strict=False))
    assert same == sum(blocks * BLOCK_BYTES <= common for blocks in BOUNDARIES)
    assert first[:same] == second[:same]


def test_a_long_prompt_has_few_names_that_reach_close_to_its_end() -> None:
    names = names_of([b"x" * 1_000_000])
    assert len(names) < 160
    assert BOUNDARIES[len(names) - 1] * BLOCK_BYTES > 1_000_000 * (1 - 1 / 16)


def test_names_are_63_bits_so_that_a_journal_can_hold_them() -> None:
    assert all(0 <= name < 2**63 for name in names_of([b"y" * 10_000]))


def test_blocks_with_names_of_their_own_keep_them_at_the_boundaries() -> None:
    blocks = tuple(range(1000, 1100))
    assert names_of_blocks(blocks) == tuple(blocks[count - 1] for count in BOUNDARIES if count <= 100)
