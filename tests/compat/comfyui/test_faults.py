"""Servers that die, hang, forget and stutter, clients that come and go: a job ends once, whatever happens."""

from __future__ import annotations

import asyncio
import sqlite3
import uuid
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from swarmx.compat.comfyui import store
from swarmx.compat.comfyui.jobs import Job
from swarmx.compat.comfyui.store import JobStore
from swarmx.core import failpoints
from tests.compat.comfyui.fake import FakeComfy, serving
from tests.compat.comfyui.fake_nodes import graph, object_info
from tests.compat.comfyui.fronts import IMPATIENT, Client, eventually, front, until_end

pytestmark = pytest.mark.process


def _server_of(entry: dict) -> str:  # type: ignore[type-arg]
    return str(entry["swarmx"]["server"])


async def _started_on(fakes: tuple[FakeComfy, ...], prompt_id: str) -> FakeComfy:
    return await eventually(lambda: _with(fakes, prompt_id))  # type: ignore[no-any-return]


async def _with(fakes: tuple[FakeComfy, ...], prompt_id: str) -> FakeComfy | None:
    return next((fake for fake in fakes if prompt_id in fake.received), None)


async def test_a_job_of_a_server_that_dies_runs_elsewhere_once(tmp_path: Path) -> None:
    fakes = (FakeComfy(step_s=0.02), FakeComfy(step_s=0.02))
    async with serving(*fakes), front(tmp_path, *fakes) as client, client.socket() as socket:
        _, answer = await client.submit(graph(steps=30))
        first = await _started_on(fakes, answer["prompt_id"])
        await first.die()
        events = await until_end(socket, answer["prompt_id"])
        entry = await client.history(answer["prompt_id"])
        other = fakes[1] if first is fakes[0] else fakes[0]
        await first.start()
    assert entry["status"]["status_str"] == "success"
    assert entry["swarmx"]["attempts"] == 2
    assert other.received == [answer["prompt_id"]]
    assert [kind for kind, _ in events].count("execution_success") == 1
    assert sum(kind == "executing" and data["node"] is None for kind, data in events) == 1


async def test_a_job_that_kills_every_server_is_given_up_after_the_attempts_it_may_have(tmp_path: Path) -> None:
    fakes = tuple(FakeComfy(step_s=0.02) for _ in range(3))
    async with serving(*fakes), front(tmp_path, *fakes) as client, client.socket() as socket:
        _, answer = await client.submit(graph(steps=50))
        for _ in range(2):
            live = tuple(fake for fake in fakes if not fake.dead)
            await (await _started_on(live, answer["prompt_id"])).die()
        events = await until_end(socket, answer["prompt_id"])
        entry = await client.history(answer["prompt_id"])
    assert entry["status"]["status_str"] == "error"
    told = next(data for kind, data in events if kind == "execution_error")
    assert told["exception_type"] == "swarmx.ServerLost"
    assert sum(answer["prompt_id"] in fake.received for fake in fakes) == 2


async def test_servers_that_a_job_never_came_to_are_no_attempts(tmp_path: Path) -> None:
    fakes = tuple(FakeComfy() for _ in range(4))
    async with serving(*fakes), front(tmp_path, *fakes, attempts=1, refresh_s=60.0, poll_s=1.0) as client:
        for fake in fakes[:3]:
            await fake.die()
        entry = await client.ended((await client.submit(graph()))[1]["prompt_id"])
        await fakes[3].die()
        _, answer = await client.submit(graph(2))
        await eventually(lambda: _is_down(client))
        for fake in fakes:
            await fake.start(fake.port)
        later = await client.ended(answer["prompt_id"])
    assert [entry["status"]["status_str"], later["status"]["status_str"]] == ["success"] * 2
    assert [entry["swarmx"]["attempts"], later["swarmx"]["attempts"]] == [1, 1]


async def test_a_server_that_dies_while_it_has_nothing_to_do_is_missed_at_once(tmp_path: Path) -> None:
    fake = FakeComfy()
    async with serving(fake), front(tmp_path, fake, refresh_s=3600.0) as client:
        await client.run(graph())  # its events are heard
        await fake.die()
        await eventually(lambda: _is_down(client))


