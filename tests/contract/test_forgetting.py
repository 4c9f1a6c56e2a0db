"""Every store forgets what ended long ago with all that is its own, bit by bit, and nothing that is still needed."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from swarmx.core import failpoints
from swarmx.core.errors import NotFound
from swarmx.core.ports import WorkflowStore
from swarmx.core.records import Blob, Forgotten, Idempotency
from swarmx.memory import schema
from swarmx.memory.sqlite import SqliteStore
from tests.contract.places import Place
from tests.contract.test_ownership import change
from tests.contract.test_store import call_record, decision, workflow

DAY_S = 50.0  # shorter than the clock of tests is old


def picture(name: str) -> Blob:
    return Blob(sha256=sha256(name.encode()).hexdigest(), media_type="image/png", data=name.encode())


async def ended(store: WorkflowStore, workflow_id: str, *, blobs: Iterable[Blob] = (), **more: Any) -> None:
    """One that ended long ago, with a call and what it leaves."""
    epoch = await store.enlist("me", ttl_s=1000.0, exclusive=False)
    await store.accept(workflow(workflow_id, owner=epoch, **more), [b"one"])
    call = call_record(f"{workflow_id}.call", workflow_id=workflow_id)
    await store.record_decision(decision(call.call_id))
    end = change(epoch, 1, b"end", workflow_id=workflow_id, state="finished", calls=(call,), blobs=tuple(blobs))
    assert await store.commit(end) == "stored"


async def forget_all(store: WorkflowStore, *, older_than_s: float = DAY_S, kept_calls: int = 0) -> Forgotten:
    total = Forgotten()
    while gone := await store.forget(older_than_s=older_than_s, kept_calls=kept_calls, limit=3):
        total = Forgotten(
            workflows=total.workflows + gone.workflows,
            calls=total.calls + gone.calls,
            decisions=total.decisions + gone.decisions,
        )
    return total


async def names(store: WorkflowStore) -> list[str]:
    page = await store.workflows(tenant=None, state=None, limit=1000, cursor=None)
    return sorted(record.workflow_id for record in page.workflows)


async def test_what_ended_long_ago_goes_with_all_that_is_its_own(store: WorkflowStore) -> None:
    await ended(store, "wf", blobs=[picture("p")])
    assert await forget_all(store) == Forgotten(workflows=1, calls=1)
    assert await store.workflow("wf", tenant=None) is None
    assert await store.events("wf") == []
    assert await store.call("wf.call", tenant=None) is None
    assert await store.decisions("wf.call", tenant=None) == []
    assert await store.blob(picture("p").sha256, tenant=None) is None
    assert not await store.forget(older_than_s=DAY_S, kept_calls=0, limit=3)
    await ended(store, "wf")
    assert [event.body for event in await store.events("wf")] == [b"one", b"end"], "its id is free"


async def test_what_has_not_ended_stays_however_old_and_so_does_what_ended_lately(
    store: WorkflowStore, place: Place
) -> None:
    await store.accept(workflow("running"), [b"one"])
    await store.accept(workflow("cancelling"), [b"one"])
    await store.append("cancelling", [], expected_seq=1, at_s=2.0, state="cancelling")
    await store.accept(workflow("ended lately"), [b"one"])
    now_s = place.now_s()
    await store.append("ended lately", [], expected_seq=1, at_s=now_s - DAY_S / 2, state="failed")
    for name in ("running", "ended lately"):
        await store.record_call(call_record(f"{name}.call", workflow_id=name))
        await store.record_decision(decision(f"{name}.call"))
    assert await forget_all(store) == Forgotten()
    assert await names(store) == ["cancelling", "ended lately", "running"]
    assert len(await store.calls("running", tenant=None)) == 1
    await store.append("running", [], expected_seq=1, at_s=2.0, state="finished")
    assert await forget_all(store) == Forgotten(workflows=1, calls=1)


async def test_what_a_valid_key_brought_stays_until_the_key_expires(store: WorkflowStore, place: Place) -> None:
    async def with_key(name: str, expires_at_s: float) -> None:
        key = Idempotency(key=name, fingerprint="f", expires_at_s=expires_at_s)
        await store.accept(workflow(name), [], idempotency=key)
        await store.append(name, [], expected_seq=0, at_s=2.0, state="finished")

    await with_key("valid", place.now_s() + 1000.0)
    await with_key("expired", place.now_s() - 1.0)
    late = Idempotency(key="a later request", fingerprint="f", expires_at_s=place.now_s() + 1000.0)
    await ended(store, "cancelled again")
    await store.keep_key("b", late, "cancelled again")
    assert await forget_all(store) == Forgotten(workflows=1)
    assert await names(store) == ["cancelled again", "valid"]
    assert await store.of_key("b", late) == "cancelled again"


async def test_a_workflow_stays_as_long_as_its_children_and_clients_that_name_each_other_do_not_stay_for_ever(
    store: WorkflowStore,
) -> None:
    await ended(store, "parent", at_s=1.0)
    await store.accept(workflow("child", at_s=2.0, parent_id="parent"), [])
    await ended(store, "one", at_s=3.0, parent_id="other")
    await ended(store, "other", at_s=3.0, parent_id="one")
    assert (await forget_all(store)).workflows == 2
    assert await names(store) == ["child", "parent"]
    await store.append("child", [], expected_seq=0, at_s=2.0, state="finished")
    assert (await forget_all(store)).workflows == 2


async def test_a_picture_stays_as_long_as_somebody_made_it_or_is_a_fork_of_who_did(store: WorkflowStore) -> None:
    await ended(store, "first", blobs=[picture("both"), picture("first")], at_s=1.0)
    await ended(store, "second", blobs=[picture("both")], at_s=2.0)
    await store.accept(workflow("fork", at_s=3.0, forked_from="first"), [b"one"])
    loose = await store.put_blob("a", "image/png", b"loose")
    assert (await forget_all(store)).workflows == 2, "a fork has all that it needs of its source"

    async def there() -> list[bool]:
        shas = (picture("both").sha256, picture("first").sha256, loose)
        return [await store.blob(sha, tenant="a") is not None for sha in shas]

    assert await there() == [True, True, True]
    await store.append("fork", [], expected_seq=1, at_s=4.0, state="finished")
    assert (await forget_all(store)).workflows == 1
    assert await there() == [False, False, True]


async def test_the_same_picture_of_another_tenant_is_another_one(store: WorkflowStore) -> None:
    await ended(store, "wf", blobs=[picture("p")], tenant="a")
    await store.put_blob("b", "image/png", b"p")
    await forget_all(store)
    assert await store.blob(picture("p").sha256, tenant="a") is None
    assert await store.blob(picture("p").sha256, tenant="b") == ("image/png", b"p")


async def test_a_fork_of_what_is_gone_is_refused_whole(store: WorkflowStore) -> None:
    with pytest.raises(NotFound, match="no workflow 'gone'"):
        await store.accept(workflow("fork", forked_from="gone"), [b"one"])
    assert await store.workflow("fork", tenant=None) is None
    assert await store.events("fork") == []


async def test_the_last_calls_stay_to_be_learnt_from_but_no_workflow_has_them(store: WorkflowStore) -> None:
    for name in ("w1", "w2", "w3"):
        await ended(store, name)
    assert await forget_all(store, kept_calls=2) == Forgotten(workflows=3, calls=1)
    assert [record.call_id for record in await store.newest_finished(9)] == ["w2.call", "w3.call"]
    assert [record.workflow_id for record in await store.newest_finished(9)] == ["w2", "w3"]
    assert len(await store.decisions("w2.call", tenant=None)) == 1
    assert await store.calls("w2", tenant=None) == [], "its id may come again"
    await store.record_call(call_record("later", workflow_id=""))
    assert await forget_all(store, kept_calls=2) == Forgotten(calls=1)
    assert [record.call_id for record in await store.newest_finished(9)] == ["w3.call", "later"]


async def test_calls_without_a_workflow_and_decisions_without_a_call_go_by_their_own_age(
    store: WorkflowStore, place: Place
) -> None:
    now_s = place.now_s()
    await store.record_call(call_record("old", workflow_id=""))
    await store.record_call(call_record("of nobody", workflow_id="never accepted"))
    await store.record_call(call_record("new", workflow_id="", ready_at_s=now_s))
    for call_id in ("old", "new", "never recorded"):
        await store.record_decision(decision(call_id))
    assert await forget_all(store) == Forgotten(calls=2, decisions=1)
    assert await store.call("new", tenant=None) is not None
    assert len(await store.decisions("new", tenant=None)) == 1
    assert await store.decisions("never recorded", tenant=None) == []


async def test_each_time_little_is_done(store: WorkflowStore) -> None:
    for i in range(5):
        await ended(store, f"w{i}", at_s=float(i))
    assert await store.forget(older_than_s=DAY_S, kept_calls=0, limit=2) == Forgotten(workflows=2)
    assert await names(store) == ["w2", "w3", "w4"], "the oldest first"
    await store.accept(workflow("long", at_s=0.0), [b"x"] * 4990)
    await store.append("long", [], expected_seq=4990, at_s=5.0, state="finished")
    await store.accept(workflow("longer", at_s=0.5), [b"x"] * 20)
    await store.append("longer", [], expected_seq=20, at_s=5.0, state="finished")
    assert await store.forget(older_than_s=DAY_S, kept_calls=0, limit=9) == Forgotten(workflows=1)
    assert await store.forget(older_than_s=DAY_S, kept_calls=0, limit=9) == Forgotten(workflows=4)
    assert await store.forget(older_than_s=DAY_S, kept_calls=0, limit=2) == Forgotten(calls=2)
    assert await forget_all(store) == Forgotten(calls=3)


@pytest.mark.parametrize("nth", [1, 2, 3, 4])
async def test_what_breaks_off_within_a_workflow_leaves_it_whole(
    store: WorkflowStore, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ended(store, "wf", blobs=[picture("p")])
    hits = 0

    def hit(point: str) -> None:
        nonlocal hits
        hits += point == "rows.forget"
        if hits == nth:
            hits = 0  # a job that fails is run again, alone
            raise RuntimeError("here it breaks off")

    with monkeypatch.context() as broken:
        broken.setattr(failpoints, "hit", hit)
        with pytest.raises(Exception, match="here it breaks off"):
            await store.forget(older_than_s=DAY_S, kept_calls=0, limit=3)
    assert [event.body for event in await store.events("wf")] == [b"one", b"end"]
    assert [record.call_id for record in await store.calls("wf", tenant=None)] == ["wf.call"]
    assert await store.blob(picture("p").sha256, tenant="a") is not None
    assert await forget_all(store) == Forgotten(workflows=1, calls=1)
    assert await store.blob(picture("p").sha256, tenant="a") is None


async def test_a_crash_in_between_loses_nothing_that_stays(lasting: Place) -> None:
    store = await lasting.opened()
    await ended(store, "w1", blobs=[picture("p")], at_s=1.0)
    await ended(store, "w2", blobs=[picture("p")], at_s=2.0)
    await store.accept(workflow("running", at_s=3.0), [b"one"])
    for kept in (["running", "w2"], ["running"]):
        assert await store.forget(older_than_s=DAY_S, kept_calls=9, limit=1) == Forgotten(workflows=1)
        assert (await store.blob(picture("p").sha256, tenant="a") is not None) == ("w2" in kept)
        left = store
        await lasting.crash()
        store = await lasting.opened()
        await left.close()
        assert await names(store) == kept
        assert [event.body for event in await store.events("running")] == [b"one"]
    assert [record.call_id for record in await store.newest_finished(9)] == ["w1.call", "w2.call"]
    await store.close()


async def test_two_servers_that_forget_at_once_and_others_that_write_do_not_disturb_each_other(lasting: Place) -> None:
    one, other = await lasting.opened(), await lasting.opened()
    for i in range(12):
        await ended(one, f"w{i:02}", blobs=[picture(f"p{i % 3}")], at_s=float(i))
    epoch = await one.enlist("runs", ttl_s=1000.0, exclusive=False)
    for i in range(3):
        await one.accept(workflow(f"running{i}", owner=epoch, at_s=20.0), [b"one"])

    async def go_on(store: WorkflowStore, i: int) -> str:
        return await store.commit(change(epoch, 1, b"two", workflow_id=f"running{i}", blobs=(picture(f"p{i}"),)))

    first, second, *stored = await asyncio.gather(
        forget_all(one), forget_all(other), go_on(one, 0), go_on(other, 1), go_on(other, 2)
    )
    assert stored == ["stored"] * 3
    assert first.workflows + second.workflows == 12
    assert first.calls + second.calls == 12
    assert await names(one) == ["running0", "running1", "running2"]
    for i in range(3):
        assert await one.blob(picture(f"p{i}").sha256, tenant="a") is not None
    await other.close()
    await one.close()


async def test_the_newest_of_those_that_follow_each_other_is_found_though_older_ones_are_gone(
    store: WorkflowStore,
) -> None:
    assert await store.newest_of("a:x", tenant="a") is None
    for n, name in enumerate(("a:x", "a:x~2", "a:x~9", "a:x~10", "a:x-y", "a:xy~30", "a:x~")):
        await store.accept(workflow(name, at_s=float(n)), [])
    found = await store.newest_of("a:x", tenant="a")
    assert found is not None
    assert found.workflow_id == "a:x~10"
    assert await store.newest_of("a:x", tenant="b") is None
    for name in ("a:x", "a:x~2", "a:x~9"):
        await store.append(name, [], expected_seq=0, at_s=20.0, state="finished")
    assert (await forget_all(store)).workflows == 3
    found = await store.newest_of("a:x", tenant="a")
    assert found is not None
    assert found.workflow_id == "a:x~10"


async def test_pictures_of_an_older_database_stay_for_good(tmp_path: Path) -> None:
    path = tmp_path / "swarmx.db"
    with sqlite3.connect(path) as old:
        old.execute("CREATE TABLE schema_version (version INTEGER NOT NULL)")
        old.execute("INSERT INTO schema_version VALUES (3)")
        for statement in (statement for step in schema.MIGRATIONS[:3] for statement in step):
            old.execute(statement)
        blob = picture("p")
        old.execute("INSERT INTO blobs VALUES ('a', ?, 'image/png', ?, 1)", (blob.sha256, blob.data))
    old.close()
    store = SqliteStore(path)
    await store.open()
    await ended(store, "wf", blobs=[blob])
    assert (await forget_all(store)).workflows == 1
    assert await store.blob(blob.sha256, tenant="a") == ("image/png", b"p")
    await store.close()
