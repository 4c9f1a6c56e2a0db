"""Only unit vectors and plain facts get into a vector memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmx.core.errors import StoreError
from swarmx.memory.facts import MAX_FACTS, checked_count, checked_facts, unit_vector

slowly = settings(deadline=None)  # a busy machine is no failure
ALLOWED = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._:/@+-"
words = st.text(ALLOWED, min_size=1, max_size=64)
facts = st.dictionaries(
    words,
    st.floats(allow_nan=False, allow_infinity=False)
    | st.integers(-(2**53), 2**53)
    | st.booleans()
    | st.text(ALLOWED, max_size=128),
    max_size=MAX_FACTS,
)


@slowly
@given(facts)
def test_numbers_and_short_words_are_facts(given_facts: dict[str, Any]) -> None:
    assert checked_facts(given_facts) == given_facts


@slowly
@given(text=st.text(min_size=1, max_size=200))
def test_prose_is_no_fact(text: str) -> None:
    if set(text) <= set(ALLOWED) and len(text) <= 128:
        assert checked_facts({"k": text}) == {"k": text}
    else:
        with pytest.raises(StoreError, match="cannot be remembered"):
            checked_facts({"k": text})
        with pytest.raises(StoreError, match="cannot be remembered"):
            checked_facts({text: 1})


@pytest.mark.parametrize(
    "wrong",
    [
        {"k": math.nan},
        {"k": math.inf},
        {"k": 2**53 + 1},
        {"k": None},
        {"k": ["a"]},
        {"": 1},
        {"k" * 65: 1},
        {"k": "a\n"},
        {"k": "two words"},
        {"k": "v" * 129},
        {str(number): 1 for number in range(33)},
    ],
)
def test_other_values_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(StoreError):
        checked_facts(wrong)


numbers = st.floats(allow_nan=False, allow_infinity=False)


@slowly
@given(st.lists(numbers, min_size=3, max_size=3))
def test_a_vector_gets_the_length_one_whatever_its_size(vector: list[float]) -> None:
    unit = unit_vector(vector, 3)
    assert unit.dtype == np.float32
    assert math.isclose(float(np.linalg.norm(unit)), 1.0 if any(vector) else 0.0, abs_tol=1e-5)


@pytest.mark.parametrize("wrong", [[1.0, 2.0], [1.0, 2.0, 3.0, 4.0], [1.0, math.nan, 0.0], [math.inf, 0.0, 0.0], []])
def test_vectors_of_another_shape_or_with_holes_are_refused(wrong: list[float]) -> None:
    with pytest.raises(StoreError):
        unit_vector(wrong, 3)


def test_at_least_one_neighbour_is_asked_for() -> None:
    assert checked_count(1) == 1
    with pytest.raises(StoreError, match="1 or more"):
        checked_count(0)
