"""Jobs in parts on several servers: one job to their client, the same pictures, one end whatever happens."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from swarmx.compat.comfyui.drafts import is_ours
from swarmx.compat.comfyui.forecasts import JobFacts, ServerState
from swarmx.compat.comfyui.graph import Graph
from swarmx.core.forecast import Forecast, point
from tests.compat.comfyui.fake import FakeComfy, serving
from tests.compat.comfyui.fake_nodes import graph
from tests.compat.comfyui.fronts import Client, eventually, front, until_end

pytestmark = pytest.mark.process


@dataclass(frozen=True)
class Stepwise:
    """A second for each evaluation of a network, and so many for loads of weights."""

    loads_s: Mapping[str, float] = field(default_factory=dict)

    def forecast(self, facts: JobFacts, server: ServerState) -> Forecast:
        steps = sum(node.work.amounts[0] for node in facts.nodes.values() if len(node.work.amounts) == 3)
        loads_s = sum(self.loads_s.get(model, 0.0) for model in server.to_load(facts))
        return point(steps + loads_s + 0.1, unit="s")

    def ended(self, facts: JobFacts, server: ServerState, seconds: float, nodes: Mapping[str, float]) -> None:
        pass


def branches(*steps: int, seed: int = 1) -> Graph:
    """A picture for each of these, all of one checkpoint: `9`, `19`, `29`."""
    made: Graph = {}
    for number, count in enumerate(steps):
        for node_id, node in graph(seed + number, steps=count).items():
            shared = node_id in ("4", "5", "6", "7")
            inputs = {
                name: [_named(value[0], number), value[1]] if isinstance(value, list) else value
                for name, value in node["inputs"].items()
            }
            made[node_id if shared else _named(node_id, number)] = {**node, "inputs": inputs}
    return made


def _named(node_id: str, number: int) -> str:
    return node_id if node_id in ("4", "5", "6", "7") or not number else f"{number}{node_id}"


def refined(first: int, *second: int, seed: int = 1) -> Graph:
    """A latent of one sampler that others go on from, two where one is named, each to a picture: `9`, `19`, `29`."""
    each = second if len(second) > 1 else second * 2
    made = branches(*each, seed=seed)
    made["2"] = {"class_type": "KSampler", "inputs": {**made["3"]["inputs"], "steps": first}}
    for number in range(len(each)):
        made[_named("3", number)]["inputs"] |= {"latent_image": ["2", 0], "denoise": 0.5}
    return made


MODELS = ("tiny.safetensors", "other.safetensors", "third.safetensors")
DEAR_LOADS = Stepwise(loads_s=dict(zip(MODELS, (300.0, 100.0, 100.0), strict=True)))


def relayed() -> Graph:
    """Samplers that go on from each other, each with a model of its own, and a picture of the last: `29`."""
    made: Graph = {}
    for number, model in enumerate(MODELS):
        for node_id, node in graph(number, model=model).items():
            if (node_id == "5" and number) or (node_id in ("8", "9") and number < 2):
                continue
            made[f"{number or ''}{node_id}"] = {
                **node,
                "inputs": {
                    name: [f"{number or ''}{value[0]}", value[1]] if isinstance(value, list) else value
                    for name, value in node["inputs"].items()
                },
            }
    for sampler, before in (("13", "3"), ("23", "13")):
        made[sampler]["inputs"] |= {"latent_image": [before, 0], "denoise": 0.5}
    return made


async def warmed(client: Client, fakes: tuple[FakeComfy, ...]) -> None:
    """Each server has another one of the models in memory."""
    for fake in fakes:
        fake.stuck = True
    answers = [await client.submit(graph(9, model=model)) for model in MODELS]
    await eventually(lambda: _busy(fakes, 3))
    for fake in fakes:
        fake.stuck = False
    for _, answer in answers:
        await client.ended(answer["prompt_id"])
    for fake in fakes:
        fake.received.clear()


async def pictures(client: Client, entry: dict[str, Any]) -> dict[str, bytes]:
    """What the outputs of a job are, by node."""
    found = {}
    for node, output in entry["outputs"].items():
        async with client.session.get(f"{client.url}/view", params=output["images"][0]) as response:
            assert response.status == 200
            found[node] = await response.read()
    return found


@asynccontextmanager
async def splitting(folder: Path, *fakes: FakeComfy, **more: Any) -> AsyncIterator[Client]:
    async with front(folder, *fakes, **({"forecaster": Stepwise()} | more)) as client:
        yield client


async def whole(folder: Path, prompt: Graph) -> dict[str, bytes]:
    """The pictures of the graph when it runs on one server."""
    fake = FakeComfy(MODELS)
    async with serving(fake), splitting(folder, fake) as client:
        _, _, entry = await client.run(prompt)
        assert "parts" not in entry["swarmx"]
        return await pictures(client, entry)


@pytest.mark.parametrize("prompt", [branches(20, 20), branches(10, 12, 14), refined(10, 30)], ids=["2", "3", "cut"])
async def test_a_graph_in_parts_makes_the_pictures_that_it_makes_whole_and_is_one_job(
    tmp_path: Path, prompt: Graph
) -> None:
    fakes = (FakeComfy(), FakeComfy(), FakeComfy())
    async with serving(*fakes), splitting(tmp_path / "split", *fakes) as client:
        prompt_id, events, entry = await client.run(prompt)
        found = await pictures(client, entry)
        _, jobs = await client.ask("GET", "/api/jobs")
        _, why = await client.ask("GET", f"/swarmx/why/{prompt_id}")
    told = [(kind, data) for kind, data in events if kind not in ("status", "binary")]
    assert found == await whole(tmp_path / "whole", prompt)
    assert len({part["server"] for part in entry["swarmx"]["parts"]}) == len(entry["swarmx"]["parts"]) > 1
    assert [row["id"] for row in jobs["jobs"]] == [prompt_id]
    assert {data.get("prompt_id") for _, data in told} == {prompt_id}
    kinds = [kind for kind, _ in told]
    assert [kinds.count(kind) for kind in ("execution_start", "execution_success")] == [1, 1]
    assert kinds[0] == "execution_start"
    assert kinds[-1] == "executing"
    executed = [data["node"] for kind, data in told if kind == "executed"]
    assert sorted(executed) == sorted(entry["outputs"]) == sorted(found)
    began = [data["node"] for kind, data in told if kind == "executing" and data["node"] is not None]
    assert len(began) == len(set(began)), "a node that two parts run is told of once"
    assert not any(map(is_ours, [*began, *entry["meta"]]))
    assert entry["status"]["completed"]
    assert entry["status"]["messages"][0][0] == "execution_start"
    assert entry["prompt"][2] == prompt
    notes = [row["decision"]["note"] for row in why["decisions"]]
    assert notes[0].startswith(f"split into {len(entry['swarmx']['parts'])} parts")
    assert ("cut behind the node 2" in notes[0]) == ("2" in prompt)
    assert len(notes) == 1 + len(entry["swarmx"]["parts"])


async def test_a_graph_runs_in_parts_whatever_ids_a_client_gave_to_others(tmp_path: Path) -> None:
    fakes = (FakeComfy(), FakeComfy())
    prompt_id = uuid.uuid4()
    async with serving(*fakes), splitting(tmp_path, *fakes) as client:
        for number in range(2):
            await client.run(graph(number, steps=1), prompt_id=str(uuid.uuid5(prompt_id, str(number))))
        _, _, entry = await client.run(branches(20, 20), prompt_id=str(prompt_id))
    assert entry["status"]["status_str"] == "success"
    assert len(entry["swarmx"]["parts"]) == 2


async def test_a_latent_that_three_servers_go_on_from_makes_the_pictures_that_it_makes_on_one(tmp_path: Path) -> None:
    prompt = refined(10, 30, 30, 30)
    fakes = (FakeComfy(), FakeComfy(), FakeComfy())
    async with serving(*fakes), splitting(tmp_path / "split", *fakes) as client:
        prompt_id, events, entry = await client.run(prompt)
        found = await pictures(client, entry)
        _, why = await client.ask("GET", f"/swarmx/why/{prompt_id}")
    assert found == await whole(tmp_path / "whole", prompt)
    assert why["decisions"][0]["decision"]["note"].startswith("split into 3 parts, cut behind the node 2:")
    began = [data["node"] for kind, data in events if kind == "executing" and data["node"] is not None]
    assert len(began) == len(set(began)), "a node that several parts run is told of once"
    assert {node for node in prompt if prompt[node]["class_type"] == "KSampler"} <= set(began)
    assert [len(fake.received) for fake in fakes] == [1, 1, 1]
    assert list((tmp_path / "split" / "latents").iterdir()) == []


async def test_a_part_between_two_cuts_that_is_lost_is_run_again_alone_and_the_last_one_waits_for_it(
    tmp_path: Path,
) -> None:
    fakes = (FakeComfy(MODELS), FakeComfy(MODELS), FakeComfy(MODELS))
    prompt = relayed()
    async with serving(*fakes), splitting(tmp_path / "split", *fakes, forecaster=DEAR_LOADS) as client:
        await warmed(client, fakes)
        for fake in fakes:
            fake.stuck = True
        _, answer = await client.submit(prompt)
        first = await _next(fakes)
        first.stuck = False
        middle = await _next(fakes, first)
        await eventually(lambda: _is_running(client, 1))
        await middle.die()
        for fake in fakes:
            fake.stuck = False
        entry = await client.ended(answer["prompt_id"])
        found = await pictures(client, entry)
    assert found == await whole(tmp_path / "whole", prompt)
    parts = entry["swarmx"]["parts"]
    assert ([part["outputs"] for part in parts], [part["attempts"] for part in parts]) == ([[], [], ["29"]], [1, 2, 1])


async def test_parts_between_and_behind_two_cuts_survive_the_front(tmp_path: Path) -> None:
    fakes = (FakeComfy(MODELS), FakeComfy(MODELS), FakeComfy(MODELS))
    prompt = relayed()
    async with serving(*fakes):
        async with splitting(tmp_path / "split", *fakes, forecaster=DEAR_LOADS) as client:
            await warmed(client, fakes)
            for fake in fakes:
                fake.stuck = True
            _, answer = await client.submit(prompt)
            first = await _next(fakes)
            first.stuck = False
            await _next(fakes, first)
            await eventually(lambda: _is_running(client, 1))
        async with splitting(tmp_path / "split", *fakes, forecaster=DEAR_LOADS) as client:
            for fake in fakes:
                fake.stuck = False
            entry = await client.ended(answer["prompt_id"])
            found = await pictures(client, entry)
    assert found == await whole(tmp_path / "whole", prompt)
    assert sum(len(fake.received) for fake in fakes) == len(entry["swarmx"]["parts"]) == 3, "each part ran once"
    assert list((tmp_path / "split" / "latents").iterdir()) == []


async def test_a_cancelled_job_ends_though_parts_wait_for_latents_that_will_not_come(tmp_path: Path) -> None:
    fakes = (FakeComfy(MODELS), FakeComfy(MODELS), FakeComfy(MODELS))
    async with serving(*fakes), splitting(tmp_path, *fakes, forecaster=DEAR_LOADS) as client, client.socket() as socket:
        await warmed(client, fakes)
        for fake in fakes:
            fake.stuck = True
        _, answer = await client.submit(relayed())
        await _next(fakes)
        await client.ask("POST", "/interrupt", {})
        await until_end(socket, answer["prompt_id"])
        _, job = await client.ask("GET", f"/api/jobs/{answer['prompt_id']}")
        _, after = await client.ask("GET", "/prompt")
    assert job["status"] == "cancelled"
    assert after["exec_info"]["queue_remaining"] == 0
    assert sum(len(fake.received) for fake in fakes) == 1


async def _next(fakes: tuple[FakeComfy, ...], *others: FakeComfy) -> FakeComfy:
    """The server, not one of the others, that has been given a part."""

    async def given() -> list[FakeComfy]:
        return [fake for fake in fakes if fake.received and fake not in others]

    found: list[FakeComfy] = await eventually(given)
    return found[0]


async def test_progress_of_a_job_in_parts_never_goes_back(tmp_path: Path) -> None:
    fakes = (FakeComfy(step_s=0.002), FakeComfy(step_s=0.003))
    async with serving(*fakes), splitting(tmp_path, *fakes) as client:
        _, events, entry = await client.run(refined(20, 20))
    assert len(entry["swarmx"]["parts"]) == 2
    furthest: dict[str, float] = {}
    for kind, data in events:
        if kind == "progress":
            assert data["value"] >= furthest.get(data["node"], 0.0)
            furthest[data["node"]] = data["value"]
        if kind == "progress_state":
            assert {state["prompt_id"] for state in data["nodes"].values()} <= {data["prompt_id"]}
    assert furthest == {"2": 20, "3": 20, "13": 20}


async def test_it_can_be_switched_off_and_keeps_to_the_classes_that_are_allowed(tmp_path: Path) -> None:
    fakes = (FakeComfy(), FakeComfy())
    async with serving(*fakes):
        async with splitting(tmp_path / "off", *fakes, split=False) as client:
            _, _, off = await client.run(branches(20, 20))
        allow = ("KSampler", "Empty*", "CLIP*", "Check*", "VAE*", "SaveImage")
        async with splitting(tmp_path / "few", *fakes, allow=allow) as client:
            _, _, few = await client.run(refined(10, 30))
    assert "parts" not in off["swarmx"]
    assert few["status"]["status_str"] == "success"
    assert not any(map(is_ours, [each for part in few["swarmx"].get("parts", ()) for each in part["outputs"]]))
    assert not [name for fake in fakes for _, name in fake.files if name.endswith(".latent")]


async def test_a_graph_with_a_custom_node_stays_whole_unless_that_is_told_to_be_safe(tmp_path: Path) -> None:
    prompt = branches(20, 20)
    prompt["1"] = {"class_type": "Picky", "inputs": {"value": 3}}
    prompt["2"] = {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}
    fakes = (FakeComfy(custom=True), FakeComfy(custom=True))
    async with serving(*fakes):
        async with splitting(tmp_path / "default", *fakes) as client:
            _, _, entry = await client.run(prompt)
        async with splitting(tmp_path / "told", *fakes, split_classes=("Pick*",)) as client:
            _, _, told = await client.run(prompt)
    assert "parts" not in entry["swarmx"]
    assert len(told["swarmx"]["parts"]) == 2


async def test_a_server_that_dies_has_its_part_run_again_and_no_other(tmp_path: Path) -> None:
    fakes = (FakeComfy(step_s=0.02), FakeComfy(step_s=0.02), FakeComfy())
    async with serving(*fakes), splitting(tmp_path, *fakes) as client, client.socket() as socket:
        for fake in fakes:
            fake.stuck = True
        _, answer = await client.submit(branches(20, 20))
        await eventually(lambda: _busy(fakes, 2))
        lost = next(fake for fake in fakes if fake.received)
        await lost.die()
        for fake in fakes:
            fake.stuck = False
        events = await until_end(socket, answer["prompt_id"])
        entry = await client.history(answer["prompt_id"])
    assert entry["status"]["status_str"] == "success"
    assert sorted(part["attempts"] for part in entry["swarmx"]["parts"]) == [1, 2]
    assert entry["swarmx"]["attempts"] == 2
    ids = [prompt_id for fake in fakes for prompt_id in fake.received]
    assert (len(ids), len(set(ids))) == (3, 2)
    assert [kind for kind, _ in events].count("execution_success") == 1


async def _busy(fakes: tuple[FakeComfy, ...], count: int) -> bool:
    return sum(bool(fake.received) for fake in fakes) >= count


async def test_a_latent_survives_the_server_that_made_it(tmp_path: Path) -> None:
    fakes = (FakeComfy(), FakeComfy(), FakeComfy())
    prompt = refined(10, 30)
    async with serving(*fakes), splitting(tmp_path / "split", *fakes) as client:
        for fake in fakes:
            fake.stuck = True
        _, answer = await client.submit(prompt)
        await eventually(lambda: _busy(fakes, 1))
        maker = next(fake for fake in fakes if fake.received)
        maker.stuck = False
        await eventually(lambda: _busy(fakes, 2))
        await eventually(lambda: _is_running(client, 1))
        await maker.die()
        await eventually(lambda: _are_up(client, 2))
        loader = next(fake for fake in fakes if fake.received and fake is not maker)
        await loader.die()
        for fake in fakes:
            fake.stuck = False
        entry = await client.ended(answer["prompt_id"])
        parts = entry["swarmx"]["parts"]
    assert entry["status"]["status_str"] == "success"
    assert [part["attempts"] for part in parts] == [1, 2]
    assert maker.received != []


async def _are_up(client: Client, count: int) -> bool:
    return bool((await client.ask("GET", "/healthz"))[1]["servers_up"] == count)


async def _is_running(client: Client, count: int) -> bool:
    _, servers = await client.ask("GET", "/swarmx/servers")
    return sum(row["running"] is not None for row in servers["servers"]) == count


@pytest.mark.parametrize("way", ["interrupt", "cancel"])
async def test_a_cancelled_job_stops_all_its_parts_and_ends_once(tmp_path: Path, way: str) -> None:
    fakes = (FakeComfy(), FakeComfy())
    async with serving(*fakes), splitting(tmp_path, *fakes) as client, client.socket() as socket:
        for fake in fakes:
            fake.stuck = True
        _, answer = await client.submit(branches(20, 20))
        prompt_id = answer["prompt_id"]
        await eventually(lambda: _busy(fakes, 2))
        _, queue = await client.ask("GET", "/queue")
        _, remaining = await client.ask("GET", "/prompt")
        if way == "interrupt":
            await client.ask("POST", "/interrupt", {})
        else:
            assert (await client.ask("POST", f"/api/jobs/{prompt_id}/cancel"))[1] == {"cancelled": True}
        events = await until_end(socket, prompt_id)
        _, job = await client.ask("GET", f"/api/jobs/{prompt_id}")
        _, after = await client.ask("GET", "/prompt")
    assert [row[1] for row in queue["queue_running"]] == [prompt_id]
    assert queue["queue_pending"] == []
    assert (remaining["exec_info"]["queue_remaining"], after["exec_info"]["queue_remaining"]) == (1, 0)
    assert job["status"] == "cancelled"
    assert [kind for kind, _ in events].count("execution_interrupted") == 1


async def test_a_part_that_fails_stops_the_others_and_speaks_for_the_job(tmp_path: Path) -> None:
    prompt = branches(20, 30)
    prompt["9"]["inputs"]["filename_prefix"] = "../out"
    fakes = (FakeComfy(step_s=0.005), FakeComfy(step_s=0.005))
    async with serving(*fakes), splitting(tmp_path, *fakes) as client:
        prompt_id, events, entry = await client.run(prompt)
        _, jobs = await client.ask("GET", "/api/jobs")
    errors = [data for kind, data in events if kind == "execution_error"]
    assert [(error["node_id"], error["prompt_id"]) for error in errors] == [("9", prompt_id)]
    assert entry["status"]["status_str"] == "error"
    assert [(row["id"], row["status"]) for row in jobs["jobs"]] == [(prompt_id, "failed")]


async def test_a_job_in_parts_survives_the_front_and_what_had_ended_is_not_run_again(tmp_path: Path) -> None:
    fakes = (FakeComfy(), FakeComfy())
    prompt = refined(10, 30)
    async with serving(*fakes):
        async with splitting(tmp_path / "split", *fakes) as client:
            for fake in fakes:
                fake.stuck = True
            _, answer = await client.submit(prompt)
            await eventually(lambda: _busy(fakes, 1))
            maker = next(fake for fake in fakes if fake.received)
            maker.stuck = False
            await eventually(lambda: _busy(fakes, 2))
            await eventually(lambda: _is_running(client, 1))
        async with splitting(tmp_path / "split", *fakes) as client:
            _, queue = await client.ask("GET", "/queue")
            for fake in fakes:
                fake.stuck = False
            entry = await client.ended(answer["prompt_id"])
            found = await pictures(client, entry)
    assert [row[1] for row in queue["queue_running"]] == [answer["prompt_id"]]
    assert found == await whole(tmp_path / "whole", prompt)
    assert [len(fake.received) for fake in fakes] == [1, 1], "each part ran once"
    assert list((tmp_path / "split" / "latents").iterdir()) == []


async def test_an_address_of_a_part_is_not_known_to_clients(tmp_path: Path) -> None:
    fakes = (FakeComfy(), FakeComfy())
    async with serving(*fakes), splitting(tmp_path, *fakes) as client:
        for fake in fakes:
            fake.stuck = True
        _, answer = await client.submit(branches(20, 20))
        await eventually(lambda: _busy(fakes, 2))
        part = next(fake for fake in fakes if fake.received).received[0]
        status, _ = await client.ask("GET", f"/api/jobs/{part}")
        cancelled, _ = await client.ask("POST", f"/api/jobs/{part}/cancel")
        for fake in fakes:
            fake.stuck = False
        entry = await client.ended(answer["prompt_id"])
    assert part != answer["prompt_id"]
    assert (status, cancelled) == (404, 404)
    assert entry["status"]["status_str"] == "success"
