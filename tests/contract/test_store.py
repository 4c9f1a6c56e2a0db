"""Every store keeps the same promises: tenants stay apart, appends have one winner, what was acknowledged stays."""

from __future__ import annotations

import asyncio
import os
import re
import resource
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from swarmx.core.errors import NotFound, StoreError
from swarmx.core.forecast import point
from swarmx.core.nouns import Call, Candidates, Decision
from swarmx.core.ports import WorkflowStore
from swarmx.core.records import CallRecord, Commit, WorkflowRecord
from swarmx.memory.sqlite import SqliteStore
from tests.contract.places import Place


def workflow(workflow_id: str = "wf", *, tenant: str = "a", at_s: float = 1.0, **changes: Any) -> WorkflowRecord:
    record = WorkflowRecord(
        workflow_id=workflow_id,
        tenant=tenant,
        mode="declared",
        kind="coding",
        name="demo",
        state="running",
        created_at_s=at_s,
    )
    return msgspec.structs.replace(record, **changes)


def call_record(call_id: str, *, tenant: str = "a", workflow_id: str = "wf", ready_at_s: float = 1.0) -> CallRecord:
    return CallRecord(
        call_id=call_id,
        tenant=tenant,
        workflow_id=workflow_id,
        workflow_kind="coding",
        node="plan",
        role="planner",
        kind="llm",
        model="m",
        state="finished",
        attempts=1,
        replica_id="r1",
        device="l40s",
        prompt_key="00",
        prompt_bytes=10,
        prompt_tokens=3,
        work_done=7.0,
        forecast_p50=6.0,
        forecast_p90=9.0,
        forecast_source="empirical",
        ready_at_s=ready_at_s,
        dispatched_at_s=1.5,
        first_token_at_s=None,
        ended_at_s=2.0,
    )


def decision(call_id: str, *, attempt: int = 1, tenant: str = "a") -> Decision:
    call = Call(
        call_id=call_id,
        tenant=tenant,
        kind="llm",
        model="m",
        role="planner",
        workflow_id="wf",
        workflow_kind="coding",
        node="plan",
        prompt_key="00",
        prompt_bytes=10,
        prompt_tokens=3,
        work_limit=100.0,
    )
    seen = Candidates(
        total=2,
        replica_ids=("r1", "r2"),
        in_flight=(0, 1),
        remaining_work=(0.0, 5.0),
        context_tokens=(0.0, 9.0),
        signal_age_s=(None, 0.5),
        cost_s=(1.0, 2.0),
        terms_s={"own": (1.0, 2.0)},
    )
    return Decision(
        call=call,
        attempt=attempt,
        at_s=1.0,
        policy="marginal",
        parameters={"weight": 1.0},
        replica_id="r1",
        runner_up="r2",
        forecast=point(5.0, unit="tokens"),
        candidates=seen,
    )


async def test_an_accepted_workflow_is_found_with_its_events(store: WorkflowStore) -> None:
    await store.accept(workflow(deadline_at_s=9.5), [b"one", b"two"])
    assert await store.workflow("wf", tenant="a") == workflow(deadline_at_s=9.5, seq=2)
    assert [(e.seq, e.at_s, e.body) for e in await store.events("wf")] == [(1, 1.0, b"one"), (2, 1.0, b"two")]


async def test_an_id_is_accepted_once(store: WorkflowStore) -> None:
    await store.accept(workflow(), [b"one"])
    with pytest.raises(StoreError, match="'wf' already exists"):
        await store.accept(workflow(tenant="b"), [b"other"])
    assert [e.body for e in await store.events("wf")] == [b"one"]


async def test_an_append_needs_the_right_place(store: WorkflowStore) -> None:
    await store.accept(workflow(), [b"one"])
    assert not await store.append("wf", [b"x"], expected_seq=0, at_s=2.0)
    assert not await store.append("wf", [b"x"], expected_seq=2, at_s=2.0)
    assert await store.append("wf", [b"two", b"three"], expected_seq=1, at_s=2.0)
    assert [(e.seq, e.at_s, e.body) for e in await store.events("wf")] == [
        (1, 1.0, b"one"),
        (2, 2.0, b"two"),
        (3, 2.0, b"three"),
    ]


