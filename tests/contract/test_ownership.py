"""A store knows who runs which workflow: a former owner changes nothing; what belongs together is written together."""

from __future__ import annotations

import asyncio
import sqlite3
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import pytest

from swarmx.core.errors import KeyReused, NotFound
from swarmx.core.ports import WorkflowStore
from swarmx.core.records import Blob, Commit, Idempotency
from swarmx.memory import schema
from swarmx.memory.sqlite import SqliteStore
from tests.contract.places import Place
from tests.contract.test_store import call_record, workflow

PNG = Blob(sha256=sha256(b"png").hexdigest(), media_type="image/png", data=b"png")


def change(epoch: int, seq: int, *events: bytes, workflow_id: str = "wf", **more: Any) -> Commit:
    return Commit(workflow_id=workflow_id, epoch=epoch, expected_seq=seq, at_s=5.0, events=events, **more)


async def accepted(store: WorkflowStore, *, ttl_s: float = 100.0) -> int:
    epoch = await store.enlist("me", ttl_s=ttl_s, exclusive=False)
    await store.accept(workflow(owner=epoch), [b"one"])
    return epoch


async def test_a_commit_writes_all_that_belongs_together(store: WorkflowStore) -> None:
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
    store: WorkflowStore, epoch: int, seq: int, said: str
) -> None:
    assert await accepted(store) == 1
    before = await store.workflow("wf", tenant="a")
    lost = change(epoch, seq, b"x", state="failed", calls=(call_record("c1"),), blobs=(PNG,))
    assert await store.commit(lost) == said
    assert await store.workflow("wf", tenant="a") == before
    assert await store.call("c1", tenant="a") is None
    assert await store.blob(PNG.sha256, tenant="a") is None


async def test_after_the_end_nothing_is_written(store: WorkflowStore) -> None:
    epoch = await accepted(store)
    assert await store.commit(change(epoch, 1, b"end", state="cancelled")) == "stored"
    assert await store.commit(change(epoch, 2, b"end", state="finished")) == "ended"
    assert await store.take("wf", epoch) is None
    assert not await store.post("wf", b"x", dedup="d", tenant="a")


async def test_a_commit_to_an_unknown_workflow_is_an_error(store: WorkflowStore) -> None:
    with pytest.raises(NotFound, match="no workflow 'nix'"):
        await store.commit(change(1, 0, workflow_id="nix"))


async def test_a_commit_of_a_former_owner_changes_nothing(store: WorkflowStore) -> None:
    first = await accepted(store)
    second = await store.enlist("other", ttl_s=100.0, exclusive=False)
    taken = await store.take("wf", second)
    assert taken is not None
    assert taken.owner == second > first
    assert await store.commit(change(first, 1, b"x")) == "lost"
    assert await store.commit(change(second, 1, b"y")) == "stored"


async def test_workflows_are_claimed_only_once_their_owner_is_gone(store: WorkflowStore, place: Place) -> None:
    first = await accepted(store)
    second = await store.enlist("other", ttl_s=100.0, exclusive=False)
    assert await store.claim(second, limit=9) == []
    await place.passes(90.0)
    assert await store.heartbeat(first, ttl_s=100.0)
    assert await store.heartbeat(second, ttl_s=200.0)
    await place.passes(90.0)
    assert await store.claim(second, limit=9) == []
    await place.passes(20.0)
    assert [record.workflow_id for record in await store.claim(second, limit=9)] == ["wf"]
    assert not await store.heartbeat(first, ttl_s=100.0)
    assert await store.claim(first, limit=9) == [], "an epoch that is over claims nothing"


async def test_a_retired_or_ended_epoch_leaves_its_workflows_at_once(store: WorkflowStore) -> None:
    await store.retire(await accepted(store))
    second = await store.enlist("other", ttl_s=100.0, exclusive=False)
    assert len(await store.claim(second, limit=9)) == 1
    third = await store.enlist("alone", ttl_s=100.0, exclusive=True)
    assert not await store.heartbeat(second, ttl_s=100.0)
    assert len(await store.claim(third, limit=9)) == 1
    assert third > second


async def test_claims_are_bounded_and_take_the_oldest_first_but_no_transparent_ones(store: WorkflowStore) -> None:
    for i in range(5):
        await store.accept(workflow(f"wf{i}", at_s=9.0 - i), [])
    await store.accept(workflow("t", mode="transparent"), [])
    epoch = await store.enlist("me", ttl_s=100.0, exclusive=True)
    claimed = [[r.workflow_id for r in await store.claim(epoch, limit=3)] for _ in range(3)]
    assert claimed == [["wf4", "wf3", "wf2"], ["wf1", "wf0"], []]


