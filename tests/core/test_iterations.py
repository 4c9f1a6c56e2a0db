"""Many steps in closed form are the same as one after the other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.core.iterations import Iterations


@given(
    start_s=st.floats(0.0, 1e5),
    first_s=st.floats(1e-4, 1.0),
    growth_s=st.sampled_from([0.0, 1e-7, 1e-3]),
    steps=st.integers(1, 2000),
    share=st.floats(-0.1, 1.1),
)
def test_as_many_steps_have_ended_as_fit_before(
    start_s: float, first_s: float, growth_s: float, steps: int, share: float
) -> None:
    run = Iterations(start_s, first_s, growth_s)
    run.plan(steps)
    until_s = start_s + share * (run.end_s - start_s)
    ended = run.ended_by(until_s)
    assert ended == 0 or run.at_s(ended) <= until_s
    assert ended == steps or run.at_s(ended + 1) > until_s


def test_each_step_takes_longer_than_the_one_before_by_the_growth() -> None:
    run = Iterations(10.0, 1.0, 0.25)
    assert [run.at_s(k) for k in range(5)] == pytest.approx([10.0, 11.0, 12.25, 13.75, 15.5])
    run.plan(3)
    assert run.end_s == 13.75