async def test_a_job_of_a_server_that_hangs_runs_elsewhere_and_is_stopped_there_later(tmp_path: Path) -> None:
    fakes = (FakeComfy(step_s=0.02), FakeComfy(step_s=0.02))
    async with serving(*fakes), front(tmp_path, *fakes, **IMPATIENT) as client:
        _, answer = await client.submit(graph(steps=5000))
        prompt_id = answer["prompt_id"]
        first = await _started_on(fakes, prompt_id)
        other = fakes[1] if first is fakes[0] else fakes[0]
        other.step_s = 0.0
        first.hangs = first.mute = True
        entry = await client.ended(prompt_id)
        first.hangs = first.mute = False

        async def stopped() -> bool:
            async with client.session.get(f"{first.url}/queue") as response:
                return not (await response.json())["queue_running"]

        await eventually(stopped)
        again = await client.history(prompt_id)
    assert entry["status"]["status_str"] == "success"
    assert _server_of(entry) == ("s2" if other is fakes[1] else "s1")
    assert again == entry


async def test_a_job_that_makes_no_progress_is_stopped_and_run_elsewhere(tmp_path: Path) -> None:
    fakes = (FakeComfy(step_s=0.01), FakeComfy(step_s=0.01))
    async with serving(*fakes), front(tmp_path, *fakes, stall_s=1.0) as client:
        for fake in fakes:
            fake.stuck = True
        _, answer = await client.submit(graph(steps=3))
        first = await _started_on(fakes, answer["prompt_id"])
        for fake in fakes:
            fake.stuck = fake is first
        entry = await client.ended(answer["prompt_id"])
    assert entry["status"]["status_str"] == "success"
    assert entry["swarmx"]["attempts"] == 2


async def test_a_job_that_is_lost_at_the_only_server_runs_there_again_once_the_first_attempt_has_ended(
    tmp_path: Path,
) -> None:
    fake = FakeComfy(step_s=0.01)
    async with serving(fake), front(tmp_path, fake, stall_s=1.0) as client:
        fake.stuck = True
        _, answer = await client.submit(graph(steps=3))
        await eventually(lambda: _asked(fake, "POST /interrupt"))
        fake.stuck = False
        entry = await client.ended(answer["prompt_id"])
    assert entry["status"]["status_str"] == "success"
    assert fake.received == [answer["prompt_id"]] * 2


class _SlowToTell(FakeComfy):
    """Says what nodes it has while the gate is open."""

    def __init__(self) -> None:
        super().__init__(step_s=0.01)
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked = 0

    async def _object_info(self, request: web.Request) -> web.Response:
        self.asked += 1
        await self.gate.wait()
        return await super()._object_info(request)


async def test_a_job_that_is_lost_while_its_server_is_asked_does_not_go_there_before_the_first_attempt_has_ended(
    tmp_path: Path,
) -> None:
    fake = _SlowToTell()
    async with serving(fake), front(tmp_path, fake, stall_s=1.0, refresh_s=0.1, timeout_s=60.0) as client:
        fake.stuck = True
        _, answer = await client.submit(graph(steps=3))
        await _started_on((fake,), answer["prompt_id"])
        fake.gate.clear()
        asked = fake.asked
        await eventually(lambda: _is(fake.asked > asked))
        await eventually(lambda: _queued(client, answer["prompt_id"]))
        fake.gate.set()
        await eventually(lambda: _asked(fake, "POST /interrupt"))
        fake.stuck = False
        entry = await client.ended(answer["prompt_id"])
    assert entry["status"]["status_str"] == "success"
    assert fake.received == [answer["prompt_id"]] * 2


async def _is(found: bool) -> bool:
    return found


async def _queued(client: Client, prompt_id: str) -> bool:
    async with client.session.get(f"{client.url}/queue") as response:
        return any(row[1] == prompt_id for row in (await response.json())["queue_pending"])


async def _asked(fake: FakeComfy, what: str) -> bool:
    return what in fake.requests


