"""A store knows who runs which workflow: a former owner changes nothing; what belongs together is written together."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Coroutine
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from swarmx.core.errors import KeyReused, NotFound
from swarmx.core.records import TERMINAL, Blob, Commit, Idempotency, WorkflowRecord
from swarmx.memory import schema
from swarmx.memory.sqlite import SqliteStore
from tests.contract.test_store import call_record, workflow

T = TypeVar("T")
PNG = Blob(sha256=sha256(b"png").hexdigest(), media_type="image/png", data=b"png")


class StoreClock:
    def __init__(self) -> None:
        self.time_s = 100.0

    def __call__(self) -> float:
        return self.time_s


@pytest.fixture
def clock() -> StoreClock:
    return StoreClock()


@pytest.fixture(params=["file", "memory"])
async def store(request: pytest.FixtureRequest, tmp_path: Path, clock: StoreClock) -> AsyncIterator[SqliteStore]:
    opened = SqliteStore(tmp_path / "swarmx.db" if request.param == "file" else ":memory:", clock=clock)
    await opened.open()
    yield opened
    await opened.close()


def change(epoch: int, seq: int, *events: bytes, workflow_id: str = "wf", **more: Any) -> Commit:
    return Commit(workflow_id=workflow_id, epoch=epoch, expected_seq=seq, at_s=5.0, events=events, **more)


async def accepted(store: SqliteStore, *, ttl_s: float = 10.0) -> int:
    epoch = await store.enlist("me", ttl_s=ttl_s, exclusive=False)
    await store.accept(workflow(owner=epoch), [b"one"])
    return epoch


async def test_a_commit_writes_all_that_belongs_together(store: SqliteStore) -> None:
    epoch = await accepted(store)
    await store.post("wf", b"cancel", dedup="c", tenant="a")
    number = (await store.inputs("wf"))[0].number
    call = call_record("c1")
    done = await store.commit(
        change(epoch, 1, b"two", b"end", state="finished", outcome=b"{}", calls=(call,), blobs=(PNG,), taken=(number,))
    )
    assert done == "stored"
    record = await store.workflow("wf", tenant="a")
    assert record == workflow(owner=epoch, state="finished", seq=3, ended_at_s=5.0, outcome=b"{}")
    assert [event.body for event in await store.events("wf")] == [b"one", b"two", b"end"]
    assert await store.call("c1", tenant="a") == call
    assert await store.blob(PNG.sha256, tenant="a") == ("image/png", b"png")
    assert await store.inputs("wf") == []


@pytest.mark.parametrize(("epoch", "seq", "said"), [(0, 1, "lost"), (99, 1, "lost"), (1, 0, "lost"), (1, 2, "lost")])
async def test_a_commit_from_another_place_changes_nothing_at_all(
    store: SqliteStore, epoch: int, seq: int, said: str
) -> None:
    assert await accepted(store) == 1
    before = await store.workflow("wf", tenant="a")
    lost = change(epoch, seq, b"x", state="failed", calls=(call_record("c1"),), blobs=(PNG,))
    assert await store.commit(lost) == said
    assert await store.workflow("wf", tenant="a") == before
    assert await store.call("c1", tenant="a") is None
    assert await store.blob(PNG.sha256, tenant="a") is None


async def test_after_the_end_nothing_is_written(store: SqliteStore) -> None:
    epoch = await accepted(store)
    assert await store.commit(change(epoch, 1, b"end", state="cancelled")) == "stored"
    assert await store.commit(change(epoch, 2, b"end", state="finished")) == "ended"
    assert await store.take("wf", epoch) is None
    assert not await store.post("wf", b"x", dedup="d", tenant="a")


async def test_a_commit_to_an_unknown_workflow_is_an_error(store: SqliteStore) -> None:
    with pytest.raises(NotFound, match="no workflow 'nix'"):
        await store.commit(change(1, 0, workflow_id="nix"))


async def test_a_commit_of_a_former_owner_changes_nothing(store: SqliteStore) -> None:
    first = await accepted(store)
    second = await store.enlist("other", ttl_s=10.0, exclusive=False)
    taken = await store.take("wf", second)
    assert taken is not None
    assert taken.owner == second > first
    assert await store.commit(change(first, 1, b"x")) == "lost"
    assert await store.commit(change(second, 1, b"y")) == "stored"


async def test_workflows_are_claimed_only_once_their_owner_is_gone(store: SqliteStore, clock: StoreClock) -> None:
    first = await accepted(store)
    second = await store.enlist("other", ttl_s=10.0, exclusive=False)
    assert await store.claim(second, limit=9) == []
    clock.time_s += 9.0
    assert await store.heartbeat(first, ttl_s=10.0)
    assert await store.heartbeat(second, ttl_s=20.0)
    clock.time_s += 9.0
    assert await store.claim(second, limit=9) == []
    clock.time_s += 2.0
    assert [record.workflow_id for record in await store.claim(second, limit=9)] == ["wf"]
    assert not await store.heartbeat(first, ttl_s=10.0)
    assert await store.claim(first, limit=9) == [], "an epoch that is over claims nothing"


async def test_a_retired_or_ended_epoch_leaves_its_workflows_at_once(store: SqliteStore) -> None:
    await store.retire(await accepted(store))
    second = await store.enlist("other", ttl_s=10.0, exclusive=False)
    assert len(await store.claim(second, limit=9)) == 1
    third = await store.enlist("alone", ttl_s=10.0, exclusive=True)
    assert not await store.heartbeat(second, ttl_s=10.0)
    assert len(await store.claim(third, limit=9)) == 1
    assert third > second


async def test_claims_are_bounded_and_take_the_oldest_first_but_no_transparent_ones(store: SqliteStore) -> None:
    for i in range(5):
        await store.accept(workflow(f"wf{i}", at_s=9.0 - i), [])
    await store.accept(workflow("t", mode="transparent"), [])
    epoch = await store.enlist("me", ttl_s=10.0, exclusive=True)
    claimed = [[r.workflow_id for r in await store.claim(epoch, limit=3)] for _ in range(3)]
    assert claimed == [["wf4", "wf3", "wf2"], ["wf1", "wf0"], []]


async def test_of_many_claims_at_once_each_workflow_has_one_winner(store: SqliteStore) -> None:
    for i in range(20):
        await store.accept(workflow(f"wf{i}"), [])
    epochs = [await store.enlist(str(i), ttl_s=10.0, exclusive=False) for i in range(4)]
    claims = await asyncio.gather(*(store.claim(epoch, limit=3) for epoch in epochs * 3))
    ids = [record.workflow_id for claim in claims for record in claim]
    assert sorted(ids) == sorted(f"wf{i}" for i in range(20))


async def test_nobody_appends_to_a_workflow_that_is_run(store: SqliteStore) -> None:
    epoch = await accepted(store)
    assert not await store.append("wf", [b"x"], expected_seq=1, at_s=2.0)
    await store.retire(epoch)
    assert await store.append("wf", [b"x"], expected_seq=1, at_s=2.0)


async def test_what_is_posted_waits_in_order_until_it_is_taken_and_comes_once(store: SqliteStore) -> None:
    epoch = await accepted(store)
    assert await store.post("wf", b"1", dedup="a", tenant="a")
    assert await store.post("wf", b"2", dedup="b", tenant=None)
    assert not await store.post("wf", b"again", dedup="a", tenant="a")
    assert [item.body for item in await store.inputs("wf")] == [b"1", b"2"]
    assert await store.waiting(epoch) == ["wf"]
    assert await store.waiting(epoch + 1) == []
    first = (await store.inputs("wf"))[0].number
    assert await store.commit(change(epoch, 1, b"e", taken=(first,))) == "stored"
    assert [item.body for item in await store.inputs("wf")] == [b"2"]
    assert not await store.post("wf", b"again", dedup="a", tenant="a"), "also after it was taken"
    with pytest.raises(NotFound):
        await store.post("wf", b"x", dedup="x", tenant="b")


async def test_events_are_read_from_any_place(store: SqliteStore) -> None:
    await store.accept(workflow(), [b"1", b"2", b"3", b"4"])
    assert [event.body for event in await store.events("wf", after=2)] == [b"3", b"4"]
    assert [event.seq for event in await store.events("wf", after=1, limit=2)] == [2, 3]
    assert await store.events("wf", after=4) == []


async def test_a_key_brings_its_first_workflow_until_it_expires(store: SqliteStore) -> None:
    key = Idempotency(key="k", fingerprint="f", expires_at_s=50.0)
    first = await store.accept(workflow("w1"), [b"e"], idempotency=key)
    again = await store.accept(workflow("w2", at_s=49.0), [b"e"], idempotency=key)
    assert [(a.workflow_id, a.replayed) for a in (first, again)] == [("w1", False), ("w1", True)]
    assert await store.workflow("w2", tenant=None) is None
    other = msgspec.structs.replace(key, fingerprint="g")
    with pytest.raises(KeyReused, match="came with another request before, which became w1"):
        await store.accept(workflow("w3", at_s=49.0), [], idempotency=other)
    late = await store.accept(workflow("w4", at_s=50.0), [], idempotency=other)
    assert (late.workflow_id, late.replayed) == ("w4", False)


async def test_a_database_of_schema_2_with_running_workflows_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "swarmx.db"
    with sqlite3.connect(path) as old:
        old.execute("CREATE TABLE schema_version (version INTEGER NOT NULL)")
        old.execute("INSERT INTO schema_version VALUES (2)")
        for statement in (statement for step in schema.MIGRATIONS[:2] for statement in step):
            old.execute(statement)
        row = ("wf", "a", "declared", "coding", "demo", "running", 1.0, None, None, 1, None, 1)
        old.execute("INSERT INTO workflows VALUES (?,?,?,?,?,?,?,?,?,?,?,?)", row)
        old.execute("INSERT INTO events VALUES ('wf', 1, 'a', 1.0, X'6f6e65', 1)")
    old.close()
    store = SqliteStore(path)
    await store.open()
    assert await store.workflow("wf", tenant="a") == workflow(seq=1)
    epoch = await store.enlist("me", ttl_s=10.0, exclusive=True)
    assert [record.seq for record in await store.claim(epoch, limit=9)] == [1]
    assert await store.commit(change(epoch, 1, b"two")) == "stored"
    await store.close()


_ids = st.sampled_from(["w0", "w1"])
_bodies = st.lists(st.binary(max_size=2), max_size=2)


class OwnershipMachine(RuleBasedStateMachine):
    """The store against dicts that do the same: fences hold, keys and inputs count once, ends are final."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.clock = StoreClock()
        self.folder = TemporaryDirectory(prefix="swarmx-owners-")
        self.store = self.opened()
        self.records: dict[str, WorkflowRecord] = {}
        self.events: dict[str, list[bytes]] = {}
        self.inbox: dict[str, dict[str, bytes]] = {}
        self.taken: dict[str, set[str]] = {}
        self.keys: dict[str, tuple[str, str]] = {}
        self.calls: set[str] = set()
        self.owners: dict[int, float] = {}
        self.epochs: list[int] = [0]

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    def opened(self) -> SqliteStore:
        store = SqliteStore(Path(self.folder.name) / "swarmx.db", clock=self.clock)
        self.do(store.open())
        return store

    def teardown(self) -> None:
        self.do(self.store.close())
        self.do(self.loop.shutdown_default_executor())
        self.loop.close()
        self.folder.cleanup()

    def open_ids(self) -> set[str]:
        return {id for id, record in self.records.items() if record.state not in TERMINAL}

    @rule(id=_ids, events=_bodies, key=st.none() | st.sampled_from(["k0", "k1"]), print_=st.sampled_from(["f", "g"]))
    def accept(self, id: str, events: list[bytes], key: str | None, print_: str) -> None:
        epoch = self.epochs[-1]
        record = workflow(id, owner=epoch)
        idempotency = None if key is None else Idempotency(key=key, fingerprint=print_, expires_at_s=1e9)
        known = self.keys.get(key or "")
        if known is not None and known[1] != print_:
            with pytest.raises(KeyReused):
                self.do(self.store.accept(record, events, idempotency=idempotency))
            return
        if known is None and id in self.records:
            return  # an id that is there already: tests/contract/test_store.py
        accepted = self.do(self.store.accept(record, events, idempotency=idempotency))
        assert accepted.replayed == (known is not None)
        assert accepted.workflow_id == (known[0] if known else id)
        if known is None:
            self.records[id] = msgspec.structs.replace(record, seq=len(events))
            self.events[id], self.inbox[id], self.taken[id] = list(events), {}, set()
            if key is not None:
                self.keys[key] = (id, print_)

    @precondition(lambda self: self.records)
    @rule(
        data=st.data(),
        events=_bodies,
        behind=st.sampled_from([0, 0, 0, 1]),
        state=st.sampled_from([None, None, "cancelling", "finished", "failed", "cancelled", "running"]),
        call=st.none() | st.sampled_from(["c0", "c1"]),
        take=st.booleans(),
    )
    def commit(self, data: Any, events: list[bytes], behind: int, state: Any, call: str | None, take: bool) -> None:
        id = data.draw(st.sampled_from(sorted(self.records)))
        epoch = data.draw(st.sampled_from(self.epochs[-3:]))
        record = self.records[id]
        waiting = self.do(self.store.inputs(id))[:1] if take else []
        done = self.do(
            self.store.commit(
                change(
                    epoch,
                    record.seq + behind,
                    *events,
                    workflow_id=id,
                    state=state,
                    outcome=b"o",
                    taken=tuple(item.number for item in waiting),
                    calls=() if call is None else (call_record(call, workflow_id=id),),
                )
            )
        )
        back = record.state == "cancelling" and state == "running"
        ours = record.owner == epoch and not behind and not back
        assert done == ("ended" if record.state in TERMINAL else "stored" if ours else "lost")
        if done != "stored":
            return
        ends = {"ended_at_s": 5.0, "outcome": b"o"} if state in TERMINAL else {}
        changed = {"seq": record.seq + len(events), "state": state or record.state, **ends}
        self.records[id] = msgspec.structs.replace(record, **changed)
        self.events[id] += events
        self.calls |= {call} if call else set()
        for item in waiting:
            self.taken[id] |= {name for name, body in self.inbox[id].items() if body == item.body}

    @rule(id=_ids, name=st.sampled_from(["d0", "d1"]))
    def post(self, id: str, name: str) -> None:
        if id not in self.records:
            with pytest.raises(NotFound):
                self.do(self.store.post(id, name.encode(), dedup=name, tenant="a"))
            return
        new = self.do(self.store.post(id, name.encode(), dedup=name, tenant="a"))
        assert new == (id in self.open_ids() and name not in self.inbox[id])
        if new:
            self.inbox[id][name] = name.encode()

    @rule(exclusive=st.booleans())
    def enlist(self, exclusive: bool) -> None:
        epoch = self.do(self.store.enlist("p", ttl_s=10.0, exclusive=exclusive))
        assert epoch > self.epochs[-1], "also after owners were deleted and the store was reopened"
        self.owners = {} if exclusive else self.owners
        self.owners[epoch] = self.clock.time_s + 10.0
        self.epochs.append(epoch)

    @rule(data=st.data())
    def heartbeat(self, data: Any) -> None:
        epoch = data.draw(st.sampled_from(self.epochs))
        assert self.do(self.store.heartbeat(epoch, ttl_s=10.0)) == (epoch in self.owners)
        if epoch in self.owners:
            self.owners[epoch] = self.clock.time_s + 10.0

    @rule(data=st.data())
    def retire(self, data: Any) -> None:
        epoch = data.draw(st.sampled_from(self.epochs))
        self.do(self.store.retire(epoch))
        self.owners.pop(epoch, None)

    @rule(seconds=st.sampled_from([3.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.time_s += seconds

    @rule(data=st.data(), limit=st.integers(1, 3))
    def claim(self, data: Any, limit: int) -> None:
        epoch = data.draw(st.sampled_from(self.epochs[-3:]))
        claimed = self.do(self.store.claim(epoch, limit=limit))
        self.owners = {e: at_s for e, at_s in self.owners.items() if at_s > self.clock.time_s or e == epoch}
        free = sorted(id for id in self.open_ids() if self.records[id].owner not in self.owners)
        expected = free[:limit] if epoch in self.owners else []
        assert [record.workflow_id for record in claimed] == expected
        for id in expected:
            self.records[id] = msgspec.structs.replace(self.records[id], owner=epoch)

    @rule(id=_ids, data=st.data())
    def take(self, id: str, data: Any) -> None:
        epoch = data.draw(st.sampled_from(self.epochs[-2:]))
        taken = self.do(self.store.take(id, epoch))
        assert (taken is not None) == (id in self.open_ids())
        if taken is not None:
            self.records[id] = msgspec.structs.replace(self.records[id], owner=epoch)

    @rule()
    def reopen(self) -> None:
        """Another store opens the file while the first one still has it."""
        left = self.store
        self.store = self.opened()
        self.do(left.close())

    @invariant()
    def reads_agree(self) -> None:
        for id, record in self.records.items():
            assert self.do(self.store.workflow(id, tenant="a")) == record
            assert [event.body for event in self.do(self.store.events(id))] == self.events[id]
            left = [body for name, body in self.inbox[id].items() if name not in self.taken[id]]
            waiting = [item.body for item in self.do(self.store.inputs(id))]
            assert waiting == (left if id in self.open_ids() else [])
        for call in ("c0", "c1"):
            assert (self.do(self.store.call(call, tenant="a")) is not None) == (call in self.calls)


TestStoreAndItsOwners = OwnershipMachine.TestCase
TestStoreAndItsOwners.settings = settings(
    max_examples=12, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
