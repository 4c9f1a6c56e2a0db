"""Servers that refuse a graph, or some of its outputs, or lost a file: a client gets all, or hears why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aiohttp
import pytest

from swarmx.compat.comfyui.graph import Graph
from tests.compat.comfyui.fake import FakeComfy, serving
from tests.compat.comfyui.fake_nodes import graph, object_info
from tests.compat.comfyui.fronts import Client, eventually, front
from tests.compat.comfyui.test_parts import branches, splitting

pytestmark = pytest.mark.process
TOO_SMALL = {"width": 0, "height": 64, "batch_size": 1, "color": 0}


def with_branch(loader: str, inputs: dict[str, Any], *, seed: int = 1) -> Graph:
    """The usual picture, `9`, and beside it one of what the node `20` makes, `29`."""
    save = {"class_type": "SaveImage", "inputs": {"images": ["20", 0], "filename_prefix": f"b{seed}"}}
    return graph(seed) | {"20": {"class_type": loader, "inputs": inputs}, "29": save}


async def ran_at(fake: FakeComfy, client: Client, prompt_id: str) -> dict[str, Any]:
    """What the server keeps of a job."""
    async with client.session.get(f"{fake.url}/history/{prompt_id}") as response:
        return (await response.json())[prompt_id]  # type: ignore[no-any-return]


async def test_no_server_gets_a_node_that_was_refused(tmp_path: Path) -> None:
    fake = FakeComfy()
    others = with_branch("EmptyImage", TOO_SMALL)
    async with serving(fake), front(tmp_path, fake) as client:
        _, answer = await client.submit(others)
        entry = await client.ended(answer["prompt_id"])
        ran = await ran_at(fake, client, answer["prompt_id"])
    assert answer["node_errors"].keys() == {"20"}
    assert entry["outputs"].keys() == {"9"}
    assert entry["prompt"][2].keys() == others.keys()
    assert ran["prompt"][2].keys() == graph().keys()
    assert ran["prompt"][4] == ["9"]


async def test_no_server_of_a_job_in_parts_gets_a_node_that_was_refused(tmp_path: Path) -> None:
    fakes = (FakeComfy(), FakeComfy())
    others = branches(20, 20) | with_branch("EmptyImage", TOO_SMALL)
    async with serving(*fakes), splitting(tmp_path, *fakes) as client:
        _, answer = await client.submit(others)
        entry = await client.ended(answer["prompt_id"])
        ran = [await ran_at(fake, client, prompt_id) for fake in fakes for prompt_id in fake.received]
    assert len(entry["swarmx"]["parts"]) == len(ran) == 2
    assert [row["prompt"][2].keys() for row in ran] == [branches(20, 20).keys()] * 2


async def test_a_client_that_waits_for_a_servers_word_hears_which_outputs_it_does_not_make(tmp_path: Path) -> None:
    fake = FakeComfy(custom=True)
    async with serving(fake), front(tmp_path, fake) as client:
        status, answer = await client.submit(with_branch("Picky", {"value": 7}))
        entry = await client.ended(answer["prompt_id"])
    assert (status, answer["node_errors"].keys()) == (200, {"20"})
    assert answer["node_errors"]["20"]["dependent_outputs"] == ["29"]
    assert (entry["status"]["status_str"], entry["outputs"].keys()) == ("success", {"9"})
    assert fake.received == [answer["prompt_id"]]


async def test_outputs_that_a_server_does_not_make_as_it_lost_their_file_are_made_with_a_new_copy(
    tmp_path: Path,
) -> None:
    fake = FakeComfy()
    form = aiohttp.FormData()
    form.add_field("image", b"cat", filename="cat.png")
    async with serving(fake), front(tmp_path, fake) as client:
        await client.session.post(f"{client.url}/upload/image", data=form)
        await client.run(with_branch("LoadImage", {"image": "cat.png"}))
        fake.files.clear()
        _, _, second = await client.run(with_branch("LoadImage", {"image": "cat.png"}, seed=2))
        _, _, third = await client.run(with_branch("LoadImage", {"image": "cat.png"}, seed=3))
    assert [entry["status"]["status_str"] for entry in (second, third)] == ["success"] * 2
    assert [entry["outputs"].keys() for entry in (second, third)] == [{"9", "29"}] * 2
    assert [entry["swarmx"]["attempts"] for entry in (second, third)] == [2, 1]


async def test_a_job_of_which_a_server_makes_a_part_only_is_made_whole_elsewhere_and_stopped_there(
    tmp_path: Path,
) -> None:
    models = ("tiny.safetensors", "other.safetensors")
    fakes = (FakeComfy(models), FakeComfy(models))
    both = branches(20, 20)
    both["14"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "other.safetensors"}}
    both["13"]["inputs"]["model"] = ["14", 0]
    async with serving(*fakes), front(tmp_path, *fakes, refresh_s=60.0, split=False) as client:
        for fake in fakes:
            fake.stuck = True
        await client.submit(graph(7))
        has = await eventually(lambda: _at_work(fakes))
        lacks = next(fake for fake in fakes if fake is not has)
        lacks.info = object_info(["tiny.safetensors"])
        _, answer = await client.submit(both)
        await eventually(lambda: _took(lacks, answer["prompt_id"]))
        await eventually(lambda: _is_idle(lacks))
        has.stuck = False
        entry = await client.ended(answer["prompt_id"])
    assert (entry["status"]["status_str"], entry["outputs"].keys()) == ("success", {"9", "19"})
    assert has.received[1:] == lacks.received == [answer["prompt_id"]]


async def _at_work(fakes: tuple[FakeComfy, ...]) -> FakeComfy | None:
    return next((fake for fake in fakes if fake._running is not None), None)


async def _took(fake: FakeComfy, prompt_id: str) -> bool:
    return prompt_id in fake.received


async def _is_idle(fake: FakeComfy) -> bool:
    return fake._running is None


async def test_a_job_of_which_no_server_makes_all_says_what_they_refuse(tmp_path: Path) -> None:
    fakes = (FakeComfy(custom=True), FakeComfy(custom=True))
    async with serving(*fakes), front(tmp_path, *fakes, split=False) as client, client.socket() as socket:
        for fake in fakes:
            fake.stuck = True
        first = [(await client.submit(graph(seed)))[1]["prompt_id"] for seed in (1, 2)]
        await eventually(lambda: _are_at_work(fakes))
        status, answer = await client.submit(with_branch("Picky", {"value": 7}, seed=3))  # no server is free
        for fake in fakes:
            fake.stuck = False
        entry = await client.ended(answer["prompt_id"])
        told = []
        async with client.session.get(f"{client.url}/history") as response:
            others = await response.json()
        while not told:
            message = await socket.receive_json()
            told = [message["data"]] if message["type"] == "execution_error" else []
    assert (status, answer["node_errors"]) == (200, {})
    assert entry["status"]["status_str"] == "error"
    assert told[0]["exception_type"] == "swarmx.GraphRefused"
    assert told[0]["node_errors"].keys() == {"20"}
    assert all(others[prompt_id]["status"]["status_str"] == "success" for prompt_id in first)
    assert sorted(len(fake.received) for fake in fakes) == [2, 2], "each was asked once"


async def _are_at_work(fakes: tuple[FakeComfy, ...]) -> bool:
    return all(fake._running is not None for fake in fakes)


async def test_a_picture_that_is_gone_is_the_fault_of_the_server_that_made_it(tmp_path: Path) -> None:
    maker = FakeComfy(("one.safetensors",))
    others = (FakeComfy(("two.safetensors",)), FakeComfy(("two.safetensors",)))
    more = {"refresh_s": 60.0, "poll_s": 1.0, "split": False}
    async with serving(maker, *others), front(tmp_path, maker, *others, **more) as client, client.socket() as socket:
        _, _, made = await client.run(graph(model="one.safetensors"))
        warm = [(await client.submit(graph(seed, model="two.safetensors")))[1]["prompt_id"] for seed in (1, 2)]
        for prompt_id in warm:
            await client.ended(prompt_id)
        _, before = await client.ask("GET", "/swarmx/servers")
        maker.files.clear()
        name = made["outputs"]["9"]["images"][0]["filename"]
        _, answer = await client.submit(loading(name))
        entry = await client.ended(answer["prompt_id"])
        _, state = await client.ask("GET", "/swarmx/servers")
        error = None
        while error is None:
            message = await socket.receive_json()
            error = message["data"] if message["type"] == "execution_error" else None
    assert entry["status"]["status_str"] == "error"
    assert error["exception_type"] == "swarmx.FileGone"
    assert f"'{name.split('~')[1]}'" in error["exception_message"]
    assert "s1" in error["exception_message"]
    assert state["servers"][1:] == before["servers"][1:], "no other server is doubted"


async def test_a_job_that_loads_a_picture_of_a_server_that_is_away_waits_until_it_is_back(tmp_path: Path) -> None:
    maker, other = FakeComfy(("one.safetensors",)), FakeComfy(("two.safetensors",))
    async with serving(maker, other), front(tmp_path, maker, other, split=False) as client:
        _, _, made = await client.run(graph(model="one.safetensors"))
        port = int(maker.url.rpartition(":")[2])
        await maker.die()
        _, answer = await client.submit(loading(made["outputs"]["9"]["images"][0]["filename"]))
        _, _, meanwhile = await client.run(graph(4, model="two.safetensors"))
        _, waits = await client.ask("GET", f"/api/jobs/{answer['prompt_id']}")
        await maker.start(port)
        entry = await client.ended(answer["prompt_id"])
    assert meanwhile["status"]["status_str"] == "success"
    assert waits["status"] == "pending"
    assert entry["status"]["status_str"] == "success"


def loading(name: str) -> Graph:
    """A graph that only servers with the second model can run, and that loads the picture."""
    return (
        graph(3, model="two.safetensors")
        | {"20": {"class_type": "LoadImage", "inputs": {"image": name}}}
        | {"29": {"class_type": "PreviewImage", "inputs": {"images": ["20", 0]}}}
    )
