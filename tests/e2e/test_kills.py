"""What real gateways accepted ends exactly once, whatever moment they are killed in and whatever clock and disk do."""

from __future__ import annotations

import resource
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import aiohttp
import pytest

from eval.gateway_lives import World, live, world
from eval.promises import ONCE
from swarmx.sdk import AsyncClient
from swarmx.wiring.state import DATABASE
from tests.disks import SmallDisk, mounted
from tests.postgres import PostgresServer

pytestmark = [pytest.mark.process, pytest.mark.timeout(600)]

ALL_KINDS = {"text", "image", "look", ONCE}
ONE = {"name": "one", "nodes": {"only": {"kind": "llm", "model": "m", "prompt": "p"}}}


async def test_thirty_gateways_that_die_lose_nothing_and_end_everything_once(tmp_path: Path) -> None:
    tally = await live(tmp_path, 30, 7)
    assert tally.broken == []
    assert tally.killed >= 20
    assert tally.workflows >= 8, "each user has brought one"
    assert tally.states["finished"] > 0
    assert set(tally.kinds) == ALL_KINDS
    assert len(tally.points) >= 3, "they died between different steps"


async def test_two_gateways_on_one_database_that_die_in_turn_lose_nothing(
    postgres: PostgresServer, tmp_path: Path
) -> None:
    database = await postgres.new_database()
    tally = await live(tmp_path, 12, 7, postgres=database)
    await postgres.drop(database)
    assert tally.broken == []
    assert tally.killed >= 8
    assert tally.workflows >= 8
    assert tally.states["finished"] > 0
    assert set(tally.kinds) == ALL_KINDS


async def test_a_limit_to_its_files_refuses_for_a_while_and_loses_nothing(tmp_path: Path) -> None:
    async with world(tmp_path, 1) as around:
        pid = await around.gateways[0].begin()
        await around.until(lambda: around.accepted > 6)
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        await around.until(lambda: "SQLITE_FULL" in around.log or "SQLITE_IOERR" in around.log)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
        await goes_on(around)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with mounted(tmp_path / "disk") as small:
        yield small


async def test_a_full_disk_refuses_with_the_reason_and_loses_nothing(tmp_path: Path, disk: SmallDisk) -> None:
    state = disk.folder / "state"
    async with world(tmp_path, 3, state=state) as around:
        await around.gateways[0].begin()
        await around.until(lambda: around.accepted > 6)
        disk.fill()
        await around.until(lambda: "SQLITE_FULL" in around.log)
        accepted = await refused(around, "the disk is full; free some space")
        disk.free()
        await ended(around, accepted)
        await goes_on(around)


async def test_a_gateway_does_not_start_on_a_full_disk_and_does_once_there_is_room(
    tmp_path: Path, disk: SmallDisk
) -> None:
    async with world(tmp_path, 4, state=disk.folder / "state") as around:
        gateway = around.gateways[0]
        await gateway.begin()
        await around.until(lambda: around.accepted > 6)
        await gateway.end(after_s=0.0)
        disk.fill()
        await gateway.begin()
        await around.until(lambda: "the life ended with StoreError" in around.log)
        assert "the disk is full; free some space" in around.log
        await gateway.end(after_s=60.0)
        disk.free()
        await gateway.begin()
        await goes_on(around, broken=["a life ended 256"])


async def test_a_locked_database_delays_and_loses_nothing(tmp_path: Path) -> None:
    async with world(tmp_path, 2) as around:
        await around.gateways[0].begin()
        await around.until(lambda: around.accepted > 6)
        with closing(sqlite3.connect(tmp_path / "state" / DATABASE, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            await around.until(lambda: "SQLITE_BUSY" in around.log)
            other.execute("ROLLBACK")
        await goes_on(around)


async def goes_on(around: World, *, broken: Sequence[str] = ()) -> None:
    """More is accepted, all of it ends, and every promise was kept but for these."""
    accepted = around.accepted
    await around.until(lambda: around.accepted > accepted)
    assert (await around.finish()).broken == list(broken)


async def refused(around: World, reason: str) -> list[str]:
    """Bring workflows until one is refused, for that reason; those that were accepted before."""
    headers = {"authorization": f"Bearer {around.users.token}"}
    accepted: list[str] = []
    async with aiohttp.ClientSession(around.users.urls[0], headers=headers) as session:
        while True:
            async with session.post("/api/v1/workflows", json=ONE) as response:
                if response.status != 202:
                    assert (response.status, reason in await response.text()) == (503, True)
                    return accepted
                accepted.append((await response.json())["workflow_id"])


async def ended(around: World, workflows: Sequence[str]) -> None:
    async with AsyncClient(around.users.urls[0], around.users.token) as client:
        for workflow_id in workflows:
            around.users.notes.note("accepted", workflow_id, workflow_id)
            await client.wait(workflow_id)
