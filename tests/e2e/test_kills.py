"""What a real gateway accepted ends exactly once, whatever moment it is killed in and whatever its clock shows."""

from __future__ import annotations

import resource
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from eval.gateway_lives import gateways, live

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]


async def test_thirty_gateways_that_die_lose_nothing_and_end_everything_once(tmp_path: Path) -> None:
    tally = await live(tmp_path, 30, 7)
    assert tally.broken == []
    assert tally.killed >= 20
    assert tally.workflows >= 20
    assert tally.states["finished"] >= tally.workflows // 2
    assert len(tally.points) >= 6, "they died between many different steps"


async def test_a_full_disk_refuses_for_a_while_and_loses_nothing(tmp_path: Path) -> None:
    async with gateways(tmp_path, 1) as lives:
        pid = await lives.begin()
        await lives.until(lambda: lives.accepted > 6)
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        await lives.until(lambda: "SQLITE_FULL" in lives.log or "SQLITE_IOERR" in lives.log)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
        accepted = lives.accepted
        await lives.until(lambda: lives.accepted > accepted)
        tally = await lives.finish(pid)
    assert tally.broken == []


async def test_a_locked_database_delays_and_loses_nothing(tmp_path: Path) -> None:
    async with gateways(tmp_path, 2) as lives:
        pid = await lives.begin()
        await lives.until(lambda: lives.accepted > 6)
        with closing(sqlite3.connect(lives.database, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            await lives.until(lambda: "SQLITE_BUSY" in lives.log)
            other.execute("ROLLBACK")
        accepted = lives.accepted
        await lives.until(lambda: lives.accepted > accepted)
        tally = await lives.finish(pid)
    assert tally.broken == []