async def test_appending_to_an_unknown_workflow_is_an_error(store: WorkflowStore) -> None:
    with pytest.raises(NotFound, match="no workflow 'nix'"):
        await store.append("nix", [b"x"], expected_seq=0, at_s=1.0)


async def test_a_workflow_ends_once_and_keeps_its_outcome(store: WorkflowStore) -> None:
    await store.accept(workflow(), [b"one"])
    assert await store.append("wf", [b"end"], expected_seq=1, at_s=5.0, state="finished", outcome=b"{}")
    assert not await store.append("wf", [b"more"], expected_seq=2, at_s=6.0)
    assert not await store.append("wf", [b"end"], expected_seq=2, at_s=6.0, state="failed", outcome=b"no")
    assert await store.workflow("wf", tenant=None) == workflow(state="finished", seq=2, ended_at_s=5.0, outcome=b"{}")


async def test_a_state_never_goes_back(store: WorkflowStore) -> None:
    await store.accept(workflow(), [])
    assert await store.append("wf", [], expected_seq=0, at_s=2.0, state="cancelling")
    assert not await store.append("wf", [b"x"], expected_seq=0, at_s=2.0, state="running")
    assert await store.append("wf", [b"x"], expected_seq=0, at_s=2.0)
    found = await store.workflow("wf", tenant="a")
    assert found is not None
    assert (found.state, found.seq) == ("cancelling", 1)
    assert await store.append("wf", [], expected_seq=1, at_s=3.0, state="cancelled")


async def test_of_concurrent_appends_with_the_same_place_one_wins(store: WorkflowStore) -> None:
    await store.accept(workflow(), [b"one"])
    won = await asyncio.gather(*(store.append("wf", [str(i).encode()], expected_seq=1, at_s=2.0) for i in range(50)))
    assert sum(won) == 1
    assert [e.body for e in await store.events("wf")] == [b"one", str(won.index(True)).encode()]


async def test_tenants_do_not_see_each_other(store: WorkflowStore) -> None:
    for tenant in ("a", "b"):
        await store.accept(workflow(f"wf-{tenant}", tenant=tenant), [])
        await store.record_call(call_record(f"call-{tenant}", tenant=tenant, workflow_id="shared"))
        await store.record_decision(decision(f"call-{tenant}", tenant=tenant))
        await store.put_blob(tenant, f"image/{tenant}", b"same")
    secret = await store.put_blob("b", "image/png", b"secret")
    assert await store.workflow("wf-b", tenant="a") is None
    assert await store.call("call-b", tenant="a") is None
    assert await store.decisions("call-b", tenant="a") == []
    assert await store.blob(secret, tenant="a") is None
    assert [c.call_id for c in await store.calls("shared", tenant="a")] == ["call-a"]
    page = await store.workflows(tenant="a", state=None, limit=10, cursor=None)
    assert [w.workflow_id for w in page.workflows] == ["wf-a"]
    everything = await store.workflows(tenant=None, state=None, limit=10, cursor=None)
    assert {w.workflow_id for w in everything.workflows} == {"wf-a", "wf-b"}
    assert len(await store.calls("shared", tenant=None)) == 2
    assert await store.blob(secret, tenant=None) == ("image/png", b"secret")


async def test_the_newest_finished_calls_come_oldest_first(store: WorkflowStore) -> None:
    for i in range(10):
        state: Any = "failed" if i == 8 else "finished"
        # Recorded in the order of their ends, which is not that in which they became ready.
        record = call_record(f"c{i}", ready_at_s=float(-i))
        await store.record_call(msgspec.structs.replace(record, state=state, encoding=b"\x00\xff"))
    records = await store.newest_finished(4)
    assert [record.call_id for record in records] == ["c6", "c7", "c9"]
    assert records[0].encoding == b"\x00\xff"


