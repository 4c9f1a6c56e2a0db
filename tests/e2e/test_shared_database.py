"""Two whole gateways on one PostgreSQL database: what one accepted ends once, whatever becomes of it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from swarmx.core.records import TERMINAL, WorkflowRecord
from swarmx.memory.postgres.store import PostgresStore
from swarmx.workflows.events import Cancelled, Failed, Finished, decode_event
from tests.e2e.fleet import Server, all_ready, serving, until
from tests.postgres import PostgresServer

pytestmark = pytest.mark.process

LEASE_S = 1.0
CHAIN = {
    "name": "chain",
    "nodes": {
        f"n{i}": {"kind": "llm", "model": "qwen3-8b", "prompt": f"{{{{ n{i - 1}.text }}}} on" if i else "begin"}
        for i in range(4)
    },
}


@pytest.fixture
async def database(postgres: PostgresServer) -> AsyncIterator[str]:
    url = await postgres.new_database()
    yield url
    await postgres.drop(url)


@pytest.fixture
async def store(database: str) -> AsyncIterator[PostgresStore]:
    """The same database, as seen by somebody who runs no workflow."""
    opened = PostgresStore(database)
    await opened.open()
    yield opened
    await opened.close()


def gateway(database: str, folder: Path, stack: ExitStack) -> Server:
    settings: dict[str, Any] = {
        "state": {"database": database, "lease_s": LEASE_S, "journal": False},
        "emulation": {"time_scale": 8.0},
        "emulated": [{"model": "qwen3-8b", "device": "l40s", "count": 2, "size_class": "8b"}],
    }
    return stack.enter_context(serving(settings, folder))


async def submitted(server: Server, count: int) -> list[str]:
    async with server.http() as http:
        await all_ready(http)
        return [await http.submitted(CHAIN) for _ in range(count)]


async def records(store: PostgresStore, ids: list[str]) -> list[WorkflowRecord]:
    found = [await store.workflow(workflow_id, tenant=None) for workflow_id in ids]
    return [record for record in found if record is not None]


async def all_ended(store: PostgresStore, ids: list[str]) -> list[WorkflowRecord]:
    return await until(lambda: records(store, ids), lambda found: all(record.state in TERMINAL for record in found))


async def check_ended_once(store: PostgresStore, ended: list[WorkflowRecord]) -> None:
    """One last event, at the end; each node once; every call of a finished node has its record."""
    for record in ended:
        events = [decode_event(event.body) for event in await store.events(record.workflow_id)]
        ends = [isinstance(event, Finished | Failed | Cancelled) for event in events]
        assert ends == [False] * (len(events) - 1) + [True]
        assert record.seq == len(events)
        done = [event for event in events if type(event).__name__ == "NodeFinished"]
        assert len({event.path for event in done}) == len(done)
        calls = {call.call_id for call in await store.calls(record.workflow_id, tenant=None)}
        assert {event.call_id for event in done} <= calls


async def test_a_gateway_that_stood_still_for_three_leases_writes_nothing_to_what_others_took(
    database: str, store: PostgresStore, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        first, second = (gateway(database, tmp_path / name, stack) for name in ("first", "second"))
        ids = await submitted(first, 6) + await submitted(second, 3)
        mine = await until(lambda: records(store, ids), lambda found: any(record.seq > 2 for record in found))
        of_first = mine[0].owner
        assert mine[-1].owner != of_first
        os.kill(first.process.pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(3.0 * LEASE_S)
            ended = await all_ended(store, ids)
            taken = [record for record in ended[:6] if record.owner != of_first]
            assert taken, "the first gateway had finished all before it stood still"
        finally:
            os.kill(first.process.pid, signal.SIGCONT)
        async with first.http() as http:
            await http.ended(await http.submitted(CHAIN))
        assert await records(store, ids) == ended
        assert "its workflows are let go" in first.log or "run by another process" in first.log
        await check_ended_once(store, ended)
        assert all(record.state == "finished" for record in ended)


async def test_what_a_killed_gateway_ran_is_taken_over_and_each_can_cancel_what_another_runs(
    database: str, store: PostgresStore, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        first, second = (gateway(database, tmp_path / name, stack) for name in ("first", "second"))
        ids = await submitted(first, 6)
        async with second.http() as http:
            await http.post(f"/api/v1/workflows/{ids[0]}/cancel")
            cancelled = await http.ended(ids[0])
        assert cancelled["state"] == "cancelled"
        first.kill()
        ended = await all_ended(store, ids)
        assert {record.state for record in ended[1:]} == {"finished"}
        assert len({record.owner for record in ended}) > 1, "the second gateway ended nothing"
        await check_ended_once(store, ended)
