"""The front as its clients see it, over servers that speak the recorded protocol."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from swarmx.gateway.keys import Keyring
from tests.compat.comfyui.fake import PNG, FakeComfy, serving
from tests.compat.comfyui.fake_nodes import graph
from tests.compat.comfyui.fronts import Client, eventually, front, until_end

pytestmark = pytest.mark.process


async def test_a_job_runs_and_its_client_hears_what_a_server_would_say(tmp_path: Path) -> None:
    fake = FakeComfy()
    async with serving(fake), front(tmp_path, fake) as client:
        prompt_id, events, entry = await client.run(graph())
        kinds = [kind for kind, _ in events if kind not in ("status", "progress_state")]
        image = entry["outputs"]["9"]["images"][0]
        async with client.session.get(f"{client.url}/view", params=image) as response:
            picture = await response.read()
    assert kinds[:2] == ["execution_start", "execution_cached"]
    assert kinds.count("progress") == 4
    assert kinds[-3:] == ["executed", "execution_success", "executing"]
    assert image["filename"].startswith("s1~tiny_")
    assert picture.startswith(PNG)
    assert entry["status"]["status_str"] == "success"
    assert entry["prompt"][1] == prompt_id
    assert entry["swarmx"]["server"] == "s1"


async def test_without_a_key_nobody_gets_in_and_a_websocket_may_bring_it_in_its_address(tmp_path: Path) -> None:
    fake, keys = FakeComfy(), Keyring(tmp_path / "keys.json")
    token = keys.add("ann", "client", "a")
    async with serving(fake), front(tmp_path, fake, keys=keys) as client:
        for method, path in (("POST", "/prompt"), ("GET", "/object_info"), ("GET", "/ws"), ("GET", "/api/jobs")):
            status, answer = await client.ask(method, path)
            assert (status, answer["error"]["type"]) == (401, "unauthorized")
        async with client.session.ws_connect(f"{client.url}/ws?clientId=x&token={token}") as socket:
            assert (await socket.receive_json())["type"] == "status"
        basic = {"Authorization": aiohttp.encode_basic_auth("any", token)}
        async with client.session.get(f"{client.url}/queue", headers=basic) as response:
            assert response.status == 200


async def test_a_page_of_another_site_may_not_ask(tmp_path: Path) -> None:
    fake = FakeComfy()
    async with serving(fake), front(tmp_path, fake) as client:
        for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
            async with client.session.get(f"{client.url}/queue", headers=headers) as response:
                assert response.status == 403, headers


async def test_tenants_see_and_stop_their_own_jobs_only(tmp_path: Path) -> None:
    fake, keys = FakeComfy(step_s=0.01), Keyring(tmp_path / "keys.json")
    tokens = {name: keys.add(name, "client", name) for name in ("ann", "bob")}
    async with serving(fake), front(tmp_path, fake, keys=keys) as client:
        ann, bob = (Client(client.url, client.session, tokens[name]) for name in ("ann", "bob"))
        prompt_id, _, entry = await ann.run(graph(steps=2))
        image = entry["outputs"]["9"]["images"][0]
        _, waiting = await ann.submit(graph(2, steps=50))
        assert await bob.history(prompt_id) is None
        assert (await bob.ask("GET", "/queue"))[1] == {"queue_running": [], "queue_pending": []}
        assert (await bob.ask("GET", "/prompt"))[1]["exec_info"]["queue_remaining"] == 0
        assert (await bob.ask("GET", f"/view?filename={image['filename']}&type=output"))[0] == 404
        assert (await ann.ask("GET", f"/view?filename={image['filename']}&type=output"))[0] == 200
        assert (await bob.ask("POST", f"/api/jobs/{waiting['prompt_id']}/cancel"))[0] == 404
        await bob.ask("POST", "/interrupt", {})
        await bob.ask("POST", "/queue", {"clear": True})
        loads = {"1": {"class_type": "LoadImage", "inputs": {"image": f"{image['filename']} [output]"}}}
        loads["2"] = {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}
        assert (await bob.submit(loads))[0] == 400
        entry = await ann.ended(waiting["prompt_id"])
    assert entry["status"]["status_str"] == "success"


async def test_an_upload_is_kept_by_content_and_copied_to_the_server_that_needs_it(tmp_path: Path) -> None:
    fakes = (FakeComfy(), FakeComfy())
    async with serving(*fakes), front(tmp_path, *fakes) as client:

        async def upload(data: bytes, **more: str) -> str:
            form = aiohttp.FormData()
            form.add_field("image", data, filename="cat.png", content_type="image/png")
            for name, value in more.items():
                form.add_field(name, value)
            async with client.session.post(f"{client.url}/upload/image", data=form) as response:
                assert response.status == 200, await response.text()
                return str((await response.json())["name"])

        assert await upload(b"one") == "cat.png"
        assert await upload(b"one") == "cat.png"
        assert await upload(b"two") == "cat (1).png"
        assert await upload(b"three", overwrite="true") == "cat.png"
        loads = {
            "1": {"class_type": "LoadImage", "inputs": {"image": "cat (1).png"}},
            "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
        }
        _, _, entry = await client.run(loads)
        _, _, again = await client.run({**loads, "3": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}})
        status, _ = await client.ask("GET", "/view?filename=cat.png&type=input")
        copies = [name for fake in fakes for name in fake.uploads]
        _, info = await client.ask("GET", "/object_info/LoadImage")
        missing = {**loads, "1": {"class_type": "LoadImage", "inputs": {"image": "dog.png"}}}
        refused = await client.submit(missing)
    assert entry["status"]["status_str"] == again["status"]["status_str"] == "success"
    assert entry["prompt"][2]["1"]["inputs"]["image"] == "cat (1).png"
    assert copies
    assert all(name.startswith("swarmx-") for name in copies)
    assert info["LoadImage"]["input"]["required"]["image"][0] == [], "files of one tenant are not listed for all"
    assert status == 200
    assert refused[0] == 400


@pytest.mark.parametrize("name", ["../x.png", "a/b.png", "s1~x.png", ".."])
async def test_an_upload_with_an_odd_name_is_refused(tmp_path: Path, name: str) -> None:
    fake = FakeComfy()
    async with serving(fake), front(tmp_path, fake) as client:
        form = aiohttp.FormData(quote_fields=False)
        form.add_field("image", b"x", filename=name, content_type="image/png")
        async with client.session.post(f"{client.url}/upload/image", data=form) as response:
            assert response.status == 400


async def test_a_job_goes_to_the_server_that_has_its_model(tmp_path: Path) -> None:
    fakes = (FakeComfy(("small.safetensors",)), FakeComfy(("large.safetensors",)))
    async with serving(*fakes), front(tmp_path, *fakes) as client:
        _, _, small = await client.run(graph(model="small.safetensors"))
        _, _, large = await client.run(graph(model="large.safetensors"))
        both = {**graph(model="small.safetensors")}
        both |= {f"1{k}": v for k, v in graph(model="large.safetensors").items()}
        for node in list(both):
            for name, value in both[node]["inputs"].items():
                if node.startswith("1") and isinstance(value, list):
                    both[node]["inputs"][name] = [f"1{value[0]}", value[1]]
        status, answer = await client.submit(both)
        _, models = await client.ask("GET", "/models/checkpoints")
    assert (small["swarmx"]["server"], large["swarmx"]["server"]) == ("s1", "s2")
    assert (status, answer["error"]["type"]) == (400, "no_server_has_all")
    assert "s1 lacks" in answer["error"]["details"]
    assert sorted(models) == ["large.safetensors", "small.safetensors"]


async def test_an_output_whose_model_nobody_has_does_not_keep_others_from_being_made(tmp_path: Path) -> None:
    fakes = (FakeComfy(("one.safetensors",)), FakeComfy(("two.safetensors",)))
    both = graph(model="two.safetensors")
    both["14"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "absent.safetensors"}}
    both["18"] = {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["14", 2]}}
    both["19"] = {"class_type": "SaveImage", "inputs": {"images": ["18", 0], "filename_prefix": "b"}}
    async with serving(*fakes):
        async with front(tmp_path, *fakes) as client:
            _, _, entry = await client.run(both)
            fakes[1].stuck = True
            running = (await client.submit(graph(2, model="two.safetensors")))[1]["prompt_id"]
            await eventually(lambda: _has(fakes[1], running))
            both["3"]["inputs"]["seed"] = 3
            status, answer = await client.submit(both)
        async with front(tmp_path, *fakes) as client:
            fakes[1].stuck = False
            waited = await client.ended(answer["prompt_id"])
    assert (status, answer["node_errors"].keys()) == (200, {"14"})
    assert [(row["swarmx"]["server"], row["outputs"].keys()) for row in (entry, waited)] == [("s2", {"9"})] * 2


async def test_a_front_that_begins_anew_knows_what_a_server_has_that_is_away(tmp_path: Path) -> None:
    fakes = (FakeComfy(("one.safetensors",)), FakeComfy(("two.safetensors",)))
    async with serving(*fakes):
        async with front(tmp_path, *fakes):
            port = fakes[1].port
        await fakes[1].die()
        async with front(tmp_path, *fakes, wait=False) as client:
            status, answer = await client.submit(graph(model="two.safetensors"))
            nobody, _ = await client.submit(graph(model="three.safetensors"))
            await fakes[1].start(port)
            entry = await client.ended(answer["prompt_id"])
        (tmp_path / "object_info.json").write_bytes(b'{"s1": 3}')
        async with front(tmp_path, *fakes) as client:
            _, _, after = await client.run(graph(2, model="one.safetensors"))
    assert (status, nobody) == (200, 400)
    assert [row["swarmx"]["server"] for row in (entry, after)] == ["s2", "s1"]


async def test_a_custom_node_that_judges_its_values_itself_is_asked_before_the_client_is_answered(
    tmp_path: Path,
) -> None:
    fake = FakeComfy(custom=True)

    def picky(value: int) -> dict[str, Any]:
        return {
            "1": {"class_type": "Picky", "inputs": {"value": value}},
            "9": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
        }

    async with serving(fake), front(tmp_path, fake) as client:
        status, answer = await client.submit(picky(7))
        assert (status, answer["node_errors"]["1"]["errors"][0]["type"]) == (400, "custom_validation_failed")
        _, queue = await client.ask("GET", "/queue")
        assert queue == {"queue_running": [], "queue_pending": []}
        _, _, entry = await client.run(picky(3))
    assert entry["status"]["status_str"] == "success"


async def test_a_client_that_names_itself_in_extra_data_only_hears_of_its_job(tmp_path: Path) -> None:
    fake = FakeComfy()
    async with serving(fake), front(tmp_path, fake) as client, client.socket() as socket:
        wanted = {"prompt": graph(), "extra_data": {"client_id": client.client_id}}
        _, answer = await client.ask("POST", "/prompt", wanted)
        events = await until_end(socket, answer["prompt_id"])
        odd, _ = await client.ask("POST", "/prompt", {"prompt": graph(2), "extra_data": {"client_id": [1]}})
    assert "executed" in [kind for kind, _ in events]
    assert odd == 200


async def test_a_page_of_history_beyond_all_of_it_is_empty(tmp_path: Path) -> None:
    fake = FakeComfy()
    async with serving(fake), front(tmp_path, fake) as client:
        await client.run(graph())
        beyond = [await client.ask("GET", f"/history?offset={10**20}{more}") for more in ("", "&max_items=5")]
        within = [await client.ask("GET", f"/history?{name}=-{10**20}") for name in ("offset", "max_items")]
        _, all_of_it = await client.ask("GET", f"/history?max_items={10**20}")
    assert beyond == [(200, {})] * 2
    assert [status for status, _ in within] == [200, 200]
    assert len(all_of_it) == 1


async def test_node_classes_that_are_not_allowed_do_not_exist(tmp_path: Path) -> None:
    fake = FakeComfy()
    async with serving(fake), front(tmp_path, fake, allow=("Empty*", "SaveImage")) as client:
        status, answer = await client.submit(graph())
        _, info = await client.ask("GET", "/object_info")
    assert (status, answer["error"]["type"]) == (400, "invalid_prompt")
    assert set(info) == {"EmptyImage", "EmptyLatentImage", "SaveImage"}


async def test_routes_that_change_a_server_are_blocked_and_never_reach_it(tmp_path: Path) -> None:
    fake = FakeComfy()
    async with serving(fake), front(tmp_path, fake) as client:
        before = len(fake.requests)
        for path in ("/manager/queue/install", "/customnode/getlist", "/internal/logs", "/userdata/x", "/v2/manager/x"):
            for prefix in ("", "/api"):
                status, answer = await client.ask("POST", prefix + path, {})
                assert (status, answer["error"]["type"]) == (403, "blocked")
        assert (await client.ask("GET", "/no/such/thing"))[0] == 404
        reached = [r for r in fake.requests[before:] if "manager" in r or "internal" in r or "such" in r]
    assert reached == []


async def test_higher_priorities_go_first_as_far_as_a_tenant_may_have_them(tmp_path: Path) -> None:
    fake, keys = FakeComfy(), Keyring(tmp_path / "keys.json")
    tokens = {name: keys.add(name, "client", name) for name in ("ann", "bob")}
    tenants = {"ann": {"priority": 5}}
    async with serving(fake), front(tmp_path, fake, keys=keys, tenants=tenants) as client:
        ann, bob = (Client(client.url, client.session, tokens[name]) for name in ("ann", "bob"))
        fake.stuck = True
        first = (await bob.submit(graph(1)))[1]["prompt_id"]
        await eventually(lambda: _has(fake, first))
        urgent = {"extra_data": {"swarmx": {"priority": 9}}}
        second = (await bob.submit(graph(2), **urgent))[1]["prompt_id"]
        third = (await ann.submit(graph(3), **urgent))[1]["prompt_id"]
        fourth = (await bob.submit(graph(4), front=True))[1]["prompt_id"]
        fake.stuck = False
        for prompt_id in (second, fourth):
            await bob.ended(prompt_id)
    assert fake.received == [first, third, fourth, second]


async def _has(fake: FakeComfy, prompt_id: str) -> bool:
    return prompt_id in fake.received


async def test_the_jobs_api_lists_filters_and_cancels(tmp_path: Path) -> None:
    fake = FakeComfy(step_s=0.01)
    async with serving(fake), front(tmp_path, fake) as client:
        done, _, _ = await client.run(graph(1))
        running = (await client.submit(graph(2, steps=5000)))[1]["prompt_id"]
        waiting = (await client.submit(graph(3)))[1]["prompt_id"]
        await eventually(lambda: _has(fake, running))
        _, page = await client.ask("GET", "/api/jobs")
        _, some = await client.ask("GET", "/api/jobs?status=pending,completed&limit=1")
        assert (await client.ask("GET", "/api/jobs?status=odd"))[0] == 400
        assert (await client.ask("GET", f"/api/jobs/{uuid.uuid4()}"))[0] == 404
        _, one = await client.ask("GET", f"/api/jobs/{done}")
        for prompt_id in (running, waiting):
            assert (await client.ask("POST", f"/api/jobs/{prompt_id}/cancel"))[1] == {"cancelled": True}

        async def states() -> dict[str, str] | None:
            _, found = await client.ask("GET", "/api/jobs")
            by_id = {row["id"]: row["status"] for row in found["jobs"]}
            return by_id if "in_progress" not in by_id.values() else None

        after = await eventually(states)
    assert {row["id"]: row["status"] for row in page["jobs"]} == {
        done: "completed", running: "in_progress", waiting: "pending"
    }  # fmt: skip
    assert some["pagination"] == {"offset": 0, "limit": 1, "total": 2, "has_more": True}
    assert one["outputs"]["9"]["images"]
    assert one["outputs_count"] == 1
    assert after == {done: "completed", running: "cancelled", waiting: "cancelled"}


async def test_previews_come_with_metadata_to_those_who_asked_for_it(tmp_path: Path) -> None:
    fake = FakeComfy(step_s=0.005)
    fake.previews = True
    async with serving(fake), front(tmp_path, fake) as client:
        _, events, _ = await client.run(graph(1))
        plain = [data["frame"] for kind, data in events if kind == "binary"]
        async with client.socket() as socket:
            await socket.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
            _, answer = await client.submit(graph(2))
            told = await until_end(socket, answer["prompt_id"])
        full = [data["frame"] for kind, data in told if kind == "binary"]
    assert plain
    assert {frame[:8] for frame in plain} == {bytes([0, 0, 0, 1, 0, 0, 0, 2])}
    assert all(frame.endswith(PNG) for frame in plain)
    assert {frame[:4] for frame in full} == {bytes([0, 0, 0, 4])}


async def test_why_a_job_went_where_it_went_can_be_read(tmp_path: Path) -> None:
    fakes = (FakeComfy(), FakeComfy())
    async with serving(*fakes), front(tmp_path, *fakes) as client:
        prompt_id, _, entry = await client.run(graph())
        _, why = await client.ask("GET", f"/swarmx/why/{prompt_id}")
        _, servers = await client.ask("GET", "/swarmx/servers")
    decision = why["decisions"][0]["decision"]
    assert decision["policy"] == "marginal"
    assert decision["replica_id"] == entry["swarmx"]["server"]
    assert decision["candidates"]["total"] == 2
    resident = {row["name"]: row["resident"] for row in servers["servers"]}
    assert resident[entry["swarmx"]["server"]] == ["tiny.safetensors"]


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"{", "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b"[]", "no_prompt"),
        (b'{"prompt": []}', "invalid_prompt"),
        (b'{"prompt": {"1": 2}}', "invalid_prompt"),
        (b'{"prompt": {"1": {"class_type": "SaveImage", "inputs": []}}}', "invalid_prompt"),
        (b'{"prompt": {}, "prompt_id": "MINE"}', "invalid_prompt_id"),
        (b'{"prompt": {}, "prompt_id": "0A0A0A0A-0A0A-0A0A-0A0A-0A0A0A0A0A0A"}', "invalid_prompt_id"),
        (b'{"prompt": {}, "number": "first"}', "invalid_prompt"),
        (b'{"prompt": {}, "number": 1' + b"0" * 400 + b"}", "invalid_prompt"),
        (b'{"prompt": {}, "extra_data": 3}', "invalid_prompt"),
        (b'{"prompt": {}, "partial_execution_targets": "9"}', "invalid_prompt"),
    ],
)
async def test_a_request_that_is_none_is_refused_by_name(tmp_path: Path, body: bytes, kind: str) -> None:
    fake = FakeComfy()
    async with (
        serving(fake),
        front(tmp_path, fake) as client,
        client.session.post(f"{client.url}/prompt", data=body) as response,
    ):
        answer = await response.json()
    assert (response.status, answer["error"]["type"]) == (400, kind)