async def test_a_job_that_is_cancelled_often_is_stopped_once(tmp_path: Path) -> None:
    fake = FakeComfy(step_s=0.02)
    async with serving(fake), front(tmp_path, fake) as client:
        fake.stuck = True
        _, answer = await client.submit(graph())
        await _started_on((fake,), answer["prompt_id"])
        _, cancelled = await client.ask("POST", "/api/jobs/cancel", {"job_ids": [answer["prompt_id"]] * 1000})
        await client.ended(answer["prompt_id"])
    assert cancelled["job_ids"] == [answer["prompt_id"]]
    assert fake.requests.count("POST /queue") <= 2


class _Gated(FakeComfy):
    """Takes files and graphs when the gate is open."""

    def __init__(self) -> None:
        super().__init__(step_s=0.02)
        self.gate = asyncio.Event()

    async def _upload(self, request: web.Request) -> web.Response:
        await self.gate.wait()
        return await super()._upload(request)

    async def _prompt(self, request: web.Request) -> web.Response:
        await self.gate.wait()
        return await super()._prompt(request)


@pytest.mark.parametrize("with_file", [True, False])
async def test_a_job_that_is_cancelled_on_its_way_to_a_server_does_not_run(tmp_path: Path, with_file: bool) -> None:
    fake = _Gated()
    loads = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "cat.png"}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    async with serving(fake), front(tmp_path, fake) as client:
        form = aiohttp.FormData()
        form.add_field("image", b"cat", filename="cat.png")
        await client.session.post(f"{client.url}/upload/image", data=form)
        _, answer = await client.submit(loads if with_file else graph(steps=500))
        await eventually(lambda: _asked(fake, "POST /upload/image" if with_file else "POST /prompt"))
        cancelled = await client.ask("POST", f"/api/jobs/{answer['prompt_id']}/cancel")
        fake.gate.set()

        async def state() -> str:
            _, job = await client.ask("GET", f"/api/jobs/{answer['prompt_id']}")
            return "" if job["status"] == "in_progress" else str(job["status"])

        ended = await eventually(state)
    assert cancelled[1] == {"cancelled": True}
    assert ended == "cancelled"
    assert fake.received == ([] if with_file else [answer["prompt_id"]])


async def test_the_end_of_a_job_outlasts_a_store_that_cannot_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, refused = FakeComfy(step_s=0.01), []

    def full(point: str) -> None:
        if point == "lane.commit":
            refused.append(point)
            raise sqlite3.OperationalError("the disk is full")

    async with serving(fake), front(tmp_path, fake) as client:
        _, answer = await client.submit(graph(steps=20))
        await _started_on((fake,), answer["prompt_id"])
        monkeypatch.setattr(failpoints, "hit", full)
        await eventually(lambda: _refused(refused))
        monkeypatch.undo()
        entry = await client.ended(answer["prompt_id"])
    assert entry["status"]["status_str"] == "success"
    assert fake.received == [answer["prompt_id"]]


async def _refused(writes: list[str]) -> bool:
    return bool(writes)


async def test_a_front_that_stops_hangs_up_on_its_clients(tmp_path: Path) -> None:
    fake = FakeComfy()
    async with serving(fake), aiohttp.ClientSession() as session:
        async with front(tmp_path, fake) as client:
            socket = await session.ws_connect(f"{client.url}/ws?clientId=x")
            reading = asyncio.create_task(_to_its_end(socket))
        assert await reading == aiohttp.WSCloseCode.GOING_AWAY


async def _to_its_end(socket: aiohttp.ClientWebSocketResponse) -> int | None:
    async for _ in socket:
        pass
    return socket.close_code


async def test_half_a_websocket_frame_loses_events_and_nothing_else(tmp_path: Path) -> None:
    fake = FakeComfy(step_s=0.02)
    async with serving(fake), front(tmp_path, fake) as client:
        fake.half_frame = True
        _, events, entry = await client.run(graph(steps=20))
    assert not fake.half_frame
    assert entry["status"]["status_str"] == "success"
    assert entry["swarmx"]["attempts"] == 1
    assert events[-1][1]["node"] is None


async def test_a_server_without_events_is_polled(tmp_path: Path) -> None:
    fake = FakeComfy(step_s=0.002)
    fake.mute = True
    async with serving(fake), front(tmp_path, fake) as client:
        _, _, entry = await client.run(graph())
    assert entry["status"]["status_str"] == "success"


