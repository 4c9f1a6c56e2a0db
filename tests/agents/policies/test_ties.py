"""The least of something, ties drawn."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from swarmx.agents.policies.ties import least

RNG = np.random.default_rng


@given(values=st.lists(st.floats(0.0, 5.0), min_size=1, max_size=30), seed=st.integers(0, 1000))
def test_none_is_below_the_chosen(values: list[float], seed: int) -> None:
    assert values[least(np.array(values), RNG(seed))] == min(values)


@given(rows=st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30), seed=st.integers(0, 1000))
def test_of_some_only_these_are_looked_at(rows: list[tuple[int, bool]], seed: int) -> None:
    rows = [*rows, (5, True)]
    values, among = np.array([v for v, _ in rows]), np.array([a for _, a in rows])
    chosen = least(values, RNG(seed), among)
    assert among[chosen]
    assert values[chosen] == values[among].min()


def test_equals_are_chosen_about_equally_often() -> None:
    rng, values = RNG(0), np.array([1.0, 0.0, 0.0, 2.0, 0.0])
    counts = np.bincount([least(values, rng) for _ in range(3000)], minlength=5)
    assert counts[[0, 3]].sum() == 0
    assert counts[[1, 2, 4]].min() > 900
