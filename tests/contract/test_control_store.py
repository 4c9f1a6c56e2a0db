"""Every store of proposals and episodes keeps the same promises: by id, newest first, and still there tomorrow."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from swarmx.core.control import Actor, Change, Diff, Episode, Evidence, Proposal, ToolCall
from swarmx.core.errors import StoreError
from swarmx.core.ports import ControlStore
from swarmx.memory.control import SqliteControl
from swarmx.memory.schema import MIGRATIONS
from swarmx.memory.sqlite import SqliteStore
from tests.contract.places import Place, control_of

ACTOR = Actor(type="coordinator", name="coordinator", role="operator")


@pytest.fixture
async def store(place: Place) -> AsyncIterator[ControlStore]:
    opened = await place.opened()
    yield control_of(opened)
    await opened.close()
    await place.remove()


def proposal(proposal_id: str, *, at_s: float = 1.0, **changes: Any) -> Proposal:
    made = Proposal(
        proposal_id=proposal_id,
        at_s=at_s,
        expires_at_s=at_s + 900.0,
        actor=ACTOR,
        via="coordinator",
        call=ToolCall(tool="scale_model", arguments={"model": "coder", "replicas": 3, "hold_s": 300.0}),
        diff=Diff(
            changes=(Change(subject="coder", what="replicas", before=2, after=3),),
            predicted=(Evidence(metric="cost_rate", subject="fleet", value=6.5, unit="L40S"),),
        ),
        state="open",
    )
    return msgspec.structs.replace(made, **changes)


def episode(episode_id: str, *, at_s: float = 1.0, **changes: Any) -> Episode:
    made = Episode(
        episode_id=episode_id,
        at_s=at_s,
        trigger="timer",
        source="rules",
        facts={"waiting": 3, "p95_s": 1.5, "at_max": True},
        vector=(0.5, -0.5),
        call=ToolCall(tool="no_op", arguments={}),
        reason="all is well",
        proposal_id=None,
    )
    return msgspec.structs.replace(made, **changes)


async def test_a_proposal_comes_back_as_it_was_saved(store: ControlStore) -> None:
    full = proposal(
        "pr-1",
        decided_by=Actor(type="key", name="olga", role="admin"),
        decided_at_s=2.0,
        applied_at_s=2.5,
        state="applied",
        evidence=(Evidence(metric="p95_s", subject="coder", value=None, window_s=60.0),),
        episode_ids=("ep-1",),
        objective_before=3.25,
        rollback_of="pr-0",
    )
    await store.save_proposal(full)
    assert await store.proposal("pr-1") == full
    assert await store.proposal("pr-2") is None


async def test_saving_again_replaces(store: ControlStore) -> None:
    await store.save_proposal(proposal("pr-1"))
    await store.save_proposal(proposal("pr-1", state="denied"))
    assert [found.state for found in await store.proposals(states=None, limit=10)] == ["denied"]
    assert await store.proposals(states=("open",), limit=10) == []


async def test_proposals_are_listed_by_state_newest_first(store: ControlStore) -> None:
    for number, state in enumerate(("open", "kept", "open", "denied")):
        await store.save_proposal(proposal(f"pr-{number}", at_s=float(number), state=state))
    await store.save_proposal(proposal("pr-9", at_s=2.0))

    async def ids(*states: Any, limit: int = 10) -> list[str]:
        return [found.proposal_id for found in await store.proposals(states=states or None, limit=limit)]

    assert await ids() == ["pr-3", "pr-9", "pr-2", "pr-1", "pr-0"]
    assert await ids("open") == ["pr-9", "pr-2", "pr-0"]
    assert await ids("open", "kept", limit=3) == ["pr-9", "pr-2", "pr-1"]
    assert await store.proposals(states=(), limit=10) == []


async def test_a_page_begins_behind_the_last_one_that_was_seen(store: ControlStore) -> None:
    for number in range(5):
        await store.save_proposal(proposal(f"pr-{number}", at_s=float(number // 2)))
        await store.save_episode(episode(f"ep-{number}", at_s=float(number // 2)))
    seen: list[str] = []
    before: tuple[float, str] | None = None
    while page := await store.proposals(states=None, limit=2, before=before):
        seen += [found.proposal_id for found in page]
        before = (page[-1].at_s, page[-1].proposal_id)
    assert seen == ["pr-4", "pr-3", "pr-2", "pr-1", "pr-0"]
    assert [found.episode_id for found in await store.episodes(limit=2, before=(1.0, "ep-3"))] == ["ep-2", "ep-1"]
    assert await store.proposals(states=("denied",), limit=2, before=(1.0, "pr-3")) == []


async def test_episodes_come_back_newest_first(store: ControlStore) -> None:
    for number in (2, 1, 3):
        await store.save_episode(episode(f"ep-{number}", at_s=float(number)))
    await store.save_episode(episode("ep-2", at_s=2.0, outcome="kept", objective_after=1.0))
    assert [found.episode_id for found in await store.episodes(limit=2)] == ["ep-3", "ep-2"]
    assert await store.episode("ep-2") == episode("ep-2", at_s=2.0, outcome="kept", objective_after=1.0)
    assert await store.episode("ep-9") is None


@pytest.mark.parametrize("limit", [0, -1, 1001])
async def test_a_page_has_a_size(store: ControlStore, limit: int) -> None:
    with pytest.raises(StoreError, match="1 to 1000"):
        await store.proposals(states=None, limit=limit)
    with pytest.raises(StoreError, match="1 to 1000"):
        await store.episodes(limit=limit)


async def test_the_last_twenty_startups_of_a_group_are_kept(store: ControlStore) -> None:
    assert await store.startups() == {}
    for number in range(25):
        await store.record_startup("coder-l40s", "l40s", float(number), 100.0 + number)
    await store.record_startup("writer-cpu", "cpu", 9.5, 1.0)
    assert await store.startups() == {"coder-l40s": [float(n) for n in range(5, 25)], "writer-cpu": [9.5]}


async def test_everything_is_still_there_after_a_restart(lasting: Place) -> None:
    first = await lasting.opened()
    control = control_of(first)
    await control.save_proposal(proposal("pr-1"))
    await control.save_episode(episode("ep-1"))
    await control.record_startup("coder-l40s", "l40s", 4.5, 100.0)
    await first.close()
    second = await lasting.opened()
    control = control_of(second)
    assert await control.proposal("pr-1") == proposal("pr-1")
    assert await control.episode("ep-1") == episode("ep-1")
    assert await control.startups() == {"coder-l40s": [4.5]}
    await second.close()
    with pytest.raises(StoreError, match="not open"):
        await control.proposals(states=None, limit=1)


async def test_a_database_of_the_version_before_is_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    connection = sqlite3.connect(path)
    for statement in ("CREATE TABLE schema_version (version INTEGER NOT NULL)", *MIGRATIONS[0]):
        connection.execute(statement)
    connection.execute("INSERT INTO schema_version VALUES (1)")
    connection.execute("INSERT INTO blobs VALUES ('a', 'f00', 'text/plain', x'01', 1)")
    connection.commit()
    connection.close()
    opened = SqliteStore(path)
    await opened.open()
    await SqliteControl(opened).save_proposal(proposal("pr-1"))
    assert await opened.blob("f00", tenant="a") == ("text/plain", b"\x01")
    await opened.close()


async def test_a_record_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    opened = SqliteStore(tmp_path / "swarmx.db")
    await opened.open()
    control = SqliteControl(opened)
    await control.save_proposal(proposal("pr-1"))
    await opened.write(lambda connection: connection.execute("UPDATE proposals SET body = '{\"state\": 1}'") and None)
    with pytest.raises(StoreError, match="a stored Proposal cannot be read"):
        await control.proposal("pr-1")
    await opened.close()
