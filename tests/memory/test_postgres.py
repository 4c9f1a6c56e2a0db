"""What only a PostgreSQL store can meet: servers that crash, connections that break off, others in the same tables."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from swarmx.core import failpoints
from swarmx.core.errors import NotFound, StoreError
from swarmx.core.records import Idempotency
from swarmx.memory.postgres.connection import place_of
from swarmx.memory.postgres.reading import Listener
from swarmx.memory.postgres.store import PostgresStore
from tests.contract.test_ownership import change
from tests.contract.test_store import workflow
from tests.e2e.fleet import until
from tests.postgres import PostgresServer


@pytest.fixture
async def url(postgres: PostgresServer) -> AsyncIterator[str]:
    made = await postgres.new_database()
    yield made
    await postgres.drop(made)


@pytest.fixture
async def store(url: str) -> AsyncIterator[PostgresStore]:
    opened = PostgresStore(url, patience_s=30.0)
    await opened.open()
    yield opened
    await opened.close()


async def write_on(store: PostgresStore, name: str, until_set: asyncio.Event) -> int:
    """Add events to a workflow until told to stop; returns how many were acknowledged."""
    epoch = await store.enlist(name, ttl_s=1000.0, exclusive=False)
    await store.accept(workflow(name, owner=epoch), [])
    seq = 0
    while not until_set.is_set():
        assert await store.commit(change(epoch, seq, str(seq).encode(), workflow_id=name)) == "stored"
        seq += 1
    return seq


async def check_written(store: PostgresStore, name: str, count: int) -> None:
    assert [event.body for event in await store.events(name)] == [str(i).encode() for i in range(count)]


async def test_connections_that_break_off_lose_nothing_and_write_nothing_twice(
    store: PostgresStore, url: str, postgres: PostgresServer
) -> None:
    stop = asyncio.Event()
    writers = [asyncio.create_task(write_on(store, f"w{i}", stop)) for i in range(8)]
    for _ in range(15):
        await asyncio.sleep(0.02)
        await postgres.sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()",
            url=url,
        )
    stop.set()
    for i, count in enumerate(await asyncio.gather(*writers)):
        await check_written(store, f"w{i}", count)


async def test_a_server_that_crashes_and_comes_back_is_waited_for(
    store: PostgresStore, postgres: PostgresServer
) -> None:
    stop = asyncio.Event()
    writers = [asyncio.create_task(write_on(store, f"w{i}", stop)) for i in range(4)]
    await until(store.unfinished, lambda found: sum(record.seq for record in found) > 50)
    try:
        await asyncio.to_thread(postgres.stop, "immediate")
    finally:
        await asyncio.to_thread(postgres.start)
    await until(store.unfinished, lambda found: len(found) == 4)
    stop.set()
    for i, count in enumerate(await asyncio.gather(*writers)):
        await check_written(store, f"w{i}", count)


@pytest.mark.parametrize("point", ["lane.begin", "lane.job", "lane.commit", "lane.committed"])
async def test_a_batch_is_stored_once_wherever_its_connection_broke_off(
    store: PostgresStore, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    epoch = await store.enlist("me", ttl_s=1000.0, exclusive=False)
    await store.accept(workflow(owner=epoch), [])
    broken: list[str] = []

    def break_off(name: str) -> None:
        if name == point and not broken:
            broken.append(name)
            raise ConnectionResetError("the network is gone")

    monkeypatch.setattr(failpoints, "hit", break_off)
    assert await store.commit(change(epoch, 0, b"one")) == "stored"
    assert broken == [point]
    assert [event.body for event in await store.events("wf")] == [b"one"]


async def test_a_server_that_is_away_is_an_error_that_says_so_until_it_is_back(
    url: str, postgres: PostgresServer
) -> None:
    store = PostgresStore(url, timeout_s=1.0, patience_s=0.2)
    await store.open()
    await store.accept(workflow(), [])
    postgres.stop("immediate")
    try:
        for asked in (store.accept(workflow("w2"), []), store.workflow("wf", tenant=None)):
            with pytest.raises(StoreError, match="look whether it runs"):
                await asked
        with pytest.raises(StoreError, match="cannot be opened"):
            await PostgresStore(url, patience_s=0.2).open()
    finally:
        postgres.start()
    await store.accept(workflow("w2"), [])
    assert len(await store.unfinished()) == 2
    await store.close()


async def test_a_process_that_stands_still_in_mid_transaction_does_not_hold_up_a_claim(
    store: PostgresStore, url: str
) -> None:
    for i in range(2):
        await store.accept(workflow(f"w{i}"), [])
    gone = await store.enlist("gone", ttl_s=-1.0, exclusive=False)
    me = await store.enlist("me", ttl_s=1000.0, exclusive=False)
    stuck = await asyncpg.connect(url)
    try:
        await stuck.execute("BEGIN")
        await stuck.execute("UPDATE workflows SET seq = seq + 1 WHERE workflow_id = 'w0'")
        await stuck.execute("UPDATE owners SET expires_at_s = 0 WHERE epoch = $1", gone)
        assert [record.workflow_id for record in await store.claim(me, limit=9)] == ["w1"]
    finally:
        stuck.terminate()
    await until(lambda: store.claim(me, limit=9), lambda found: [record.workflow_id for record in found] == ["w0"])


async def test_of_two_processes_that_accept_the_same_key_at_once_one_brings_the_workflow(url: str) -> None:
    stores = [PostgresStore(url) for _ in range(2)]
    await asyncio.gather(*(store.open() for store in stores))
    key = Idempotency(key="k", fingerprint="f", expires_at_s=1e10)
    done = await asyncio.gather(*(stores[i % 2].accept(workflow(f"w{i}"), [b"e"], idempotency=key) for i in range(20)))
    assert len({accepted.workflow_id for accepted in done}) == 1
    assert [accepted.replayed for accepted in done].count(False) == 1
    assert len(await stores[0].unfinished()) == 1
    for store in stores:
        await store.close()


async def test_a_name_with_the_character_nul_is_nobodys(store: PostgresStore) -> None:
    await store.accept(workflow(), [b"e"])
    for asked in (store.workflow("w\0f", tenant="a"), store.post("w\0f", b"x", dedup="d", tenant="a")):
        with pytest.raises(NotFound, match="NUL"):
            await asked
    assert await store.post("wf", b"x", dedup="d", tenant="a")


async def test_whatever_ends_the_listening_others_are_heard_again(
    store: PostgresStore,
    url: str,
    postgres: PostgresServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    heard: list[str] = []
    connect = asyncpg.connect
    odd = [RuntimeError("an odd one"), ValueError("another")]

    async def connected(*arguments: Any, **more: Any) -> asyncpg.Connection:
        name = more.get("server_settings", {}).get("application_name")
        if name == "swarmx-listener" and broken and odd:
            raise odd.pop()
        return await connect(*arguments, **more)

    def hear(workflow_id: str) -> None:
        heard.append(workflow_id)
        raise RuntimeError("whoever listens raises")

    async def take() -> list[str]:
        assert await store.take("wf", 7) is not None
        return heard

    async def logged() -> str:
        return caplog.text

    broken = False
    monkeypatch.setattr(asyncpg, "connect", connected)
    owner = PostgresStore(url)
    await owner.open()
    owner.listen(hear)
    await store.accept(workflow(), [])
    await until(take, lambda found: len(found) > 1)
    broken = True
    with caplog.at_level(logging.INFO, "swarmx.memory.postgres.reading"):
        gone = await postgres.sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND application_name = 'swarmx-listener'",
            url=url,
        )
        await until(logged, lambda text: "heard again" in text)
        heard.clear()
        assert await until(take, bool), "it listens again"
    assert (len(gone), odd) == (1, [])
    told = [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "INFO")]
    assert [text.split(" at ")[0] for text in told] == ["other servers", "other servers"]
    assert ("not heard" in told[0], "heard again" in told[1]) == (True, True)
    await owner.close()


async def test_a_connection_that_says_nothing_is_asked_whether_it_is_there(url: str, postgres: PostgresServer) -> None:
    asked = (
        "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() "
        "AND application_name = 'swarmx-listener' AND query = 'SELECT 1'"
    )
    quiet = Listener(url, "quiet", str, where="here", timeout_s=5.0, quiet_s=0.05)
    await until(lambda: postgres.sql(asked, url=url), bool)
    await quiet.close()


async def test_the_owner_of_a_workflow_hears_that_another_process_took_it(store: PostgresStore, url: str) -> None:
    heard: list[str] = []
    owner = PostgresStore(url)
    await owner.open()
    owner.listen(heard.append)
    with pytest.raises(StoreError, match="somebody already listens"):
        owner.listen(heard.append)
    await store.accept(workflow(), [])

    async def take() -> list[str]:
        assert await store.take("wf", 7) is not None
        return heard

    assert set(await until(take, bool)) == {"wf"}, "what is said before anybody listens is lost; the poll finds it"
    await owner.close()


async def test_what_another_process_posts_is_heard(store: PostgresStore, url: str) -> None:
    heard: list[str] = []
    other = PostgresStore(url)
    await other.open()
    other.listen(heard.append)
    await store.accept(workflow(), [])
    names = iter(range(10_000))

    async def post() -> list[str]:
        await store.post("wf", b"x", dedup=str(next(names)), tenant=None)
        return heard

    assert set(await until(post, bool)) == {"wf"}, "what is said before anybody listens is lost; the poll finds it"
    await other.close()


async def test_a_newer_schema_is_refused_and_an_older_one_brought_up_to_date_once(
    url: str, postgres: PostgresServer
) -> None:
    stores = [PostgresStore(url) for _ in range(4)]
    await asyncio.gather(*(store.open() for store in stores))
    for store in stores:
        await store.close()
    await postgres.sql("UPDATE schema_version SET version = 99", url=url)
    with pytest.raises(StoreError, match="schema 99"):
        await PostgresStore(url).open()


def test_a_place_is_told_without_what_is_secret() -> None:
    assert place_of("postgresql://me:secret@db:5432/swarmx?passfile=x") == "postgresql://db:5432/swarmx"
