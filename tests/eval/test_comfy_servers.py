"""The comparison of ComfyUI fleets over HTTP: its graphs, its rules, and that every job is run once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from eval.comfy_hosts import Fleet, Timed
from eval.comfy_jobs import Arrival, Sessions, graph_of, measured_s
from eval.comfy_servers import BASELINES, WAYS, Block, Done, Ground, Rows, play, pooled
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
        fleet = Fleet(urls={name: fake.url for name, fake in fakes.items()}, folder=tmp_path, costs=tmp_path / "costs")
        done = await play(fleet, way, jobs)
    counts = Counter(each.server for each in done)
    assert {name: len(fake.received) for name, fake in fakes.items()} == {"one": 0, "two": 0} | counts
    if way != "model affinity, least queue":
        assert counts == {"one": 4, "two": 4}
    assert all(each.seconds > 0.0 for each in done)


def test_only_rounds_that_all_ways_have_played_are_compared() -> None:
    def block(number: int, way: str) -> Block:
        return Block(round=number, way=way, done=[Done(seconds=1.0 + number, server="one")])

    blocks = [block(number, way) for number in (1, 0) for way in WAYS] + [block(2, WAYS[0])]
    found = pooled(blocks, WAYS)
    assert set(found) == set(WAYS)
    assert all([each.seconds for each in done] == [1.0, 2.0] for done in found.values())
    assert not any(pooled(blocks[-1:], WAYS).values())


def test_a_run_goes_on_where_another_was_stopped_and_not_with_other_settings(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.jsonl")
    assert rows.read({"load": 0.7}) == (None, [])
    ground = Ground(asked={"load": 0.7}, mean_s={"one": 2.0})
    block = Block(round=0, way="ours", done=[Done(seconds=1.5, server="s1", run_s=1.0, parts=True)])
    rows.add(ground)
    rows.add(block)
    assert rows.read({"load": 0.7}) == (ground, [block])
    with pytest.raises(SystemExit, match="another folder"):
        rows.read({"load": 0.8})
