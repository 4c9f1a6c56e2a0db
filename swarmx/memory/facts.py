"""What a vector memory takes in: unit vectors and a few plain facts, never prose, so no tenant's text."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from swarmx.core.control import Facts, Scalar
from swarmx.core.errors import StoreError

MAX_FACTS = 32
MAX_KEY = 64
MAX_WORD = 128
_WORD = re.compile(r"[A-Za-z0-9._:/@+-]*")
_LARGEST_INT = 2**53  # the largest up to which every reader of JSON agrees


def checked_facts(facts: Facts) -> Facts:
    """The facts, if they may be remembered. Raises StoreError for anything that is not a short word or a number."""
    if len(facts) > MAX_FACTS:
        raise StoreError(f"{len(facts)} facts were to be remembered, at most {MAX_FACTS} can be; leave some out")
    for key, value in facts.items():
        checked_word(key, MAX_KEY)
        _check_value(key, value)
    return dict(facts)


def checked_word(word: str, longest: int = MAX_WORD) -> str:
    """The word, if it is one: 1 to `longest` of A-Z, a-z, 0-9 and ._:/@+-. Raises StoreError."""
    if not 1 <= len(word) <= longest or not _WORD.fullmatch(word):
        raise StoreError(
            f"{word[:40]!r} ({len(word)} characters) cannot be remembered: 1 to {longest} of A-Z, a-z, 0-9 and ._:/@+- "
            "are allowed; use an id"
        )
    return word


def unit_vector(vector: Sequence[float], dimension: int) -> NDArray[np.float32]:
    """The vector with length 1 (all zeros stay zeros), shape [dimension]. Raises StoreError."""
    values = np.asarray(vector, dtype=np.float64)
    if values.shape != (dimension,):
        raise StoreError(f"a vector of shape {values.shape} was given, this memory has vectors of {dimension} numbers")
    if not np.isfinite(values).all():
        raise StoreError("a vector with a number that is not finite was given; leave it out or use 0")
    largest = float(np.abs(values).max(initial=0.0))
    if largest == 0.0:
        return np.zeros(dimension, dtype=np.float32)
    # Squares of very large or very small numbers leave the range of floats.
    scaled = values / largest
    return (scaled / np.linalg.norm(scaled)).astype(np.float32)


def checked_count(count: int) -> int:
    """The number of neighbours that is asked for. Raises StoreError unless it is at least 1."""
    if count < 1:
        raise StoreError(f"the nearest {count} were asked for; ask for 1 or more")
    return count


def _check_value(key: str, value: Scalar) -> None:
    if isinstance(value, bool):
        return
    if isinstance(value, str):
        if value:
            checked_word(value)
    elif not isinstance(value, int | float) or not math.isfinite(value):
        raise StoreError(f"the fact {key!r} is {value!r}; a finite number, a short word or a truth value can be kept")
    elif isinstance(value, int) and abs(value) > _LARGEST_INT:
        raise StoreError(f"the fact {key!r} is an integer beyond 2**53; keep it as a float or a word")
