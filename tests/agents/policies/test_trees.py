"""Trees that are evaluated for many rows at once."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmx.agents.policies.trees import LEAVES, NODES, trees_from

FEATURES = 3


def walked(arrays: dict[str, np.ndarray], row: np.ndarray) -> float:
    """The plain way: down each tree, node by node."""
    total = 0.0
    for feature, threshold, leaf in zip(arrays["t_feature"], arrays["t_threshold"], arrays["t_leaf"], strict=True):
        node = 0
        while node < NODES:
            node = 2 * node + 1 + int(row[feature[node]] > threshold[node])
        total += float(leaf[node - NODES])
    return total


def some_trees(seed: int, count: int) -> dict[str, np.ndarray]:
    """Thresholds are whole numbers, so that rows meet them; a part of the nodes is none."""
    rng = np.random.default_rng(seed)
    threshold = rng.integers(-5, 6, (count, NODES)).astype(np.float32)
    threshold[rng.random((count, NODES)) < 0.3] = np.inf
    return {
        "t_feature": rng.integers(0, FEATURES, (count, NODES)).astype(np.uint8),
        "t_threshold": threshold,
        "t_leaf": rng.normal(size=(count, LEAVES)).astype(np.float32),
    }


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 8), rows=st.integers(1, 20))
def test_the_sum_is_that_of_walking_down_every_tree(seed: int, count: int, rows: int) -> None:
    arrays = some_trees(seed, count)
    values = np.random.default_rng(seed + 1).integers(-6, 7, (rows, FEATURES)).astype(np.float64)
    found = trees_from(arrays, "t", FEATURES).predict(values)
    np.testing.assert_allclose(found, [walked(arrays, row) for row in values], rtol=1e-6, atol=1e-6)


def test_a_tree_without_nodes_is_its_first_leaf() -> None:
    arrays = {
        "t_feature": np.zeros((1, NODES), dtype=np.uint8),
        "t_threshold": np.full((1, NODES), np.inf, dtype=np.float32),
        "t_leaf": np.arange(7.0, 7.0 + LEAVES, dtype=np.float32)[None],
    }
    assert trees_from(arrays, "t", FEATURES).predict(np.full((2, FEATURES), 1e9)).tolist() == [7.0, 7.0]


def test_a_row_at_a_threshold_goes_left() -> None:
    arrays = some_trees(0, 1)
    arrays["t_threshold"][:] = np.inf
    arrays["t_threshold"][0, 0] = 2.0
    arrays["t_feature"][0, 0] = 1
    left, right = float(arrays["t_leaf"][0, 0]), float(arrays["t_leaf"][0, LEAVES // 2])
    found = trees_from(arrays, "t", FEATURES).predict(np.array([[0.0, 2.0, 0.0], [0.0, 2.5, 0.0]]))
    assert found.tolist() == [left, right]