async def test_a_server_that_restarts_has_forgotten_its_job_which_runs_again(tmp_path: Path) -> None:
    fake = FakeComfy(step_s=0.02)
    async with serving(fake), front(tmp_path, fake, refused_after_s=30.0) as client:
        _, answer = await client.submit(graph(steps=30))
        await _started_on((fake,), answer["prompt_id"])
        await fake.die()
        fake.step_s = 0.0
        await fake.start(fake.port)
        entry = await client.ended(answer["prompt_id"])
    assert entry["status"]["status_str"] == "success"
    assert entry["swarmx"]["attempts"] == 2


async def test_jobs_survive_the_front_those_that_ran_are_found_again(tmp_path: Path) -> None:
    fake = FakeComfy(step_s=0.02)
    async with serving(fake):
        async with front(tmp_path, fake) as client:
            ids = [(await client.submit(graph(seed, steps=20)))[1]["prompt_id"] for seed in range(3)]
            await _started_on((fake,), ids[0])
        async with front(tmp_path, fake) as client:
            entries = [await client.ended(prompt_id) for prompt_id in ids]
    assert [entry["status"]["status_str"] for entry in entries] == ["success"] * 3
    assert sorted(fake.received) == sorted(ids), "each ran once"


async def test_a_job_that_ended_while_the_front_was_down_is_not_run_again(tmp_path: Path) -> None:
    fake = FakeComfy(step_s=0.01)
    async with serving(fake):
        async with front(tmp_path, fake) as client:
            _, answer = await client.submit(graph(steps=20))
            await _started_on((fake,), answer["prompt_id"])
        async with aiohttp.ClientSession() as session:
            await Client(fake.url, session).ended(answer["prompt_id"])
        async with front(tmp_path, fake) as client:
            entry = await client.ended(answer["prompt_id"])
    assert entry["status"]["status_str"] == "success"
    assert fake.received == [answer["prompt_id"]]


async def test_a_client_that_comes_back_under_its_id_hears_the_rest(tmp_path: Path) -> None:
    fake = FakeComfy(step_s=0.02)
    async with serving(fake), front(tmp_path, fake) as client:
        fake.stuck = True
        old = await client.socket()
        _, answer = await client.submit(graph(steps=40))
        await _started_on((fake,), answer["prompt_id"])
        async with client.socket() as new:
            await old.close()
            fake.stuck = False
            events = await until_end(new, answer["prompt_id"])
    kinds = [kind for kind, _ in events]
    assert "progress" in kinds
    assert "executed" in kinds


async def test_a_client_that_goes_away_gets_its_pictures_later(tmp_path: Path) -> None:
    fake = FakeComfy(step_s=0.01)
    async with serving(fake), front(tmp_path, fake) as client:
        async with client.socket():
            _, answer = await client.submit(graph(steps=10))
        entry = await client.ended(answer["prompt_id"])
    assert entry["outputs"]["9"]["images"]


async def test_a_graph_sent_twice_under_one_id_is_one_job(tmp_path: Path) -> None:
    fake = FakeComfy(step_s=0.01)
    async with serving(fake), front(tmp_path, fake) as client:
        prompt_id = str(uuid.uuid4())
        answers = await asyncio.gather(*(client.submit(graph(), prompt_id=prompt_id) for _ in range(5)))
        await client.ended(prompt_id)
        again = await client.submit(graph(), prompt_id=prompt_id)
        other = await client.submit(graph(2), prompt_id=prompt_id)
    assert [status for status, _ in answers] == [200] * 5
    assert again[0] == 200
    assert (other[0], other[1]["error"]["type"]) == (400, "invalid_prompt_id")
    assert fake.received == [prompt_id]


async def test_with_no_server_up_a_job_is_not_taken_or_waits_for_one(tmp_path: Path) -> None:
    fake = FakeComfy()
    async with serving(fake), front(tmp_path, fake) as client:
        await fake.die()
        await eventually(lambda: _is_down(client))
        status, answer = await client.submit(graph())
        await fake.start(fake.port)
        entry = await client.ended(answer["prompt_id"])
    assert status == 200, "what the server can run is known"
    assert entry["status"]["status_str"] == "success"
    async with front(tmp_path / "other", fake, wait=False) as client:
        status, answer = await client.submit(graph())
    assert (status, answer["error"]["type"]) == (503, "no_server")


