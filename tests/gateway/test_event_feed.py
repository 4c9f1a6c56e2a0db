"""The events of a workflow as they are read: in pages, and as server-sent events from any of them on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from starlette.types import Message

from swarmx.core.errors import Unauthorized
from swarmx.core.records import Commit, StoredEvent, WorkflowRecord
from swarmx.gateway.event_feed import EventFeed, event_row
from swarmx.memory.sqlite import SqliteStore
from swarmx.runtime.changes import Changes
from tests.gateway.workflow_world import API, INSTANT, World, ended, refused, submitted

pytestmark = pytest.mark.process

PAGE = {"accept": "application/json"}
LARGE = {
    "name": "large",
    "inputs": {"text": None},
    "nodes": {
        "up": {"kind": "tool", "function": "upper", "args": {"text": "{{ inputs.text }}"}},
        "n": {"kind": "tool", "function": "length", "args": {"value": "{{ up }}"}},
    },
    "outputs": {"n": "{{ n }}"},
}


def read(text: str) -> list[dict[str, Any]]:
    """The data of each event, whose number and type are told outside of it, too."""
    found = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        if "data" in fields:
            row = json.loads(fields["data"])
            assert (fields["id"], fields["event"]) == (str(row["seq"]), row["type"])
            found.append(row)
    return found


async def test_a_feed_from_any_event_on_has_the_same_tail_and_ends(world: World) -> None:
    async with world.whole.client("client") as client:
        workflow_id = await submitted(client, INSTANT)
        await ended(client, workflow_id)
        reply = await client.get(f"{API}/{workflow_id}/events")
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert reply.headers["cache-control"] == "no-store"
        every = read(reply.text)
        assert [event["seq"] for event in every] == list(range(1, len(every) + 1))
        assert every[0]["type"] == "Submitted"
        assert "spec" not in every[0]
        assert every[-1]["type"] == "Finished"
        for seq in range(len(every) + 1):
            tail = await client.get(f"{API}/{workflow_id}/events", params={"after": seq})
            assert read(tail.text) == every[seq:]
            resumed = await client.get(f"{API}/{workflow_id}/events", headers={"last-event-id": str(seq)})
            assert read(resumed.text) == every[seq:]
        both = await client.get(f"{API}/{workflow_id}/events?after=0", headers={"last-event-id": str(len(every) - 1)})
        assert read(both.text) == every[-1:]


async def test_pages_have_every_event_once(world: World) -> None:
    async with world.whole.client("client") as client:
        workflow_id = await submitted(client, INSTANT)
        await ended(client, workflow_id)
        seen, after, more = [], 0, True
        while more:
            params = {"after": after, "limit": 1}
            page = (await client.get(f"{API}/{workflow_id}/events", params=params, headers=PAGE)).json()
            seen += page["events"]
            after, more = page["next_after"], page["has_more"]
        assert seen == read((await client.get(f"{API}/{workflow_id}/events")).text)


async def test_what_is_large_is_named_in_the_feed_and_whole_in_a_page(world: World) -> None:
    async with world.whole.client("client") as client:
        workflow_id = await submitted(client, LARGE, text="x" * 20_000)
        await ended(client, workflow_id)
        feed = read((await client.get(f"{API}/{workflow_id}/events")).text)
        cut = [(event["seq"], event["omitted"]) for event in feed if "omitted" in event]
        assert [names for _, names in cut] == [["inputs"], ["output"]]
        params = {"after": cut[1][0] - 1, "limit": 1}
        (whole,) = (await client.get(f"{API}/{workflow_id}/events", params=params, headers=PAGE)).json()["events"]
        assert whole["output"] == "X" * 20_000


@pytest.mark.parametrize(
    ("params", "headers", "status", "said"),
    [
        ({"after": "99"}, {}, 400, "none behind number 99"),
        ({}, {"last-event-id": "99"}, 400, "none behind number 99"),
        ({}, {"last-event-id": "wf-1"}, 400, "the number of an event"),
        ({}, {"last-event-id": "-1"}, 400, "the number of an event"),
        ({"after": "-1"}, {}, 422, "after"),
        ({"after": "x"}, {}, 422, "after"),
        ({"after": "9" * 30}, {}, 422, "after"),
        ({"limit": "0"}, {}, 422, "limit"),
        ({"limit": "1001"}, {}, 422, "limit"),
    ],
)
async def test_a_place_that_is_not_there_is_refused(
    world: World, params: dict[str, str], headers: dict[str, str], status: int, said: str
) -> None:
    async with world.whole.client("client") as client:
        workflow_id = await submitted(client, INSTANT)
        await ended(client, workflow_id)
        reply = await client.get(f"{API}/{workflow_id}/events", params=params, headers=headers)
        assert said in refused(reply, status)["detail"]


async def test_too_many_who_wait_are_told_before_the_first_byte(world: World) -> None:
    world.whole.context.changes.most = 0
    async with world.whole.client("client") as client:
        workflow_id = await submitted(client, INSTANT)
        reply = await client.get(f"{API}/{workflow_id}/events")
        assert "wait for news" in refused(reply, 503)["detail"]
        assert reply.headers["retry-after"]
        waited = await client.post(API, json=INSTANT, headers={"prefer": "wait=30"})
        assert waited.status_code in (200, 202), "what was done is told all the same"


@dataclass(slots=True, kw_only=True)
class Client:
    """Who reads a feed, as ASGI sees it; it takes `most` chunks and then nothing more until it hangs up."""

    most: int = 1_000_000
    chunks: list[bytes] = field(default_factory=list)
    full: asyncio.Event = field(default_factory=asyncio.Event)
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    async def receive(self) -> Message:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if len(self.chunks) >= self.most:
            self.full.set()
            await asyncio.Event().wait()
        if message.get("body"):
            self.chunks.append(message["body"])

    async def read(self, feed: EventFeed) -> None:
        await feed({"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}}, self.receive, self.send)


class CountingStore(SqliteStore):
    """Counts how many events were read."""

    handed_out = 0

    async def events(self, workflow_id: str, *, after: int = 0, limit: int | None = None) -> list[StoredEvent]:
        found = await super().events(workflow_id, after=after, limit=limit)
        self.handed_out += len(found)
        return found


@pytest.fixture
async def store() -> AsyncIterator[CountingStore]:
    opened = CountingStore(":memory:")
    await opened.open()
    yield opened
    await opened.close()


async def stored(store: SqliteStore, events: int) -> int:
    """A running workflow `wf` with so many events; the epoch of the process that runs it."""
    epoch = await store.enlist("other", ttl_s=60.0, exclusive=False)
    record = WorkflowRecord(
        workflow_id="wf",
        tenant="a",
        mode="declared",
        kind="k",
        name="n",
        state="running",
        created_at_s=1.0,
        owner=epoch,
    )
    await store.accept(record, [b'{"v":2,"event":{"type":"NodeStarted","path":"a","kind":"llm"}}'] * events)
    return epoch


def feed_of(store: SqliteStore, changes: Changes, **more: Any) -> EventFeed:
    wanted = {"tenant": "a", "after": 0, "here": lambda: False, "may_go_on": lambda: None, **more}
    return EventFeed(store, changes, "wf", **wanted)


async def test_a_feed_of_what_another_process_runs_asks_the_store(store: CountingStore) -> None:
    epoch = await stored(store, 1)
    changes, client = Changes(), Client()
    reading = asyncio.create_task(client.read(feed_of(store, changes)))
    end = b'{"v":2,"event":{"type":"Cancelled"}}'
    change = Commit(workflow_id="wf", epoch=epoch, expected_seq=1, at_s=2.0, events=(end,), state="cancelled")
    assert await store.commit(change) == "stored"
    await reading
    assert [event["type"] for event in read(b"".join(client.chunks).decode())] == ["NodeStarted", "Cancelled"]
    assert changes.count == 0


async def test_a_client_that_takes_nothing_costs_a_page_of_events(store: CountingStore) -> None:
    await stored(store, 1_000)
    changes, client = Changes(), Client(most=3)
    reading = asyncio.create_task(client.read(feed_of(store, changes)))
    await client.full.wait()
    assert store.handed_out == 100
    client.gone.set()
    await reading
    assert changes.count == 0


async def test_a_quiet_feed_has_comments_until_its_token_is_revoked(store: CountingStore) -> None:
    await stored(store, 0)
    looks = 0

    def may_go_on() -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            raise Unauthorized("revoked")

    client = Client()
    await client.read(feed_of(store, Changes(), may_go_on=may_go_on, comment_every_s=0.0))
    assert client.chunks == [b"retry: 1000\n\n", b": nothing new\n\n", b": nothing new\n\n"]


async def test_a_server_that_stops_ends_its_feeds(store: CountingStore) -> None:
    await stored(store, 1)
    changes, client = Changes(), Client()
    reading = asyncio.create_task(client.read(feed_of(store, changes, here=lambda: True)))
    async with asyncio.timeout(30.0):
        while len(client.chunks) < 2:
            await asyncio.sleep(0)
        changes.close()
        await reading


def test_an_event_that_a_newer_version_wrote_is_shown_as_it_is() -> None:
    body = b'{"v": 99, "event": {"type": "SomethingNew", "path": "a", "spec": "left out"}}'
    row = event_row(StoredEvent(seq=7, at_s=1.5, body=body))
    assert {name: json.loads(bytes(value)) if name in ("type", "path") else value for name, value in row.items()} == {
        "seq": 7,
        "at_s": 1.5,
        "type": "SomethingNew",
        "path": "a",
    }
