"""Forecasts of jobs: from what nodes took, what servers hold, and whole jobs where servers do not tell."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.compat.comfyui.forecasts import JobFacts, NodeForecaster, ServerState
from tests.compat.comfyui.fake_nodes import graph

STEP_S, LOAD_S, REST_S = 0.1, 4.0, 0.05


def facts_of(seed: int, *, steps: int = 10, model: str = "tiny.safetensors") -> JobFacts:
    return JobFacts.of(graph(seed, steps=steps, model=model, side=1024), ("9",))


def truth(facts: JobFacts, server: ServerState, *, slow: float = 1.0) -> dict[str, float]:
    """Seconds of the nodes that such a server runs."""
    took = {}
    for key, node in facts.nodes.items():
        if node.signature not in server.cached:
            load_s = LOAD_S if node.loads - server.resident.keys() else 0.02
            took[key] = slow * (STEP_S * node.work.amounts[0] / 2 if key == "3" else load_s if key == "4" else 0.02)
    return took


def teach(
    forecaster: NodeForecaster, server: ServerState, jobs: list[JobFacts], *, slow: float = 1.0, told: bool = True
) -> None:
    for facts in jobs:
        took = truth(facts, server, slow=slow)
        nodes: Mapping[str, float] = took if told else {}
        forecaster.ended(facts, server.copy(), sum(took.values()) + REST_S, nodes)
        server.ran(facts)


def mixed(count: int) -> list[JobFacts]:
    rng = np.random.default_rng(3)
    models = ("a.safetensors", "b.safetensors", "c.safetensors", "d.safetensors")
    return [facts_of(100 + n, steps=int(rng.integers(4, 50)), model=models[int(rng.integers(4))]) for n in range(count)]


def test_a_graph_of_another_size_is_known_once_its_classes_ran() -> None:
    forecaster, server = NodeForecaster(), ServerState(name="a")
    teach(forecaster, server, [facts_of(n, steps=4 + n % 5) for n in range(20)])
    longer = facts_of(99, steps=40)
    assert forecaster.forecast(longer, server).quantile(0.5) == pytest.approx(
        sum(truth(longer, server).values()) + REST_S, rel=0.1
    )


def test_a_server_that_is_slow_at_some_jobs_is_taken_to_be_slow_at_others() -> None:
    forecaster, fast, slow = NodeForecaster(), ServerState(name="fast"), ServerState(name="slow")
    teach(forecaster, fast, mixed(40))
    teach(forecaster, slow, [facts_of(n, steps=10, model="a.safetensors") for n in range(20)], slow=3.0)
    unseen = facts_of(77, steps=30, model="b.safetensors")
    for server in (fast, slow):
        server.resident["b.safetensors"] = None
    ratio = forecaster.forecast(unseen, slow).mean / forecaster.forecast(unseen, fast).mean
    assert ratio == pytest.approx(3.0, rel=0.35)


def test_what_is_cached_costs_nothing_and_weights_that_are_in_memory_little() -> None:
    forecaster, server = NodeForecaster(), ServerState(name="a")
    jobs = mixed(60)
    teach(forecaster, server, jobs)
    again = forecaster.forecast(jobs[-1], server)
    assert again.quantile(0.5) < 0.2, "all its nodes are computed already"
    held = facts_of(500, steps=4, model=next(iter(server.resident)))
    away = facts_of(500, steps=4, model=next(iter({m for job in jobs for m in job.models} - server.resident.keys())))
    difference = forecaster.forecast(away, server).quantile(0.5) - forecaster.forecast(held, server).quantile(0.5)
    assert difference == pytest.approx(LOAD_S, rel=0.25)


def test_whole_jobs_teach_where_servers_do_not_tell_what_nodes_took() -> None:
    forecaster, server = NodeForecaster(), ServerState(name="a")
    teach(forecaster, server, [facts_of(n, steps=4 + n % 30) for n in range(60)], told=False)
    unseen = facts_of(99, steps=25)
    real_s = sum(truth(unseen, server).values()) + REST_S
    assert forecaster.forecast(unseen, server).quantile(0.5) == pytest.approx(real_s, rel=0.25)


def test_a_load_that_was_none_does_not_make_all_loads_free() -> None:
    forecaster, server = NodeForecaster(), ServerState(name="a")
    teach(forecaster, server, mixed(60))
    away = facts_of(500, model=next(iter({m for job in mixed(60) for m in job.models} - server.resident.keys())))
    before = forecaster.forecast(away, server).mean
    took = truth(away, server) | {"4": 0.001}
    forecaster.ended(away, server, sum(took.values()) + REST_S, took)
    assert forecaster.forecast(away, server).mean > before - 0.75 * LOAD_S


def test_the_spread_narrows_as_forecasts_prove_right() -> None:
    forecaster, server = NodeForecaster(), ServerState(name="a")
    job = facts_of(1)
    wide = forecaster.forecast(job, server)
    teach(forecaster, server, [facts_of(n) for n in range(2, 60)])
    narrow = forecaster.forecast(facts_of(99), server)
    assert narrow.quantile(0.9) / narrow.quantile(0.5) < 0.7 * wide.quantile(0.9) / wide.quantile(0.5)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_what_cannot_be_a_time_teaches_nothing(seconds: float) -> None:
    forecaster, server, job = NodeForecaster(), ServerState(name="a"), facts_of(1)
    before = forecaster.forecast(job, server)
    forecaster.ended(job, server, seconds, {"3": 1.0})
    assert forecaster.forecast(job, server) == before


def test_a_job_that_was_stopped_leaves_what_it_had_computed() -> None:
    server, first, second = ServerState(name="a"), facts_of(1), facts_of(2)
    server.ran(first)
    server.ran(second, {"3"})
    names = {key: node.signature in server.cached for key, node in second.nodes.items()}
    assert names == {"4": True, "5": True, "6": True, "7": True, "3": True, "8": False, "9": False}
    stopped = ServerState(name="b")
    stopped.ran(first, {"5"})
    assert not stopped.resident, "its loader had not ended"


def test_order_and_guidance_count_as_evaluations() -> None:
    plain = graph(1)
    plain["3"]["inputs"]["cfg"] = 1.0
    euler, heun, unguided = (
        JobFacts.of(made, ("9",)).nodes["3"].work.amounts[0] for made in (graph(1), graph(1, sampler="heun"), plain)
    )
    assert heun == pytest.approx(2 * euler - 2)
    assert unguided == pytest.approx(euler / 2)


odd_values = st.one_of(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8) | st.just("x" * 5000),
    st.just(10**300) | st.just("b.safetensors"),
    st.tuples(st.sampled_from(["3", "4", "5", "6", "9", "none"]), st.integers(-1, 3)).map(list),
    st.lists(st.integers() | st.text(max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers() | st.lists(st.text(max_size=3), max_size=2), max_size=2),
)
some_inputs = [(node_id, name) for node_id, node in graph().items() for name in node["inputs"]]
more_inputs = [("3", "width"), ("3", "guider"), ("3", "start_at_step"), ("5", "length"), ("8", "scale_by")]


@given(
    changes=st.dictionaries(st.sampled_from(some_inputs + more_inputs), odd_values, max_size=8), taught=st.booleans()
)
def test_whatever_the_inputs_a_graph_is_read_and_forecast(changes: dict[tuple[str, str], object], taught: bool) -> None:
    odd = graph()
    for (node_id, name), value in changes.items():
        odd[node_id]["inputs"][name] = value
    facts, forecaster, server = JobFacts.of(odd, ("9",)), NodeForecaster(), ServerState(name="a")
    if taught:
        teach(forecaster, server, [facts_of(n) for n in range(3)])
        forecaster.ended(facts, server.copy(), 3.0, dict.fromkeys(facts.nodes, 0.1))
        server.ran(facts)
    assert 0.0 < forecaster.forecast(facts, server).mean < math.inf
    assert forecaster.forecast(facts_of(9), server).mean < 100.0, "it spoils nobody's"
    assert facts.signatures == {node.signature for node in facts.nodes.values()}
