"""What is kept of a job, and how many may wait."""

from __future__ import annotations

import asyncio
import sqlite3
import uuid
from contextlib import closing
from pathlib import Path

import pytest

from swarmx.compat.comfyui import store as store_module
from swarmx.compat.comfyui.jobs import Ended, Job
from swarmx.compat.comfyui.store import JobStore
from swarmx.gateway.keys import Keyring
from tests.compat.comfyui.fake import FakeComfy, serving
from tests.compat.comfyui.fake_nodes import graph
from tests.compat.comfyui.fronts import Client, eventually, front

pytestmark = pytest.mark.process


async def test_a_key_for_a_paid_service_is_not_kept_longer_than_the_job_runs(tmp_path: Path) -> None:
    fake, secret = FakeComfy(), {"extra_data": {"api_key_comfy_org": "comfy-secret", "other": 1}}
    async with serving(fake):
        async with front(tmp_path, fake) as client:
            _, _, entry = await client.run(graph(), **secret)
            fake.stuck = True
            for seed in (2, 3):
                _, last = await client.submit(graph(seed), **secret)
            await client.ask("POST", f"/api/jobs/{last['prompt_id']}/cancel")
            fake.stuck = False
        async with front(tmp_path, fake) as client:
            await client.run(graph(4))
            _, ended = await client.ask("GET", f"/api/jobs/{last['prompt_id']}")
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir() if path.is_file())
    assert entry["prompt"][3]["other"] == ended["workflow"]["extra_data"]["other"] == 1
    assert b"comfy-secret" not in kept


async def test_jobs_of_a_store_that_knew_no_parts_are_still_there(tmp_path: Path) -> None:
    fake = FakeComfy()
    async with serving(fake):
        async with front(tmp_path, fake) as client:
            old, _, entry = await client.run(graph(1))
        with closing(sqlite3.connect(tmp_path / "jobs.db")) as db:
            newer = "".join(f"ALTER TABLE output DROP COLUMN {name};" for name in ("prompt_id", "made_s", "size"))
            parts = "DROP INDEX job_part; DROP INDEX output_name; ALTER TABLE job DROP COLUMN parent;"
            db.executescript(f"{parts} {newer} PRAGMA user_version = 1;")
        async with front(tmp_path, fake) as client:
            again = await client.history(old)
            _, _, new = await client.run(graph(2))
    assert again == entry
    assert new["status"]["status_str"] == "success"


async def test_the_history_of_a_job_is_its_tenants_alone_and_gone_once_it_is_cleared(tmp_path: Path) -> None:
    store = JobStore(tmp_path)

    async def seen(job: Job) -> list[bytes]:
        return [await store.history_of(job.prompt_id, tenant) for tenant in (job.tenant, None, "another")]

    async def run(job: Job) -> None:
        await store.accept(job)
        assert await seen(job) == [b"", b"", b""]
        assert await store.ended(job.prompt_id, Ended(state="completed", ended_s=1.0, history=b"{}"), [])

    first, second = _job(1), _job(2)
    await store.open()
    await run(first)
    assert await seen(first) == [b"{}", b"{}", b""]
    await store.close()
    store = JobStore(tmp_path)
    await store.open()
    assert await seen(first) == [b"{}", b"{}", b""], "a next life finds it on disk"
    await run(second)
    await store.clear_history(first.tenant, [first.prompt_id, second.prompt_id])
    assert [await seen(first), await seen(second)] == [[b"", b"", b""]] * 2
    await store.close()


async def test_a_name_that_a_server_gives_again_is_its_newest_makers_alone(tmp_path: Path) -> None:
    fake, keys = FakeComfy(), Keyring(tmp_path / "keys.json")
    tokens = [keys.add(name, "client", name) for name in ("ann", "bob")]
    async with serving(fake):
        async with front(tmp_path, fake, keys=keys) as client:
            ann, bob = (Client(client.url, client.session, token) for token in tokens)
            (_, _, hers), (_, _, same) = await ann.run(graph(1)), await bob.run(graph(1))
            (name,) = {entry["outputs"]["9"]["images"][0]["filename"] for entry in (hers, same)}
            assert [await _views(who, name) for who in (ann, bob)] == [200, 200], (
                "one result, which the server still had"
            )
            fake.files.clear()
            fake._saved = 0  # its disk was cleared
            _, _, his = await bob.run(graph(2))
            assert his["outputs"]["9"]["images"][0]["filename"] == name
            assert [await _views(who, name) for who in (ann, bob)] == [404, 200]
        async with front(tmp_path, fake, keys=keys) as client:
            ann, bob = (Client(client.url, client.session, token) for token in tokens)
            assert [await _views(who, name) for who in (ann, bob)] == [404, 200]


