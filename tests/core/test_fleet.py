"""The tables of what a policy sees, and what it answers."""

from __future__ import annotations

import numpy as np
import pytest

from swarmx.core.fleet import COLUMNS, COUNTS, FleetView, Terms


def columns_of(replicas: int) -> dict[str, np.ndarray]:
    return {
        name: np.full(replicas, row, dtype=np.int64 if name in COUNTS else np.float64)
        for row, name in enumerate(COLUMNS)
    }


def test_each_column_of_a_view_is_the_one_of_its_name() -> None:
    columns = columns_of(3)
    view = FleetView(**columns)
    assert len(view) == 3
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(view, name), columns[name], err_msg=name)
        assert getattr(view, name).dtype == columns[name].dtype


def test_a_view_over_two_tables_shows_their_rows() -> None:
    view = FleetView(**columns_of(3))
    same = FleetView.over(view.counts, view.numbers)
    assert all(np.shares_memory(getattr(same, name), getattr(view, name)) for name in COLUMNS)


@pytest.mark.parametrize("wrong", ["slowdown", "slownes"])
def test_a_view_with_a_column_too_few_or_too_many_names_it(wrong: str) -> None:
    columns = columns_of(2)
    if columns.pop(wrong, None) is None:
        columns[wrong] = np.zeros(2)
    with pytest.raises(TypeError, match=f"missing or unknown: {wrong}$"):
        FleetView(**columns)


def test_terms_are_rows_of_a_table_below_the_cost() -> None:
    terms = Terms(("wait_s", "decode_s"), np.array([[3.0, 7.0], [1.0, 2.0], [2.0, 5.0]]))
    assert {name: row.tolist() for name, row in terms.items()} == {"wait_s": [1.0, 2.0], "decode_s": [2.0, 5.0]}
    assert len(terms) == 2
    assert "cost_s" not in terms
    with pytest.raises(KeyError):
        terms["cost_s"]
