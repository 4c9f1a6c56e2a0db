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
from tests.compat.comfyui.fake import FakeComfy, serving
from tests.compat.comfyui.fake_nodes import graph
from tests.compat.comfyui.fronts import eventually, front

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
            parts = "DROP INDEX job_part; ALTER TABLE job DROP COLUMN parent;"
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
        targets=None,
        outputs=("9",),
        files=frozenset(),
        created_s=float(seq),
    )