async def test_a_second_end_of_a_job_changes_nothing(tmp_path: Path) -> None:
    store, job, end = JobStore(tmp_path), _job(1), Ended(state="completed", ended_s=1.0, history=b"{}")
    await store.open()
    await store.accept(job)
    assert await store.ended(job.prompt_id, end, [("output", "", "s1~a.png")])
    assert not await store.ended(job.prompt_id, end, [("output", "", "s1~b.png")])
    made = [await store.made(job.tenant, "output", "", f"s1~{name}.png") for name in "ab"]
    await store.close()
    assert made == [True, False]


async def test_a_page_of_history_counts_jobs_that_have_one(tmp_path: Path) -> None:
    fake = FakeComfy()
    async with serving(fake), front(tmp_path, fake) as client:
        done, _, _ = await client.run(graph(1))
        fake.stuck = True
        ids = [(await client.submit(graph(seed)))[1]["prompt_id"] for seed in range(2, 7)]
        await client.ask("POST", "/queue", {"delete": ids})  # the first of them runs
        _, newest = await client.ask("GET", "/history?max_items=3")
        _, second = await client.ask("GET", "/history?max_items=3&offset=1")
        fake.stuck = False
    assert (list(newest), second) == ([done], {})


async def test_why_jobs_went_where_they_went_is_forgotten_with_them(tmp_path: Path) -> None:
    fake = FakeComfy(custom=True)
    refused = {
        "20": {"class_type": "Picky", "inputs": {"value": 7}},
        "21": {"class_type": "PreviewImage", "inputs": {"images": ["20", 0]}},
    }
    async with serving(fake):
        async with front(tmp_path, fake) as client:
            ids = [(await client.run(graph(seed)))[0] for seed in range(1, 5)]
            assert (await client.submit(refused))[0] == 400

            async def kept() -> bool:
                return _decided(tmp_path) == set(ids)

            await eventually(kept)  # its client hears first that it was refused
            await client.ask("POST", "/history", {"delete": ids[:1]})
            assert _decided(tmp_path) == set(ids[1:])
            await client.ask("POST", "/history", {"clear": True})
            assert _decided(tmp_path) == set()
            last, _, _ = await client.run(graph(5))
        with closing(sqlite3.connect(tmp_path / "jobs.db")) as db:  # as an older version left it
            db.execute("INSERT INTO decision SELECT 'gone', attempt, body FROM decision")
            db.executescript("DROP INDEX output_name; PRAGMA user_version = 2;")
        async with front(tmp_path, fake):
            assert _decided(tmp_path) == {last}


async def test_graphs_that_come_together_do_not_pass_the_bound_on_waiting_ones(tmp_path: Path) -> None:
    fake = FakeComfy()
    async with serving(fake), front(tmp_path, fake, max_waiting=3) as client:
        fake.stuck = True
        answers = await asyncio.gather(*(client.submit(graph(seed)) for seed in range(20)))
        fake.stuck = False
    statuses = [status for status, _ in answers]
    assert statuses.count(200) <= 4, "one runs, three wait"
    assert statuses.count(200) + statuses.count(429) == 20


async def test_a_page_of_jobs_reads_the_graphs_of_that_page_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = JobStore(tmp_path)
    await store.open()
    await asyncio.gather(*(store.accept(_job(seq)) for seq in range(1, 1501)))
    await store.cancelled([_job(seq).prompt_id for seq in range(1, 1501)], 20_000.0)
    await store.accept(_job(1501))
    await store.close()
    read: list[object] = []
    whole = store_module._read
    fake = FakeComfy()
    fake.stuck = True  # the one that waits begins, and no more, before anything is asked
    async with serving(fake), front(tmp_path, fake) as client:
        await eventually(lambda: _taken(fake))
        monkeypatch.setattr(store_module, "_read", lambda row: read.append(1) or whole(row))
        _, newest = await client.ask("GET", "/api/jobs?limit=20")
        _, last = await client.ask("GET", "/api/jobs?limit=20&offset=1490&status=cancelled&sort_order=asc")
        _, history = await client.ask("GET", "/history?max_items=5")
        fake.stuck = False
    assert newest["pagination"]["total"] == 1501
    assert newest["jobs"][0]["id"] == _job(1501).prompt_id
    assert [job["id"] for job in last["jobs"]] == [_job(seq).prompt_id for seq in range(1491, 1501)]
    assert history == {}, "a job that never began has none"
    assert len(read) <= 30


async def _views(client: Client, name: str) -> int:
    return (await client.ask("GET", f"/view?filename={name}&type=output"))[0]


def _decided(folder: Path) -> set[str]:
    """The jobs of which it is kept why they went where they went."""
    with closing(sqlite3.connect(folder / "jobs.db")) as db:
        return {row[0] for row in db.execute("SELECT prompt_id FROM decision")}


async def _taken(fake: FakeComfy) -> bool:
    return bool(fake.received)


def _job(seq: int) -> Job:
    return Job(
        prompt_id=str(uuid.UUID(int=seq)),
        tenant="default",
        client_id=None,
        number=float(seq),
        seq=seq,
        priority=0,
        graph=graph(seq),
        extra={},
        outputs=("9",),
        files=frozenset(),
        created_s=float(seq),
    )
