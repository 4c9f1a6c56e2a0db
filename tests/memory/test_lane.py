"""Jobs of one moment share a commit, none is lost, and each hears of itself only."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from swarmx.core.errors import StoreError
from swarmx.memory.lane import Lane

Statements = list[str]


def connecting(path: Path, statements: Statements) -> Callable[[], sqlite3.Connection]:
    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute("CREATE TABLE IF NOT EXISTS numbers (number INTEGER PRIMARY KEY)")
        connection.set_trace_callback(statements.append)
        return connection

    return connect


def adding(number: int) -> Callable[[sqlite3.Connection], int]:
    def add(connection: sqlite3.Connection) -> int:
        connection.execute("INSERT INTO numbers VALUES (?)", (number,))
        return number

    return add


def numbers(path: Path) -> list[int]:
    return [row[0] for row in sqlite3.connect(path).execute("SELECT number FROM numbers ORDER BY number")]


async def test_what_is_asked_for_in_one_turn_of_the_loop_is_one_transaction(tmp_path: Path) -> None:
    statements: Statements = []
    lane = await Lane.open(connecting(tmp_path / "db", statements), name="lane", commits=True)
    assert await asyncio.gather(*(lane.do(adding(number)) for number in range(50))) == list(range(50))
    await lane.close()
    assert statements.count("COMMIT") == 1
    assert numbers(tmp_path / "db") == list(range(50))


async def test_a_job_that_fails_fails_alone(tmp_path: Path) -> None:
    lane = await Lane.open(connecting(tmp_path / "db", []), name="lane", commits=True)
    jobs = [lane.do(adding(number)) for number in (1, 1, 2)]
    first, again, second = await asyncio.gather(*jobs, return_exceptions=True)
    await lane.close()
    assert (first, second) == (1, 2)
    assert isinstance(again, StoreError)
    assert numbers(tmp_path / "db") == [1, 2]


async def test_closing_finishes_what_was_asked_for_in_the_same_turn(tmp_path: Path) -> None:
    lane = await Lane.open(connecting(tmp_path / "db", []), name="lane", commits=True)
    asked = lane.do(adding(1))
    await lane.close()
    assert await asked == 1
    with pytest.raises(StoreError, match="closed"):
        lane.do(adding(2))
    assert numbers(tmp_path / "db") == [1]


async def test_a_wait_that_is_cancelled_does_not_undo_the_job(tmp_path: Path) -> None:
    lane = await Lane.open(connecting(tmp_path / "db", []), name="lane", commits=True)
    lane.do(adding(1)).cancel()
    assert await lane.do(adding(2)) == 2
    await lane.close()
    assert numbers(tmp_path / "db") == [1, 2]


async def test_loops_of_several_threads_may_share_a_lane(tmp_path: Path) -> None:
    lane = await Lane.open(connecting(tmp_path / "db", []), name="lane", commits=True)
    heard: list[int] = []

    async def ask(first: int) -> None:
        for turn in range(20):
            heard.extend(await asyncio.gather(*(lane.do(adding(first + 10 * turn + i)) for i in range(10))))

    threads = [threading.Thread(target=lambda first=first: asyncio.run(ask(first))) for first in (0, 1000, 2000)]
    for thread in threads:
        thread.start()
    await asyncio.to_thread(lambda: [thread.join() for thread in threads])
    await lane.close()
    expected = [first + i for first in (0, 1000, 2000) for i in range(200)]
    assert sorted(heard) == numbers(tmp_path / "db") == expected


async def test_a_loop_that_ends_before_its_turn_does_leaves_its_jobs_to_the_next(tmp_path: Path) -> None:
    lane = await Lane.open(connecting(tmp_path / "db", []), name="lane", commits=True)

    def ask_and_go() -> None:
        loop = asyncio.new_event_loop()
        loop.call_soon(loop.stop)
        loop.call_soon(lambda: lane.do(adding(1)))
        loop.run_forever()
        loop.close()

    await asyncio.to_thread(ask_and_go)
    assert await lane.do(adding(2)) == 2
    await lane.close()
    assert numbers(tmp_path / "db") == [1, 2]