async def test_calls_and_decisions_come_back_equal(store: WorkflowStore) -> None:
    record = call_record("c1")
    await store.record_call(record)
    await store.record_call(msgspec.structs.replace(record, work_done=99.0))
    await store.record_decision(decision("c1"))
    await store.record_decision(decision("c1", attempt=2))
    assert await store.call("c1", tenant="a") == record, "the first record of a call stands"
    assert await store.decisions("c1", tenant="a") == [decision("c1"), decision("c1", attempt=2)]


async def test_a_blob_is_kept_once_under_its_hash(store: WorkflowStore) -> None:
    data = bytes(range(256)) * 1000
    first = await store.put_blob("a", "image/png", data)
    assert await store.put_blob("a", "image/png", data) == first
    assert await store.blob(first, tenant="a") == ("image/png", data)
    assert await store.blob("0" * 64, tenant="a") is None


async def test_pages_are_newest_first_and_stay_stable_while_workflows_arrive(store: WorkflowStore) -> None:
    for i in range(7):
        await store.accept(workflow(f"wf{i}", at_s=float(i // 2)), [])
    seen: list[str] = []
    cursor: str | None = None
    while True:
        page = await store.workflows(tenant="a", state=None, limit=3, cursor=cursor)
        seen += [w.workflow_id for w in page.workflows]
        await store.accept(workflow(f"late{len(seen)}", at_s=100.0 + len(seen)), [])
        cursor = page.next_cursor
        if cursor is None:
            break
    assert seen == ["wf6", "wf5", "wf4", "wf3", "wf2", "wf1", "wf0"]


async def test_pages_filter_by_state(store: WorkflowStore) -> None:
    for i in range(4):
        await store.accept(workflow(f"wf{i}", at_s=float(i)), [])
    await store.append("wf1", [], expected_seq=0, at_s=9.0, state="failed")
    page = await store.workflows(tenant="a", state="failed", limit=4, cursor=None)
    assert [w.workflow_id for w in page.workflows] == ["wf1"]
    assert page.next_cursor is None
    assert [w.workflow_id for w in await store.unfinished()] == ["wf0", "wf2", "wf3"]


@pytest.mark.parametrize("cursor", ["", "x", "????", "W10=", "é"])
async def test_a_foreign_cursor_is_refused(store: WorkflowStore, cursor: str) -> None:
    with pytest.raises(NotFound, match="start from the first page"):
        await store.workflows(tenant="a", state=None, limit=1, cursor=cursor)


async def test_a_failed_write_does_not_spoil_the_others_of_its_batch(store: WorkflowStore) -> None:
    await store.accept(workflow("wf0"), [])
    results = await asyncio.gather(
        *(store.accept(workflow(f"wf{i % 20}"), [b"e"]) for i in range(40)), return_exceptions=True
    )
    assert sum(isinstance(r, StoreError) for r in results) == 21
    assert len(await store.unfinished()) == 20


async def test_a_closed_store_says_so(store: WorkflowStore) -> None:
    await store.close()
    await store.close()
    with pytest.raises(StoreError, match="not open"):
        await store.unfinished()


async def test_reopening_keeps_everything(lasting: Place) -> None:
    store = await lasting.opened()
    await store.accept(workflow(), [b"one"])
    blob = await store.put_blob("a", "image/png", b"x")
    await store.close()
    again = await lasting.opened()
    assert [e.body for e in await again.events("wf")] == [b"one"]
    assert await again.blob(blob, tenant="a") == ("image/png", b"x")
    await again.close()


async def test_a_file_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "swarmx.db"
    store = SqliteStore(path)
    await store.open()
    await store.close()
    assert path.stat().st_mode & 0o077 == 0, "there are prompts in it"


async def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "swarmx.db"
    store = SqliteStore(path)
    await store.open()
    await store.close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE schema_version SET version = 99")
    connection.close()
    with pytest.raises(StoreError, match="schema 99"):
        await SqliteStore(path).open()


async def test_a_path_that_cannot_be_opened_and_a_file_that_is_no_database_are_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"missing/swarmx\.db cannot be opened"):
        await SqliteStore(tmp_path / "missing" / "swarmx.db").open()
    garbage = tmp_path / "garbage.db"
    garbage.write_bytes(b"not a database at all" * 100)
    with pytest.raises(StoreError, match="not a sound SQLite database"):
        await SqliteStore(garbage).open()


async def test_a_database_that_another_process_locks_is_an_error_that_says_so(tmp_path: Path) -> None:
    path = tmp_path / "swarmx.db"
    store = SqliteStore(path, busy_timeout_s=0.01)
    await store.open()
    epoch = await store.enlist("me", ttl_s=10.0, exclusive=True)
    await store.accept(workflow(owner=epoch), [])
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    step = Commit(workflow_id="wf", epoch=epoch, expected_seq=0, at_s=2.0, events=(b"one",))
    writes = (
        lambda: store.accept(workflow("w2"), []),
        lambda: store.commit(step),
        lambda: store.post("wf", b"x", dedup="d", tenant=None),
        lambda: store.claim(epoch, limit=9),
    )
    for write in writes:
        with pytest.raises(StoreError, match="locked"):
            await write()
    other.execute("ROLLBACK")
    other.close()
    assert await store.commit(step) == "stored"
    assert await store.post("wf", b"x", dedup="d", tenant=None)
    await store.accept(workflow("w2"), [])
    await store.close()


_FILLER = """
import asyncio, sys
from swarmx.core.errors import StoreError
from swarmx.memory.sqlite import SqliteStore
async def main():
    store = SqliteStore(sys.argv[1]); await store.open()
    try:
        for i in range(10_000):
            await store.put_blob("a", "image/png", i.to_bytes(4, "big") * 10_000)
    except StoreError as error:
        print(error)
asyncio.run(main())
"""


@pytest.mark.process
async def test_a_full_disk_is_an_error_that_says_so(tmp_path: Path) -> None:
    def small_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    path = tmp_path / "swarmx.db"
    done = subprocess.run(
        [sys.executable, "-c", _FILLER, str(path)], capture_output=True, text=True, check=True, preexec_fn=small_disk
    )
    assert re.search("the database refused .*disk", done.stdout), done.stdout
    again = SqliteStore(path)
    await again.open()
    await again.accept(workflow(), [b"there is room again"])
    await again.close()


_WRITER = """
import asyncio, sys
from swarmx.core.records import WorkflowRecord
from swarmx.memory.sqlite import SqliteStore
async def write(store, i):
    record = WorkflowRecord(workflow_id=f"wf{i}", tenant="a", mode="declared", kind="k", name="n", state="running",
                            created_at_s=1.0)
    await store.accept(record, [b"first"])
    for seq in range(1, 100_000):
        assert await store.append(f"wf{i}", [f"{i}/{seq}".encode() * 20], expected_seq=seq, at_s=1.0)
        print(i, seq + 1, flush=True)
async def main():
    store = SqliteStore(sys.argv[1]); await store.open()
    await asyncio.gather(*(write(store, i) for i in range(8)))
asyncio.run(main())
"""


@pytest.mark.process
async def test_killing_a_writer_in_mid_write_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "swarmx.db"
    writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    acknowledged: dict[str, int] = {}
    for count, line in enumerate(writer.stdout):
        name, seq = line.split()
        acknowledged[name] = int(seq)
        if count == 300:
            os.kill(writer.pid, signal.SIGKILL)
            break
    for line in writer.stdout:  # what it still said before it died
        if line.endswith("\n"):
            name, seq = line.split()
            acknowledged[name] = int(seq)
    writer.stdout.close()
    assert writer.wait() == -signal.SIGKILL
    store = SqliteStore(path)
    await store.open()
    for name, last in acknowledged.items():
        record = await store.workflow(f"wf{name}", tenant="a")
        events = await store.events(f"wf{name}")
        assert record is not None
        assert record.seq == len(events) >= last
        assert [e.seq for e in events] == list(range(1, len(events) + 1))
    await store.close()
