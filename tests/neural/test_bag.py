"""A prompt as a bag of hashed words and word pairs."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.core.prompts import HEAD_BYTES, TAIL_BYTES, PromptText, cut
from swarmx.neural.encoders.bag import COUNTS, bag_of

BITS = 24  # so wide that words of a short text hardly ever share a place


def ids(text: str) -> set[int]:
    return set(bag_of(cut(text.encode()), BITS).ids.tolist())


def words_of(text: str) -> list[str]:
    """The same words, by a regular expression."""
    found = re.findall(r"[A-Za-z\x80-\xff]+|[0-9]+|[^\x00-\x20\x7fA-Za-z0-9\x80-\xff]", text.encode().decode("latin-1"))
    return ["0" * len(word) if word.isdigit() and word.isascii() else word.lower() for word in found]


@given(st.text(alphabet="ab cX7 9.,\n(=", max_size=60))
def test_equal_words_have_equal_hashes_and_different_words_different_ones(text: str) -> None:
    words = words_of(text)
    distinct = len(set(words)) + len(set(itertools.pairwise(words)))
    assert len(bag_of(cut(text.encode()), BITS).ids) == distinct


def test_a_word_is_the_same_wherever_it_stands_and_however_it_is_written() -> None:
    one = ids("alpha")
    assert one <= ids("some words before alpha and after")
    assert one <= ids("ALPHA!")
    assert one.isdisjoint(ids("alphabet"))


def test_numbers_count_by_their_length_alone() -> None:
    assert ids("17") == ids("42") != ids("423")


def test_pairs_tell_the_order_of_words() -> None:
    assert ids("the cat sees the dog") != ids("the dog sees the cat")


def test_a_word_that_occurs_more_often_weighs_more_but_not_in_proportion() -> None:
    bag = bag_of(cut(b"yes " * 8), BITS)
    assert sorted(bag.weights.tolist()) == pytest.approx([1.0 + np.log(7), 1.0 + np.log(8)])


def test_counts_say_what_their_names_say() -> None:
    text = "Is it?\nA = f(x, 12) + [3]. Žluť"
    counts = dict(zip(COUNTS, bag_of(cut(text.encode(), messages=2, tools=3), BITS).counts.tolist(), strict=True))
    size = len(text.encode())
    assert counts["log_bytes"] == counts["log_kept"] == pytest.approx(np.log1p(size), rel=1e-6)
    assert counts["log_words"] == pytest.approx(np.log1p(len(words_of(text))), rel=1e-6)
    assert counts["log_lines"] == counts["log_questions"] == pytest.approx(np.log1p(1), rel=1e-6)
    assert counts["log_numbers"] == counts["log_brackets"] == pytest.approx(np.log1p(2), rel=1e-6)
    assert counts["log_messages"] == pytest.approx(np.log1p(2), rel=1e-6)
    assert counts["log_tools"] == pytest.approx(np.log1p(3), rel=1e-6)
    assert counts["digit_share"] == pytest.approx(3 / size, rel=1e-6)
    assert counts["upper_share"] == pytest.approx(2 / size, rel=1e-6)
    assert counts["foreign_share"] == pytest.approx(4 / size, rel=1e-6)


@given(st.binary(max_size=200))
def test_any_bytes_make_a_bag(text: bytes) -> None:
    bag = bag_of(PromptText(text=text, total_bytes=len(text)), 12)
    assert np.isfinite(bag.counts).all()
    assert (np.diff(bag.ids) > 0).all()
    assert ((bag.ids >= 0) & (bag.ids < 1 << 12)).all()
    assert (bag.weights >= 1.0).all()
    assert len(bag.ids) == len(bag.weights)


def test_a_long_prompt_is_read_at_both_ends_and_its_whole_size_is_known() -> None:
    text = b"first " + b"middle " * 400_000 + b"last"
    prompt = cut(text)
    assert len(prompt.text) == HEAD_BYTES + TAIL_BYTES
    bag = bag_of(prompt, BITS)
    assert ids("first") <= set(bag.ids.tolist())
    assert ids("last") <= set(bag.ids.tolist())
    assert bag.counts[COUNTS.index("log_bytes")] == pytest.approx(np.log1p(len(text)), rel=1e-6)
