"""The comparison of ComfyUI fleets over HTTP: its graphs, its rules, and that every job is run once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from eval.comfy_hosts import Fleet, Timed, sized
from eval.comfy_jobs import FAKES, Arrival, Sessions, arrivals, graph_of, measured_s, virtual
from eval.comfy_servers import WAYS, Block, Done, Ground, Match, Rows, main, play, pooled
from eval.comfy_virtual import RULES
from eval.comfy_virtual import WAYS as VIRTUAL_WAYS
from swarmx.compat.comfyui.drafts import loading
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


@pytest.mark.parametrize("cut", [("3", 0), ("11", 0)])
def test_an_emulated_server_takes_a_loaded_latent_for_as_large_as_what_made_it(cut: tuple[str, int]) -> None:
    about = {"shape": "both", "model": "small.safetensors", "text": 1, "seed": 1, "steps": 10, "side": 128}
    whole = graph_of({**about, "batch": 2, "sampler": "euler", "cfg": 7.0})
    works = node_works(sized(loading(whole, {0: cut})))
    assert {key: works[key] for key in whole} == node_works(whole)


@pytest.mark.process
@pytest.mark.parametrize("way", RULES)
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


def test_a_round_is_played_by_the_ways_that_are_left_and_without_the_jobs_to_warm_up(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.jsonl")
    rows.add(Ground(asked={}, mean_s={}))
    match = Match(rows=rows, blocks=[], fleet=["one", "two"], warm_up=2)
    match.played(0, "ours", [Done(seconds=float(n), server="one") for n in range(5)])
    assert match.left(0, WAYS) == list(RULES)
    assert match.left(1, WAYS) == list(WAYS)
    _, [block] = rows.read({})
    assert [each.seconds for each in block.done] == [2.0, 3.0, 4.0]


def test_a_node_has_the_same_luck_in_every_run_of_a_seed() -> None:
    jobs = arrivals(np.random.default_rng(3), 20, load=0.7, capacity=2.4)
    one, again, other = virtual(jobs, 1), virtual(jobs, 1), virtual(jobs, 2)
    assert [job.luck for job in one] == [job.luck for job in again]
    assert [job.luck for job in one] != [job.luck for job in other]
    assert all(0.5 < luck < 2.0 for job in one for luck in job.luck.values())


def test_a_virtual_server_takes_what_nodes_were_measured_to_take_and_nothing_for_what_it_has() -> None:
    [job] = virtual(arrivals(np.random.default_rng(3), 1, load=0.7, capacity=2.4), 1)
    fast, slow = FAKES.servers()["one"], FAKES.servers()["four"]
    took = fast.run(job)
    assert took == pytest.approx(
        {key: measured_s(node.work, loaded=False) * job.luck[key] for key, node in job.facts.nodes.items()}
    )
    assert slow.would_take(job) == pytest.approx({key: 4.0 * seconds for key, seconds in took.items()})
    assert fast.would_take(job) == {}


def test_the_jobs_of_the_emulated_servers_can_be_played_in_virtual_time(tmp_path: Path) -> None:
    command = ["--virtual", "--jobs", "20", "--warm-up", "4", "--rounds", "2", "--out", str(tmp_path)]
    main(command)
    _, blocks = Rows(tmp_path / "rows.jsonl").read(
        {"servers": "virtual", "slow": 0.4, "load": 0.7, "jobs": 20, "warm_up": 4, "seed": 0}
    )
    assert {(block.round, block.way) for block in blocks} == {(n, way) for n in (0, 1) for way in VIRTUAL_WAYS}
    assert all(np.isfinite([each.seconds for each in block.done]).all() for block in blocks)
    assert {len(block.done) for block in blocks} == {20}
    assert (tmp_path / "result.json").exists()
