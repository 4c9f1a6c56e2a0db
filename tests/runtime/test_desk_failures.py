"""The desk when something breaks, or it starts anew: no change is lost from the record, none is made twice."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from swarmx.core.control import Proposal
from swarmx.core.errors import StoreError
from swarmx.memory.sqlite import SqliteStore
from swarmx.runtime.clock import WallClock
from swarmx.tools.guard import GuardSettings
from tests.runtime.offices import DRAIN, ROUTE, SCALE, SHRINK, Office, refused
from tests.tools.worlds import (
    Load,
    call,
)

# When something breaks


async def test_without_an_audit_log_nothing_is_applied(office: Office) -> None:
    proposal = await office.propose(SCALE)
    office.audit.broken = True
    for work in (
        office.order(SCALE),
        office.approve(proposal),
        office.propose(ROUTE, mode="auto"),
        office.propose(ROUTE),
    ):
        with pytest.raises(StoreError):
            await work
    assert office.done == []
    assert await office.state(proposal) == "open"
    assert len(await office.desk.proposals()) == 1
    office.audit.broken = False
    assert (await office.approve(proposal)).state == "applied"


async def test_without_a_store_nothing_is_applied(office: Office) -> None:
    await office.store.close()
    with pytest.raises(StoreError):
        await office.order(SCALE)
    assert office.done == []
    assert office.trail() == [("intent", None), ("outcome", "failed")]


async def test_a_change_that_breaks_is_failed_and_on_record(office: Office) -> None:
    office.jammed = True
    failed = await office.order(SCALE)
    assert (failed.state, failed.detail) == ("failed", "ValueError: the policy broke")
    assert office.trail() == [("intent", None), ("outcome", "failed")]
    await office.pass_time(60.0)
    assert await office.state(failed) == "failed"


async def test_a_change_that_is_made_is_not_called_refused_when_its_outcome_cannot_be_written(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await office.order(ROUTE)
    post = office.post

    def fill_the_disk(message: Any) -> None:
        post(message)
        office.audit.broken = True

    monkeypatch.setattr(office, "post", fill_the_disk)
    office.desk = office.another_desk()
    undo = await office.order(call("rollback", proposal_id=first.proposal_id))
    assert undo.state == "applied"
    assert await office.state(undo) == "applied"
    assert office.world.routing.policy == "least_work"


async def test_a_proposal_that_cannot_be_settled_does_not_hold_up_the_others(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = await office.propose(SCALE), await office.propose(ROUTE)
    real = office.control.proposal
    broken = True

    async def proposal(proposal_id: str) -> Proposal | None:
        if broken and proposal_id == bad.proposal_id:
            raise ValueError("a row that is none")
        return await real(proposal_id)

    monkeypatch.setattr(office.control, "proposal", proposal)
    await office.pass_time(900.0)
    assert await office.state(good) == "expired"
    broken = False
    await office.pass_time(1.0)
    assert await office.state(bad) == "open"
    await office.pass_time(4.0)
    assert await office.state(bad) == "expired"


async def test_a_caller_who_leaves_does_not_stop_a_change_half_way(office: Office) -> None:
    office.audit.open.clear()
    order = asyncio.create_task(office.order(SCALE))
    while not office.asked_for:
        await asyncio.sleep(0)
    order.cancel()
    with pytest.raises(asyncio.CancelledError):
        await order
    office.audit.open.set()
    await office.desk.close()
    assert len(office.done) == 1
    assert office.trail() == [("intent", None), ("outcome", "applied")]


async def test_a_listener_that_breaks_stops_nothing(office: Office) -> None:
    def broken(proposal: Proposal) -> None:
        raise ValueError("deaf")

    office.desk.on_change.insert(0, broken)
    assert (await office.order(SCALE)).state == "applied"
    assert len(office.heard) == 1


async def test_the_desk_settles_by_itself(store: SqliteStore) -> None:
    office = Office(store=store)
    office.desk = office.another_desk(WallClock())
    await office.desk.open()
    running = asyncio.create_task(office.desk.run())
    kept = asyncio.Event()
    office.desk.on_change.append(lambda proposal: kept.set() if proposal.state == "kept" else None)
    await office.order(SCALE)
    await asyncio.wait_for(kept.wait(), 60.0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


# Restart


async def test_a_restart_forgets_neither_proposals_nor_budgets(tmp_path: Path) -> None:
    guard = GuardSettings(coordinator_changes_per_hour=2, cooldown_s={"scale_model": 600.0})
    first = SqliteStore(tmp_path / "swarmx.db")
    await first.open()
    office = Office(store=first, guard=guard)
    waiting = await office.propose(call("set_replica_bounds", model="writer", min_replicas=2, max_replicas=4))
    applied = await office.propose(SHRINK, mode="auto")
    await first.close()

    second = SqliteStore(tmp_path / "swarmx.db")
    await second.open()
    again = Office(store=second, guard=guard, world=office.world)
    again.world.at_s += 100.0
    await again.desk.open()
    assert await refused(again.propose(call("scale_model", model="coder", replicas=2), mode="auto")) == "cooldown"
    assert await refused(again.propose(waiting.call)) == "duplicate"
    await again.pass_time(59.0)
    assert await again.state(applied) == "applied"
    again.world.loads["coder"] = Load(p95_s=9.0)
    await again.pass_time(1.0)
    assert await again.state(applied) == "rolled_back"
    assert (await again.approve(waiting)).state == "applied"
    assert await refused(again.propose(ROUTE, mode="auto")) == "change_budget"
    await second.close()


async def test_an_open_proposal_expires_after_a_restart(office: Office) -> None:
    proposal = await office.propose(SCALE)
    again = Office(store=office.store, world=office.world)
    await again.desk.open()
    await again.pass_time(900.0)
    assert await again.state(proposal) == "expired"


async def test_a_proposal_about_a_replica_does_not_survive_a_restart(office: Office) -> None:
    drain = await office.propose(DRAIN)
    scale = await office.propose(SCALE)
    again = Office(store=office.store)
    again.world.at_s = office.world.at_s
    await again.desk.open()
    ended = await again.desk.proposal(drain.proposal_id)
    assert ended.state == "stale"
    assert "another one of the same name" in ended.detail
    assert await refused(again.approve(drain)) == "decided"
    assert again.audit.records[0].entry.outcome == "stale"
    assert await again.state(scale) == "open"
    assert (await again.propose(DRAIN)).state == "open"


async def test_a_change_that_did_not_survive_the_restart_is_not_called_kept(office: Office) -> None:
    applied = await office.propose(ROUTE, mode="auto")
    again = Office(store=office.store)
    again.world.at_s = office.world.at_s + 5.0
    await again.desk.open()
    await again.pass_time(60.0)
    assert await again.state(applied) == "stale"


async def test_a_proposal_of_another_version_ends(office: Office) -> None:
    proposal = await office.propose(SCALE)
    unknown = msgspec.structs.replace(proposal, call=call("resize_model", model="coder"))
    await office.control.save_proposal(unknown)
    assert await refused(office.approve(proposal)) == "stale"
    assert await office.state(proposal) == "stale"
