"""How many files a tenant may have, and how long they are kept."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from swarmx.compat.comfyui.store import JobStore
from tests.compat.comfyui.fake import FakeComfy, serving
from tests.compat.comfyui.fake_nodes import graph
from tests.compat.comfyui.fronts import Client, eventually, front

pytestmark = pytest.mark.process

LONG_AGO_S = 1_000_000.0


async def upload(client: Client, name: str, data: bytes, **more: str) -> tuple[int, Any]:
    form = aiohttp.FormData()
    form.add_field("image", data, filename=name)
    for key, value in more.items():
        form.add_field(key, value)
    async with client.session.post(f"{client.url}/upload/image", data=form, headers=client.headers) as response:
        return response.status, await response.json()


async def test_uploads_beyond_a_tenants_bounds_are_refused_and_one_in_the_place_of_another_is_not(
    tmp_path: Path,
) -> None:
    fake, owed = FakeComfy(), {"max_uploads": 2, "max_uploaded_bytes": 2048}
    async with serving(fake):
        async with front(tmp_path, fake, default_tenant=owed) as client:
            first = await upload(client, "a.png", b"a" * 1000)
            too_large = await upload(client, "b.png", b"b" * 2049)
            too_much = await upload(client, "b.png", b"b" * 1049)
            second = await upload(client, "b.png", b"b" * 1000)
            too_many = await upload(client, "c.png", b"c")
            same = await upload(client, "a.png", b"a" * 1000)
        async with front(tmp_path, fake, default_tenant=owed) as client:
            after_restart = await upload(client, "c.png", b"c")
            instead = await upload(client, "a.png", b"A" * 900, overwrite="true")
            full = await upload(client, "b.png", b"B" * 1200, overwrite="true")
    assert [first[0], second[0], same[0], instead[0]] == [200] * 4
    assert (too_large[0], too_large[1]["error"]["type"]) == (413, "file_too_large")
    for status, said in (too_much, too_many, after_restart, full):
        assert (status, said["error"]["type"], said["node_errors"]) == (429, "upload_quota", {})


async def test_uploads_of_the_same_moment_do_not_pass_the_bound(tmp_path: Path) -> None:
    fake = FakeComfy()
    async with serving(fake), front(tmp_path, fake, default_tenant={"max_uploads": 3}) as client:
        answers = await asyncio.gather(*(upload(client, f"{n}.png", b"%d" % n) for n in range(8)))
    assert [status for status, _ in answers].count(200) == 3


@pytest.mark.parametrize("bounds", [{"max_waiting_bytes": 4096}, {"default_tenant": {"max_waiting_bytes": 4096}}])
async def test_large_graphs_are_refused_while_those_that_wait_come_to_the_bound(
    tmp_path: Path, bounds: dict[str, Any]
) -> None:
    fake = FakeComfy()

    def large(seed: int) -> dict[str, Any]:
        row = graph(seed)
        row["6"]["inputs"]["text"] = "x" * 3000
        return row

    async with serving(fake):
        async with front(tmp_path, fake, **bounds) as client:
            fake.stuck = True
            running = (await client.submit(graph(1)))[1]["prompt_id"]
            await eventually(lambda: _runs(fake))
            waiting = [await client.submit(large(seed)) for seed in (2, 3)]
            status, said = await client.submit(graph(4))
        async with front(tmp_path, fake, **bounds) as client:
            after_restart, _ = await client.submit(graph(4))
            await client.ask("POST", "/queue", {"delete": [waiting[0][1]["prompt_id"]]})
            with_room, _ = await client.submit(graph(4))
            fake.stuck = False
            await client.ended(running)
    assert [row[0] for row in waiting] == [200, 200]
    assert (status, said["error"]["type"], after_restart, with_room) == (429, "queue_full", 429, 200)
    assert "4096 are allowed" in said["error"]["details"]


async def _runs(fake: FakeComfy) -> bool:
    return fake._running is not None


async def test_jobs_are_refused_while_their_outputs_fill_the_quota_until_history_is_cleared(tmp_path: Path) -> None:
    fake = FakeComfy()
    async with serving(fake), front(tmp_path, fake, default_tenant={"max_outputs": 2}) as client:
        for seed in (1, 2):
            await client.run(graph(seed))
        status, said = await eventually(lambda: _refused(client))
        await client.ask("POST", "/queue", {"clear": True})
        await eventually(lambda: _taken(client))
    assert (status, said["error"]["type"]) == (429, "output_quota")
    assert "files, 2 may be kept" in said["error"]["details"]


async def test_a_bound_on_the_bytes_of_outputs_counts_what_servers_say(tmp_path: Path) -> None:
    fake = FakeComfy()
    async with serving(fake), front(tmp_path, fake, default_tenant={"max_output_bytes": 100}) as client:
        for seed in (1, 2):  # some 50 bytes each
            await client.run(graph(seed))
        status, said = await eventually(lambda: _refused(client))
    assert (status, said["error"]["type"]) == (429, "output_quota")


async def _refused(client: Client) -> tuple[int, Any] | None:
    """Submitted again until that is refused: counts may be two seconds old."""
    answer = await client.submit(graph(3))
    return answer if answer[0] == 429 else None


async def _taken(client: Client) -> bool:
    await client.ask("POST", "/history", {"clear": True})
    return (await client.submit(graph(9)))[0] == 200


async def test_files_that_nobody_used_for_long_are_forgotten(tmp_path: Path) -> None:
    fake = FakeComfy()
    loads = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "used.png"}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    async with serving(fake):
        async with front(tmp_path, fake) as client:
            for name in ("old.png", "used.png"):
                assert (await upload(client, name, name.encode()))[0] == 200
            await client.run(graph(1))
            for path in (tmp_path / "files").iterdir():
                os.utime(path, (LONG_AGO_S, LONG_AGO_S))
            await client.run(loads)
        with sqlite3.connect(tmp_path / "jobs.db") as db:
            db.execute("UPDATE output SET made_s = ? WHERE folder = 'output'", (LONG_AGO_S,))
        async with front(tmp_path, fake) as client:
            await eventually(lambda: _is_gone(client, "/view?filename=old.png&type=input"))
            kept, _ = await client.ask("GET", "/view?filename=used.png&type=input")
        with sqlite3.connect(tmp_path / "jobs.db") as db:
            folders = db.execute("SELECT folder FROM output").fetchall()
    assert kept == 200
    assert folders == [("temp",)], "the picture of the first job was made long ago"
    assert [path.read_bytes() for path in (tmp_path / "files").iterdir()] == [b"used.png"]


async def _is_gone(client: Client, path: str) -> bool:
    return (await client.ask("GET", path))[0] == 404


async def test_outputs_of_an_earlier_version_are_kept_from_now_on(tmp_path: Path) -> None:
    fake = FakeComfy()
    async with serving(fake), front(tmp_path, fake) as client:
        await client.run(graph())
    with sqlite3.connect(tmp_path / "jobs.db") as db:
        db.executescript(
            "ALTER TABLE output DROP COLUMN prompt_id; ALTER TABLE output DROP COLUMN made_s;"
            "ALTER TABLE output DROP COLUMN size; DROP INDEX job_part;"
            "DROP INDEX output_name; ALTER TABLE job DROP COLUMN parent;"
            "PRAGMA user_version = 1;"
        )
    store = JobStore(tmp_path)
    await store.open()
    rows = await store.do(lambda db: db.execute("SELECT made_s > 1.7e9, size FROM output").fetchall())
    await store.close()
    assert rows == [(1, None)]
