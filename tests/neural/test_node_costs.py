"""Seconds of nodes and graphs, learnt from those that ran."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.core.errors import PredictorError
from swarmx.neural.heads.comfy_nodes import NodeWork
from swarmx.neural.node_costs import MOST_KEYS, MOST_SERVERS, NodeCosts


def a_sampler(evaluations: float, megapixels: float, model: str = "m") -> NodeWork:
    work = evaluations * megapixels
    amounts = (evaluations, work, work * megapixels)
    return NodeWork(node="s", class_type="ksampler", model=model, amounts=amounts)


def true_s(work: NodeWork, factor: float = 1.0) -> float:
    evaluations, linear, square = work.amounts
    return factor * (0.05 + 0.01 * evaluations + 0.2 * linear + 0.05 * square)


def taught(*servers: tuple[str, float], runs: int = 40, noise: float = 0.0) -> NodeCosts:
    rng, costs = np.random.default_rng(0), NodeCosts()
    for number in range(runs):
        name, factor = servers[number % len(servers)]
        work = a_sampler(float(rng.integers(4, 60)), float(rng.uniform(0.1, 2.0)))
        took_s = true_s(work, factor) * math.exp(noise * rng.normal())
        expected_s = costs.seconds(name, work)
        costs.observe(name, work, took_s)
        costs.observe_graph(name, expected_s, took_s)
    return costs


def test_sizes_that_never_ran_are_known_from_those_that_did() -> None:
    costs = taught(("a", 1.0))
    for work in (a_sampler(100.0, 0.05), a_sampler(8.0, 3.0)):
        assert costs.seconds("a", work) == pytest.approx(true_s(work), rel=0.1)


def test_a_server_that_ran_little_is_known_by_its_factor() -> None:
    costs = taught(("a", 1.0), runs=40)
    for number in range(6):
        work = a_sampler(10.0 + number, 0.5)
        costs.observe("slow", work, true_s(work, 3.0))
    asked = a_sampler(40.0, 1.0)
    assert costs.seconds("slow", asked) == pytest.approx(true_s(asked, 3.0), rel=0.25)
    assert costs.seconds("a", asked) == pytest.approx(true_s(asked), rel=0.1)


def test_other_weights_are_other_nodes() -> None:
    costs = taught(("a", 1.0))
    costs.observe("a", a_sampler(10.0, 1.0, "large"), 60.0)
    assert costs.seconds("a", a_sampler(10.0, 1.0)) == pytest.approx(true_s(a_sampler(10.0, 1.0)), rel=0.1)
    assert costs.seconds("a", a_sampler(10.0, 1.0, "large")) > 30.0


def test_nodes_of_a_class_that_differ_in_their_amounts_are_learnt_apart() -> None:
    costs = taught(("a", 1.0))
    plain, one = (NodeWork(node="s", class_type="ksampler", model="m", amounts=a) for a in ((), (2.0,)))
    for _ in range(20):
        costs.observe("a", plain, 5.0)
        costs.observe("a", one, 0.5)
    kept = NodeCosts.loaded(costs.dumped())
    for known in (costs, kept):
        assert known._common_s(plain) == pytest.approx(5.0, rel=0.3)
        assert known._common_s(one) == pytest.approx(0.5, rel=0.3)
        assert known._common_s(a_sampler(40.0, 1.0)) == pytest.approx(true_s(a_sampler(40.0, 1.0)), rel=0.1)


def test_the_spread_of_a_forecast_is_how_far_graphs_were_off() -> None:
    work = a_sampler(20.0, 1.0)
    unsure, sure, noisy = NodeCosts(), taught(("a", 1.0), runs=200), taught(("a", 1.0), runs=200, noise=0.4)
    widths = [
        forecast.quantiles[-1] / forecast.quantiles[0]
        for forecast in (costs.forecast("a", [work]) for costs in (unsure, noisy, sure))
    ]
    assert widths[0] > widths[1] > widths[2]
    assert noisy.forecast("a", [work]).source == "empirical"
    assert unsure.forecast("a", [work]).source == "prior"


def test_a_few_graphs_that_stood_still_do_not_make_a_server_look_hopeless() -> None:
    costs, work = taught(("a", 1.0), runs=17), a_sampler(20.0, 1.0)
    for _ in range(2):
        costs.observe_graph("a", true_s(work), 150.0 * true_s(work))
    forecast = costs.forecast("a", [work])
    assert 2.0 * true_s(work) < forecast.quantiles[-1], "it is said that this happens"
    assert forecast.mean < 3.0 * true_s(work), "who is thought so slow gets no graph that would tell better"


def test_a_node_that_stood_still_on_a_server_that_ran_little_is_not_believed_alone() -> None:
    costs, work = taught(("a", 1.0), runs=40), a_sampler(20.0, 1.0)
    costs.observe("new", work, 400.0 * true_s(work))
    assert costs.seconds("new", work) < 3.0 * true_s(work)
    for number in range(30):
        slower = a_sampler(10.0 + number, 1.0)
        costs.observe("far slower", slower, true_s(slower, 12.0))
    assert costs.seconds("far slower", work) == pytest.approx(true_s(work, 12.0), rel=0.25), "all of them together are"


def test_a_graph_takes_what_its_nodes_take() -> None:
    costs = taught(("a", 1.0), runs=200)
    one, two = a_sampler(20.0, 1.0), a_sampler(30.0, 0.5)
    together = costs.forecast("a", [one, two]).quantile(0.5)
    assert together == pytest.approx(true_s(one) + true_s(two), rel=0.1)


@given(
    seconds=st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=20),
    amounts=st.lists(st.floats(0.0, 1e9), max_size=3),
)
def test_a_forecast_is_sound_whatever_was_observed(seconds: list[float], amounts: list[float]) -> None:
    costs, work = NodeCosts(), NodeWork(node="n", class_type="odd", amounts=tuple(amounts))
    for value in seconds:
        costs.observe("a", work, value)
        costs.observe_graph("a", value, value)
    forecast = costs.forecast("a", [work, work])
    assert all(0.0 < value < math.inf for value in forecast.quantiles)


def test_memory_is_bounded() -> None:
    costs = NodeCosts()
    for number in range(MOST_KEYS + 10):
        costs.observe(f"s{number % (2 * MOST_SERVERS)}", NodeWork(node="n", class_type=f"c{number}"), 1.0)
    assert len(costs._lines) == MOST_KEYS
    assert len(costs._servers) == MOST_SERVERS


def test_intervals_hold_as_often_as_they_say_from_few_graphs_on() -> None:
    """P5 to P95 over graphs of several nodes, each forecast before it ran."""
    inside: list[bool] = []
    for seed in range(6):
        rng, costs = np.random.default_rng(seed), NodeCosts()
        for number in range(80):
            works = [a_sampler(float(rng.integers(4, 60)), float(rng.uniform(0.1, 2.0)), m) for m in ("m", "n")]
            took_s = [true_s(work) * math.exp(0.15 * rng.normal()) for work in works]
            forecast, expected_s = costs.forecast("a", works), sum(costs.seconds("a", work) for work in works)
            if number >= 10:
                inside.append(forecast.quantile(0.05) <= sum(took_s) <= forecast.quantile(0.95))
            for work, each_s in zip(works, took_s, strict=True):
                costs.observe("a", work, each_s)
            costs.observe_graph("a", expected_s, sum(took_s))
    assert 0.85 <= sum(inside) / len(inside) <= 0.96


def test_what_was_learnt_is_the_same_after_it_was_kept() -> None:
    costs = taught(("a", 1.0), ("b", 2.5), noise=0.1)
    again = NodeCosts.loaded(costs.dumped())
    work = a_sampler(25.0, 0.7)
    assert again.dumped() == costs.dumped()
    assert again.forecast("b", [work]) == costs.forecast("b", [work])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda kept: kept | {"format": 99}, "format 99"),
        (lambda kept: kept | {"lines": [kept["lines"][0] | {"gram": [[1.0]]}]}, "another size"),
        (lambda kept: kept | {"lines": [kept["lines"][0] | {"gram": [[0.0] * 4] * 4}]}, "no sums of squares"),
        (lambda kept: kept | {"servers": [kept["servers"][0] | {"factor": 1e9}]}, "factor"),
        (lambda kept: kept | {"servers": [kept["servers"][0] | {"errors": []}]}, "errors"),
        (lambda kept: [], "no costs"),
    ],
)
def test_what_was_not_kept_so_is_refused(change: Callable[[Any], Any], why: str) -> None:
    kept = msgspec.json.decode(taught(("a", 1.0)).dumped())
    with pytest.raises(PredictorError, match=why):
        NodeCosts.loaded(msgspec.json.encode(change(kept)))
