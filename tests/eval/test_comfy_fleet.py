"""The emulated fleet of ComfyUI servers: what it does with caches and loads, and that jobs are all done once."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from eval import comfy_virtual
from eval.comfy_fleet import SPEEDS, WORLD, arrivals
from eval.comfy_virtual import WAYS, Ours, Server, simulate


def test_the_same_seed_gives_the_same_jobs_and_another_one_others() -> None:
    one, two, other = arrivals(0.7, 1, 30), arrivals(0.7, 1, 30), arrivals(0.7, 2, 30)
    assert [(job.at_s, job.graph, job.luck) for job in one] == [(job.at_s, job.graph, job.luck) for job in two]
    assert [job.graph for job in one] != [job.graph for job in other]


def test_more_load_is_the_same_jobs_closer_together() -> None:
    light, heavy = arrivals(0.35, 1, 50), arrivals(0.7, 1, 50)
    assert [job.graph for job in light] == [job.graph for job in heavy]
    assert light[-1].at_s == pytest.approx(2.0 * heavy[-1].at_s)


def test_a_server_runs_what_it_has_not_computed_for_its_last_job() -> None:
    one, two = arrivals(0.7, 1, 2)
    server = Server(world=WORLD, name="s", speed=1.0)
    first = server.run(one)
    assert first.keys() == one.facts.nodes.keys()
    assert server.would_take(one) == {}
    server.run(two)
    again = server.would_take(one)
    assert again.keys() == {key for key, node in one.facts.nodes.items() if node.signature not in two.facts.signatures}
    assert again.get("4", 0.0) < first["4"], "its weights are in memory, or it need not be loaded at all"


@pytest.mark.parametrize("name", WAYS)
def test_every_job_is_done_once_and_no_server_does_two_at_a_time(name: str) -> None:
    jobs = arrivals(0.85, 3, 40)
    began: Counter[int] = Counter()
    busy: set[str] = set()

    def watched(world: object, all_jobs: object, servers: object) -> comfy_virtual.Placing:
        inner = WAYS[name](world, all_jobs, servers)  # type: ignore[arg-type]

        class Watched:
            arrived = staticmethod(inner.arrived)

            def ended(self, server: str, took: object) -> None:
                busy.remove(server)
                inner.ended(server, took)  # type: ignore[arg-type]

            def starts(self, now_s: float) -> object:
                for server, job in inner.starts(now_s):
                    assert server not in busy
                    busy.add(server)
                    began[id(job)] += 1
                    yield server, job

        return Watched()  # type: ignore[return-value]

    took_s, _ = simulate(WORLD, jobs, watched)
    assert began == Counter({id(job): 1 for job in jobs})
    assert not busy
    assert np.isfinite(took_s).all()
    assert min(took_s) > 0.0


def test_what_is_told_the_truth_forecasts_it() -> None:
    _, placing = simulate(WORLD, arrivals(0.7, 1, 40), WAYS["ours, told the truth"])
    assert isinstance(placing, Ours)
    assert len(placing.judged) == 40
    assert all(forecast.mean == pytest.approx(seconds) for forecast, seconds in placing.judged)


def test_round_robin_gives_every_server_the_same_number_of_jobs() -> None:
    rule, none = comfy_virtual.round_robin(tuple(SPEEDS)), dict.fromkeys(SPEEDS, 0)
    assert set(Counter(rule(frozenset(), none) for _ in range(40)).values()) == {10}


def test_affinity_goes_to_the_model_unless_its_queue_is_too_long() -> None:
    rule, none, model = comfy_virtual.affinity(tuple(SPEEDS), 1), dict.fromkeys(SPEEDS, 0), frozenset({"a model"})
    first = rule(model, none)
    assert rule(model, none | {first: 1}) == first
    assert rule(model, none | {first: 2}) != first