async def test_transparent_workflows_have_an_owner_too_and_anybody_writes_to_them(
    store: WorkflowStore, place: Place
) -> None:
    first = await store.enlist("first", ttl_s=100.0, exclusive=False)
    second = await store.enlist("second", ttl_s=1000.0, exclusive=False)
    await store.accept(workflow("t", mode="transparent", owner=first), [b"1"])
    await store.accept(workflow("wf", owner=first), [b"1"])
    assert await store.claim(second, limit=9, mode="transparent") == [], "its owner lives"
    assert await store.append("t", [b"2"], expected_seq=1, at_s=2.0)
    assert not await store.append("wf", [b"2"], expected_seq=1, at_s=2.0)
    await place.passes(500.0)
    (taken,) = await store.claim(second, limit=9, mode="transparent")
    assert (taken.workflow_id, taken.owner) == ("t", second)
    assert await store.take("t", second) is None, "not as a declared one"
    third = await store.enlist("third", ttl_s=1000.0, exclusive=False)
    moved = await store.take("t", third, mode="transparent")
    assert moved is not None
    assert moved.owner == third
    assert await store.append("t", [b"3"], expected_seq=2, at_s=3.0, state="finished")
    assert await store.take("t", second, mode="transparent") is None, "it has ended"


async def test_the_workflows_of_an_epoch_are_those_that_it_has_to_run(store: WorkflowStore) -> None:
    epoch = await accepted(store)
    await store.accept(workflow("ended", owner=epoch), [])
    await store.commit(change(epoch, 0, b"end", state="finished", workflow_id="ended"))
    await store.accept(workflow("t", mode="transparent", owner=epoch), [])
    other = await store.enlist("other", ttl_s=100.0, exclusive=False)
    assert (await store.owned(epoch), await store.owned(other)) == (["wf"], [])
    await store.take("wf", other)
    assert (await store.owned(epoch), await store.owned(other)) == ([], ["wf"])


async def test_of_many_claims_at_once_each_workflow_has_one_winner(store: WorkflowStore) -> None:
    for i in range(20):
        await store.accept(workflow(f"wf{i}"), [])
    epochs = [await store.enlist(str(i), ttl_s=100.0, exclusive=False) for i in range(4)]
    claims = await asyncio.gather(*(store.claim(epoch, limit=3) for epoch in epochs * 3))
    ids = [record.workflow_id for claim in claims for record in claim]
    assert sorted(ids) == sorted(f"wf{i}" for i in range(20))


async def test_nobody_appends_to_a_workflow_that_is_run(store: WorkflowStore) -> None:
    epoch = await accepted(store)
    assert not await store.append("wf", [b"x"], expected_seq=1, at_s=2.0)
    await store.retire(epoch)
    assert await store.append("wf", [b"x"], expected_seq=1, at_s=2.0)


async def test_what_is_posted_waits_in_order_until_it_is_taken_and_comes_once(store: WorkflowStore) -> None:
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


async def test_events_are_read_from_any_place(store: WorkflowStore) -> None:
    await store.accept(workflow(), [b"1", b"2", b"3", b"4"])
    assert [event.body for event in await store.events("wf", after=2)] == [b"3", b"4"]
    assert [event.seq for event in await store.events("wf", after=1, limit=2)] == [2, 3]
    assert await store.events("wf", after=4) == []


async def test_a_key_brings_its_first_workflow_until_it_expires(store: WorkflowStore) -> None:
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


async def test_a_key_belongs_to_whoever_sent_it_not_to_whose_workflow_it_began(store: WorkflowStore) -> None:
    theirs = Idempotency(key="k", fingerprint="f", expires_at_s=1e10)
    ours = msgspec.structs.replace(theirs, fingerprint="g", tenant="operators")
    fork = [await store.accept(workflow(name), [b"e"], idempotency=ours) for name in ("w1", "w2")]
    assert [(a.workflow_id, a.replayed) for a in fork] == [("w1", False), ("w1", True)]
    assert not (await store.accept(workflow("w3"), [b"e"], idempotency=theirs)).replayed, "the tenant's own"
    assert (await store.of_key("operators", ours), await store.of_key("a", theirs)) == ("w1", "w3")


async def test_a_key_that_two_requests_came_with_at_once_stays_that_of_the_first(store: WorkflowStore) -> None:
    key = Idempotency(key="k", fingerprint="f", expires_at_s=1e10)
    await store.accept(workflow("w1"), [b"e"], idempotency=key)
    await store.accept(workflow("w2"), [b"e"])
    await store.keep_key("a", msgspec.structs.replace(key, fingerprint="g"), "w2")
    assert await store.of_key("a", key) == "w1"
    old = Idempotency(key="old", fingerprint="f", expires_at_s=1.0)
    await store.keep_key("a", old, "w1")
    await store.keep_key("a", msgspec.structs.replace(old, expires_at_s=1e10), "w2")
    assert await store.of_key("a", old) == "w2", "an expired key is as good as a new one"


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
    epoch = await store.enlist("me", ttl_s=100.0, exclusive=True)
    assert [record.seq for record in await store.claim(epoch, limit=9)] == [1]
    assert await store.commit(change(epoch, 1, b"two")) == "stored"
    await store.close()
