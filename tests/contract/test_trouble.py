"""A full disk and a locked database refuse every kind of write whole and say why; later the same write is taken."""

from __future__ import annotations

import os
import resource
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from swarmx.core.errors import StoreError
from swarmx.core.records import Blob, Commit, Idempotency
from swarmx.memory.control import SqliteControl
from swarmx.memory.postgres.store import PostgresStore
from swarmx.memory.sqlite import SqliteStore
from tests.contract.test_control_store import episode, proposal
from tests.contract.test_store import call_record, decision, workflow
from tests.disks import SmallDisk, mounted
from tests.postgres import PostgresServer

KEY = Idempotency(key="k", fingerprint="f", expires_at_s=1e12)
PICTURE = Blob(sha256="0" * 64, media_type="image/png", data=b"p" * 50_000)


@dataclass(frozen=True, slots=True)
class Desk:
    """A store in which this process runs the workflow `wf`, and another one, which is gone, ran `orphan`."""

    store: SqliteStore
    epoch: int

    @property
    def control(self) -> SqliteControl:
        return SqliteControl(self.store)

    @property
    def step(self) -> Commit:
        """A step as it follows on an image: events, the record of a call and the picture."""
        return Commit(
            workflow_id="wf",
            epoch=self.epoch,
            expected_seq=1,
            at_s=2.0,
            events=(b"two",),
            calls=(call_record("c"),),
            blobs=(PICTURE,),
        )


Write = Callable[[Desk], Awaitable[object]]
WRITES: dict[str, Write] = {
    "accept": lambda desk: desk.store.accept(workflow("w2", owner=desk.epoch), [b"one"], idempotency=KEY),
    "commit": lambda desk: desk.store.commit(desk.step),
    "append": lambda desk: desk.store.append("theirs", [b"one"], expected_seq=0, at_s=2.0),
    "post": lambda desk: desk.store.post("wf", b"input", dedup="d", tenant=None),
    "enlist": lambda desk: desk.store.enlist("next", ttl_s=9.0, exclusive=False),
    "heartbeat": lambda desk: desk.store.heartbeat(desk.epoch, ttl_s=99.0),
    "claim": lambda desk: desk.store.claim(desk.epoch, limit=9),
    "take": lambda desk: desk.store.take("orphan", desk.epoch),
    "retire": lambda desk: desk.store.retire(desk.epoch),
    "keep_key": lambda desk: desk.store.keep_key("a", KEY, "wf"),
    "record_call": lambda desk: desk.store.record_call(call_record("c")),
    "record_decision": lambda desk: desk.store.record_decision(decision("c")),
    "put_blob": lambda desk: desk.store.put_blob("a", "image/png", PICTURE.data),
    "save_proposal": lambda desk: desk.control.save_proposal(proposal("pr")),
    "save_episode": lambda desk: desk.control.save_episode(episode("ep")),
    "record_startup": lambda desk: desk.control.record_startup("g", "l40s", 3.0, 1.0),
}


@contextmanager
def locked(folder: Path) -> Iterator[str]:
    """Another process is in the middle of a write; gives what is to be said of it."""
    with closing(sqlite3.connect(folder / "swarmx.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield "another process keeps the database locked"
        other.execute("ROLLBACK")


@contextmanager
def limited(folder: Path) -> Iterator[str]:
    """No file of this process may grow any more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        yield "the disk (is full; free some space|reported an error; check the device and its space)"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def full(folder: Path) -> Iterator[str]:
    """The disk has no room."""
    disk = SmallDisk(folder)
    disk.fill()
    yield "the disk is full; free some space, nothing of this write was stored"
    disk.free()


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallDisk]:
    with mounted(tmp_path_factory.mktemp("small") / "disk") as disk:
        yield disk


Trouble = Callable[[Path], AbstractContextManager[str]]


@pytest.fixture(params=[locked, limited, full])
def trouble(request: pytest.FixtureRequest) -> Trouble:
    chosen: Trouble = request.param
    return chosen


@pytest.fixture
def folder(request: pytest.FixtureRequest, trouble: Trouble, tmp_path: Path) -> Path:
    if trouble is not full:
        return tmp_path
    disk: SmallDisk = request.getfixturevalue("small_disk")
    for left in disk.folder.iterdir():
        left.unlink()
    return disk.folder


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
async def test_a_write_in_trouble_is_refused_whole_and_taken_later(
    write: Write, trouble: Trouble, folder: Path
) -> None:
    store = SqliteStore(folder / "swarmx.db", busy_timeout_s=0.01, clock=lambda: 100.0)
    await store.open()
    try:
        gone = await store.enlist("gone", ttl_s=-1.0, exclusive=False)
        desk = Desk(store, await store.enlist("me", ttl_s=9.0, exclusive=False))
        await store.accept(workflow("wf", owner=desk.epoch), [b"one"])
        await store.accept(workflow("orphan", owner=gone), [b"one"])
        await store.accept(workflow("theirs", mode="transparent"), [])
        before = contents(folder)
        with trouble(folder) as reason, pytest.raises(StoreError, match=reason):
            await write(desk)
        assert contents(folder) == before
        assert await write(desk) is not False
        assert contents(folder) != before
    finally:
        await store.close()


async def test_reads_go_on_in_trouble(trouble: Trouble, folder: Path) -> None:
    store = SqliteStore(folder / "swarmx.db", busy_timeout_s=0.01)
    await store.open()
    try:
        await store.accept(workflow("wf"), [b"one"])
        with trouble(folder):
            assert [event.body for event in await store.events("wf")] == [b"one"]
    finally:
        await store.close()


async def test_a_postgres_server_with_a_full_disk_refuses_whole_and_says_so(postgres: PostgresServer) -> None:
    with mounted(postgres.folder / "small") as disk:
        owner = postgres.folder.stat()
        os.chown(disk.folder, owner.st_uid, owner.st_gid)
        (place := disk.folder / "place").mkdir()
        os.chown(place, owner.st_uid, owner.st_gid)
        await postgres.sql(f"CREATE TABLESPACE small LOCATION '{place}'")
        await postgres.sql("CREATE DATABASE small TABLESPACE small")
        store = PostgresStore(postgres.url("small"))
        try:
            await store.open()
            disk.fill()
            with pytest.raises(StoreError, match="its disk is full; free some space, nothing of this write was stored"):
                await store.put_blob("a", "image/png", os.urandom(1_000_000))
            await store.workflows(tenant=None, state=None, limit=1, cursor=None)
            disk.free()
            picture = os.urandom(1_000_000)
            digest = await store.put_blob("a", "image/png", picture)
            assert await store.blob(digest, tenant="a") == ("image/png", picture)
        finally:
            await store.close()
            await postgres.drop(postgres.url("small"))
            await postgres.sql("DROP TABLESPACE small")


def contents(folder: Path) -> list[str]:
    """All that is in the database, as somebody else reads it."""
    with closing(sqlite3.connect(folder / "swarmx.db")) as connection:
        return list(connection.iterdump())