async def _is_down(client: Client) -> bool:
    return (await client.ask("GET", "/readyz"))[0] == 503


async def test_ten_thousand_jobs_wait_through_a_restart_and_the_next_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = JobStore(tmp_path)
    await earlier.open()
    await asyncio.gather(*(earlier.accept(_small(seq)) for seq in range(1, 10_001)))
    await earlier.close()
    fake = FakeComfy(step_s=0.01)
    tenants = {"default": {"max_waiting": 9_990}}
    async with serving(fake), front(tmp_path, fake, tenants=tenants) as client:
        await eventually(lambda: _with((fake,), _small(1).prompt_id))
        status, refused = await client.submit(graph(steps=1))
        async with client.session.post(f"{client.url}/prompt", json={"prompt": graph()}) as response:
            retry = response.headers["Retry-After"]
        read, whole = [], store._read
        monkeypatch.setattr(store, "_read", lambda row: read.append(1) or whole(row))
        _, page = await client.ask("GET", "/api/jobs?limit=20&status=pending&sort_order=asc")
        await client.ended(_small(2).prompt_id)
        await client.ask("POST", "/queue", {"clear": True})
        _, after = await client.ask("GET", "/prompt")
    assert (status, refused["error"]["type"]) == (429, "queue_full")
    assert int(retry) >= 1
    assert page["pagination"]["total"] >= 9_990
    assert len(page["jobs"]) == 20
    assert len(read) <= 20, "graphs of no other job are read for a page"
    assert fake.received[:2] == [_small(1).prompt_id, _small(2).prompt_id]
    assert after["exec_info"]["queue_remaining"] <= 1


def _small(seq: int) -> Job:
    return Job(
        prompt_id=str(uuid.UUID(int=seq)),
        tenant="default",
        client_id=None,
        number=float(seq),
        seq=seq,
        priority=0,
        graph=graph(seq, steps=10),
        extra={},
        outputs=("9",),
        files=frozenset(),
        created_s=float(seq),
    )


async def test_a_server_that_has_lost_the_model_unseen_does_not_keep_a_job_from_another(tmp_path: Path) -> None:
    fakes = (FakeComfy(), FakeComfy())
    async with serving(*fakes), front(tmp_path, *fakes, refresh_s=60.0) as client:
        fakes[0].info = object_info([])
        ids = [(await client.submit(graph(seed)))[1]["prompt_id"] for seed in range(4)]
        entries = [await client.ended(prompt_id) for prompt_id in ids]
        status, refused = await client.submit(graph(9, model="nobody-has.safetensors"))
    assert [entry["status"]["status_str"] for entry in entries] == ["success"] * 4
    assert {_server_of(entry) for entry in entries} == {"s2"}
    assert (status, refused["node_errors"]["4"]["errors"][0]["type"]) == (400, "value_not_in_list")


async def test_a_job_whose_only_server_has_lost_the_model_waits_until_it_is_back(tmp_path: Path) -> None:
    fake = FakeComfy(step_s=0.01)
    async with serving(fake), front(tmp_path, fake) as client:
        fake.stuck = True
        _, first = await client.submit(graph(1))
        _, second = await client.submit(graph(2))
        await _started_on((fake,), first["prompt_id"])
        fake.info = object_info([])
        await eventually(lambda: _lacks_models(client))
        fake.stuck = False
        await client.ended(first["prompt_id"])
        _, waits = await client.ask("GET", f"/api/jobs/{second['prompt_id']}")
        fake.info = object_info(["tiny.safetensors"])
        entry = await client.ended(second["prompt_id"])
    assert waits["status"] == "pending"
    assert entry["status"]["status_str"] == "success"


async def _lacks_models(client: Client) -> bool:
    _, info = await client.ask("GET", "/object_info/CheckpointLoaderSimple")
    return info["CheckpointLoaderSimple"]["input"]["required"]["ckpt_name"][0] == []
