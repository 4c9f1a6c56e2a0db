"""The comparison of ComfyUI fleets over HTTP: its graphs, its rules, and that every job is run once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from eval.comfy_servers import BASELINES, Arrival, Fleet, Sessions, Timed, graph_of, measured_s, play
from swarmx.compat.comfyui.nodes import NodeBook
from swarmx.compat.comfyui.validation import Accepted, validate
from swarmx.neural.heads.comfy_nodes import node_works
from tests.compat.comfyui.fake import serving


def test_every_graph_is_one_that_a_server_takes() -> None:
    book, sessions = NodeBook(), Sessions(np.random.default_rng(1))
    book.told("s", Timed(1.0, 0).info)
    drawn = [sessions.draw() for _ in range(100)]
    verdicts = [validate(graph, book.specs) for graph in drawn]
    assert all(isinstance(verdict, Accepted) for verdict in verdicts)
    assert {len(verdict.outputs) for verdict in verdicts if isinstance(verdict, Accepted)} == {1, 2}


def test_measured_seconds_grow_with_what_is_asked_for() -> None:
    about = {"shape": "text", "model": "small.safetensors", "text": 1, "seed": 1, "steps": 10, "side": 128}
    about |= {"batch": 1, "sampler": "euler", "cfg": 7.0}

    def seconds(**more: object) -> float:
        works = node_works(graph_of({**about, **more})).values()
        return sum(measured_s(work, loaded=True) for work in works)

    assert seconds() < seconds(steps=20)
    assert seconds() < seconds(model="large.safetensors")
    assert seconds() < seconds(side=256)


@pytest.mark.process
@pytest.mark.parametrize("way", BASELINES)
async def test_every_job_is_run_once_where_the_rule_says(tmp_path: Path, way: str) -> None:
    sessions = Sessions(np.random.default_rng(2))
    jobs = [Arrival(at_s=0.0, graph=sessions.draw()) for _ in range(8)]
    fakes = {"one": Timed(1000.0, 0), "two": Timed(500.0, 1)}
    async with serving(*fakes.values()):
        fleet = Fleet(urls={name: fake.url for name, fake in fakes.items()}, folder=tmp_path)
        done = await play(fleet, way, jobs)
    counts = Counter(facts["server"] for _, facts in done)
    assert {name: len(fake.received) for name, fake in fakes.items()} == {"one": 0, "two": 0} | counts
    if way != "model affinity, least queue":
        assert counts == {"one": 4, "two": 4}
    assert all(seconds > 0.0 for seconds, _ in done)
