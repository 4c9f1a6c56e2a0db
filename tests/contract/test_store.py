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
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from swarmx.core.errors import NotFound, StoreError
from swarmx.core.forecast import point
from swarmx.core.nouns import Call, Candidates, Decision
from swarmx.core.ports import Store
from swarmx.core.records import TERMINAL, CallRecord, WorkflowRecord
from swarmx.memory.sqlite import SqliteStore


@pytest.fixture(params=["file", "memory"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    opened = SqliteStore(tmp_path / "swarmx.db" if request.param == "file" else ":memory:")
    await opened.open()
    yield opened
    await opened.close()


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


async def test_an_accepted_workflow_is_found_with_its_events(store: Store) -> None:
    await store.accept(workflow(deadline_at_s=9.5), [b"one", b"two"])
    assert await store.workflow("wf", tenant="a") == workflow(deadline_at_s=9.5, seq=2)
    assert [(e.seq, e.at_s, e.body) for e in await store.events("wf")] == [(1, 1.0, b"one"), (2, 1.0, b"two")]


async def test_an_id_is_accepted_once(store: Store) -> None:
    await store.accept(workflow(), [b"one"])
    with pytest.raises(StoreError, match="'wf' already exists"):
        await store.accept(workflow(tenant="b"), [b"other"])
    assert [e.body for e in await store.events("wf")] == [b"one"]


async def test_an_append_needs_the_right_place(store: Store) -> None:
    await store.accept(workflow(), [b"one"])
    assert not await store.append("wf", [b"x"], expected_seq=0, at_s=2.0)
    assert not await store.append("wf", [b"x"], expected_seq=2, at_s=2.0)
    assert await store.append("wf", [b"two", b"three"], expected_seq=1, at_s=2.0)
    assert [(e.seq, e.at_s, e.body) for e in await store.events("wf")] == [
        (1, 1.0, b"one"),
        (2, 2.0, b"two"),
        (3, 2.0, b"three"),
    ]


async def test_appending_to_an_unknown_workflow_is_an_error(store: Store) -> None:
    with pytest.raises(NotFound, match="no workflow 'nix'"):
        await store.append("nix", [b"x"], expected_seq=0, at_s=1.0)


async def test_a_workflow_ends_once_and_keeps_its_outcome(store: Store) -> None:
    await store.accept(workflow(), [b"one"])
    assert await store.append("wf", [b"end"], expected_seq=1, at_s=5.0, state="finished", outcome=b"{}")
    assert not await store.append("wf", [b"more"], expected_seq=2, at_s=6.0)
    assert not await store.append("wf", [b"end"], expected_seq=2, at_s=6.0, state="failed", outcome=b"no")
    assert await store.workflow("wf", tenant=None) == workflow(state="finished", seq=2, ended_at_s=5.0, outcome=b"{}")


async def test_a_state_never_goes_back(store: Store) -> None:
    await store.accept(workflow(), [])
    assert await store.append("wf", [], expected_seq=0, at_s=2.0, state="cancelling")
    assert not await store.append("wf", [b"x"], expected_seq=0, at_s=2.0, state="running")
    assert await store.append("wf", [b"x"], expected_seq=0, at_s=2.0)
    found = await store.workflow("wf", tenant="a")
    assert found is not None
    assert (found.state, found.seq) == ("cancelling", 1)
    assert await store.append("wf", [], expected_seq=1, at_s=3.0, state="cancelled")


async def test_of_concurrent_appends_with_the_same_place_one_wins(store: Store) -> None:
    await store.accept(workflow(), [b"one"])
    won = await asyncio.gather(*(store.append("wf", [str(i).encode()], expected_seq=1, at_s=2.0) for i in range(50)))
    assert sum(won) == 1
    assert [e.body for e in await store.events("wf")] == [b"one", str(won.index(True)).encode()]


async def test_tenants_do_not_see_each_other(store: Store) -> None:
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


async def test_calls_and_decisions_come_back_equal(store: Store) -> None:
    record = call_record("c1")
    await store.record_call(record)
    await store.record_call(msgspec.structs.replace(record, work_done=99.0))
    await store.record_decision(decision("c1"))
    await store.record_decision(decision("c1", attempt=2))
    assert await store.call("c1", tenant="a") == record, "the first record of a call stands"
    assert await store.decisions("c1", tenant="a") == [decision("c1"), decision("c1", attempt=2)]


async def test_a_blob_is_kept_once_under_its_hash(store: Store) -> None:
    data = bytes(range(256)) * 1000
    first = await store.put_blob("a", "image/png", data)
    assert await store.put_blob("a", "image/png", data) == first
    assert await store.blob(first, tenant="a") == ("image/png", data)
    assert await store.blob("0" * 64, tenant="a") is None


async def test_pages_are_newest_first_and_stay_stable_while_workflows_arrive(store: Store) -> None:
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


async def test_pages_filter_by_state(store: Store) -> None:
    for i in range(4):
        await store.accept(workflow(f"wf{i}", at_s=float(i)), [])
    await store.append("wf1", [], expected_seq=0, at_s=9.0, state="failed")
    page = await store.workflows(tenant="a", state="failed", limit=4, cursor=None)
    assert [w.workflow_id for w in page.workflows] == ["wf1"]
    assert page.next_cursor is None
    assert [w.workflow_id for w in await store.unfinished()] == ["wf0", "wf2", "wf3"]


@pytest.mark.parametrize("cursor", ["", "x", "????", "W10=", "é"])
async def test_a_foreign_cursor_is_refused(store: Store, cursor: str) -> None:
    with pytest.raises(NotFound, match="start from the first page"):
        await store.workflows(tenant="a", state=None, limit=1, cursor=cursor)


async def test_a_failed_write_does_not_spoil_the_others_of_its_batch(store: Store) -> None:
    await store.accept(workflow("wf0"), [])
    results = await asyncio.gather(
        *(store.accept(workflow(f"wf{i % 20}"), [b"e"]) for i in range(40)), return_exceptions=True
    )
    assert sum(isinstance(r, StoreError) for r in results) == 21
    assert len(await store.unfinished()) == 20


async def test_a_closed_store_says_so(store: Store) -> None:
    await store.close()
    await store.close()
    with pytest.raises(StoreError, match="not open"):
        await store.unfinished()


async def test_reopening_keeps_everything(tmp_path: Path) -> None:
    path = tmp_path / "swarmx.db"
    store = SqliteStore(path)
    await store.open()
    await store.accept(workflow(), [b"one"])
    blob = await store.put_blob("a", "image/png", b"x")
    await store.close()
    assert path.stat().st_mode & 0o077 == 0, "prompts are readable by the owner only"
    again = SqliteStore(path)
    await again.open()
    assert [e.body for e in await again.events("wf")] == [b"one"]
    assert await again.blob(blob, tenant="a") == ("image/png", b"x")
    await again.close()


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
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="locked"):
        await store.accept(workflow(), [])
    other.execute("ROLLBACK")
    other.close()
    await store.accept(workflow(), [])
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


_ids = st.sampled_from(["w0", "w1", "w2"])
_tenants = st.sampled_from(["a", "b"])
_bodies = st.lists(st.binary(max_size=3), max_size=3)
_states = st.sampled_from(["running", "cancelling", "finished", "failed", "cancelled"])


class StoreMachine(RuleBasedStateMachine):
    """The store against a dict that does the same."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.store = SqliteStore(":memory:")
        self.loop.run_until_complete(self.store.open())
        self.model: dict[str, tuple[WorkflowRecord, list[bytes]]] = {}

    def teardown(self) -> None:
        self.loop.run_until_complete(self.store.close())
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()

    @rule(
        id=_ids, tenant=_tenants, at_s=st.sampled_from([1.0, 2.0]), events=st.lists(st.binary(max_size=3), max_size=3)
    )
    def accept(self, id: str, tenant: str, at_s: float, events: list[bytes]) -> None:
        record = workflow(id, tenant=tenant, at_s=at_s)
        try:
            self.loop.run_until_complete(self.store.accept(record, events))
        except StoreError:
            assert id in self.model
        else:
            assert id not in self.model
            self.model[id] = (msgspec.structs.replace(record, seq=len(events)), list(events))

    @rule(
        id=_ids,
        events=_bodies,
        expected_seq=st.integers(0, 4),
        state=st.none() | _states,
    )
    def append(self, id: str, events: list[bytes], expected_seq: int, state: Any) -> None:
        try:
            won = self.loop.run_until_complete(
                self.store.append(id, events, expected_seq=expected_seq, at_s=3.0, state=state, outcome=b"o")
            )
        except NotFound:
            assert id not in self.model
            return
        record, bodies = self.model[id]
        back = record.state == "cancelling" and state == "running"
        assert won == (record.state not in TERMINAL and record.seq == expected_seq and not back)
        if won:
            ends = {"ended_at_s": 3.0, "outcome": b"o"} if state in TERMINAL else {}
            changed = {"seq": record.seq + len(events), "state": state or record.state, **ends}
            self.model[id] = (msgspec.structs.replace(record, **changed), bodies + events)

    @invariant()
    def reads_agree(self) -> None:
        read = self.loop.run_until_complete
        for id in ("w0", "w1", "w2"):
            record, bodies = self.model.get(id, (None, []))
            assert read(self.store.workflow(id, tenant=None)) == record
            assert [e.body for e in read(self.store.events(id))] == bodies
        for tenant in ("a", "b"):
            newest = sorted(
                (r for r, _ in self.model.values() if r.tenant == tenant),
                key=lambda r: (r.created_at_s, r.workflow_id),
                reverse=True,
            )
            page = read(self.store.workflows(tenant=tenant, state=None, limit=10, cursor=None))
            assert page.workflows == newest
        open_ids = {r.workflow_id for r, _ in self.model.values() if r.state not in TERMINAL}
        assert {r.workflow_id for r in read(self.store.unfinished())} == open_ids


TestStoreAgainstItsModel = StoreMachine.TestCase
TestStoreAgainstItsModel.settings = settings(
    max_examples=30, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
