"""Scores of image forecasts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from eval.image_costs import Ran, halves, interval_row, random_graph, score
from swarmx.neural.heads.comfy_nodes import node_works


def runs(count: int, noise: float) -> list[Ran]:
    """Graphs whose nodes take what evaluations, pixels and a constant make of them."""
    rng, found = np.random.default_rng(1), []
    for _ in range(count):
        graph = random_graph(rng, ["a.safetensors", "b.safetensors"])
        seconds = {}
        for key, work in node_works(graph).items():
            price = (0.003, 0.5, 1.0)[: len(work.amounts)] if len(work.amounts) == 3 else (2.0,)
            slow = 2.0 if work.model.startswith("b") else 1.0
            exact = 0.01 + slow * sum(p * a for p, a in zip(price, work.amounts, strict=False))
            seconds[key] = exact * math.exp(noise * rng.normal())
        found.append(Ran(graph=graph, wall_s={key: 2 * s for key, s in seconds.items()}, cpu_s=seconds))
    return found


def test_graphs_whose_nodes_keep_to_the_rule_are_known_ahead_better_than_by_simpler_ways() -> None:
    rows = {str(row["way"]): row for row in score(runs(150, 0.05), "cpu")}
    ours = rows.pop("nodes (ours)")
    assert ours["median_error"] == pytest.approx(0.04, abs=0.04)
    assert all(row["median_error"] > 1.5 * float(ours["median_error"] or 0) for row in rows.values())  # type: ignore[operator]
    assert (ours["learnt_from"], ours["judged"]) == (100, 50)


def test_random_graphs_are_the_same_for_the_same_seed() -> None:
    one, two = (random_graph(np.random.default_rng(5), ["a.safetensors"]) for _ in range(2))
    assert one == two


def test_a_graph_is_in_one_half_whatever_else_ran() -> None:
    all_runs = runs(40, 0.0)
    choose, judge = halves(all_runs)
    assert len(choose) + len(judge) == 40
    assert min(len(choose), len(judge)) > 8
    assert halves(all_runs[:20])[0] == [ran for ran in all_runs[:20] if ran in choose]


def test_intervals_of_graphs_that_keep_to_the_rule_are_sharper_where_early_errors_count_for_less() -> None:
    plain, learning = (interval_row(runs(40, 0.05), "cpu", 0.98, power) for power in (0.0, 2.0))
    assert float(learning["width"] or 0.0) < float(plain["width"] or 0.0)
    assert float(learning["loss"] or 0.0) < float(plain["loss"] or 0.0)
    assert 0.8 < float(learning["inside_p5_p95"] or 0.0) <= 1.0
