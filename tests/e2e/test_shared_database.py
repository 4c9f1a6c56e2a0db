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
from swarmx.gateway.program_events import ProgramEnded, program_events
from swarmx.memory.postgres.store import PostgresStore
from swarmx.workflows.events import Cancelled, Failed, Finished, decode_event
from tests.e2e.fleet import Http, Peer, Server, all_ready, peers, serving, static, until
from tests.postgres import PostgresServer

pytestmark = pytest.mark.process

LEASE_S = 1.0
CHAIN = {  # as long as the peer hangs, it does not end
    "name": "chain",
    "nodes": {
        f"n{i}": {"kind": "llm", "model": "fine", "prompt": f"{{{{ n{i - 1}.text }}}} on"}
        if i
        else {"kind": "llm", "model": "hang", "prompt": "begin"}
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


def gateway(database: str, folder: Path, found: dict[str, Peer], stack: ExitStack, *, idle_s: float = 3600.0) -> Server:
    """A gateway over one peer a model, that ends programs after so long a silence."""
    settings: dict[str, Any] = {
        "state": {"database": database, "lease_s": LEASE_S, "journal": False},
        "workflows": {"transparent_idle_s": idle_s},
        "server": {"drain_s": 1},
        "replicas": [static(name, name, peer) for name, peer in found.items()],
    }
    return stack.enter_context(serving(settings, folder))


async def submitted(server: Server, count: int) -> list[str]:
    async with server.http() as http:
        await all_ready(http)
        return [await http.submitted(CHAIN) for _ in range(count)]


async def works_on(peer: Peer, calls: int) -> None:
    async def running() -> int:
        return peer.running

    await until(running, lambda count: count == calls)


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
    async with peers(fine="fine", hang="hang") as found:
        with ExitStack() as stack:
            first, second = (gateway(database, tmp_path / name, found, stack) for name in ("first", "second"))
            ids = await submitted(first, 6) + await submitted(second, 3)
            await works_on(found["hang"], 9)
            mine = await records(store, ids)
            of_first, of_second = mine[0].owner, mine[-1].owner
            assert of_first != of_second
            os.kill(first.process.pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(3.0 * LEASE_S)
                await works_on(found["hang"], 15)
                found["hang"].release.set()
                ended = await all_ended(store, ids)
                assert {record.owner for record in ended} == {of_second}
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
    async with peers(fine="fine", hang="hang") as found:
        with ExitStack() as stack:
            first, second = (gateway(database, tmp_path / name, found, stack) for name in ("first", "second"))
            ids = await submitted(first, 6)
            await works_on(found["hang"], 6)
            async with second.http() as http:
                await http.post(f"/api/v1/workflows/{ids[0]}/cancel")
                cancelled = await http.ended(ids[0])
            assert cancelled["state"] == "cancelled"
            first.kill()
            found["hang"].release.set()
            ended = await all_ended(store, ids)
            assert {record.state for record in ended[1:]} == {"finished"}
            assert len({record.owner for record in ended}) == 2, "the second gateway ended what the first one had left"
            await check_ended_once(store, ended)


async def called(http: Http, headers: dict[str, str], *, model: str = "fine") -> int:
    """One call of a program that nobody declared; its status."""
    body = {"model": model, "messages": [{"role": "user", "content": "Hello?"}]}
    return (await http.post("/v1/chat/completions", json=body, headers=headers)).status


async def the_end(store: PostgresStore, workflow_id: str) -> ProgramEnded:
    """The only end that the program has, which is its last event."""
    events = program_events(await store.events(workflow_id))
    (end,) = [event for event in events if isinstance(event, ProgramEnded)]
    assert events[-1] is end
    return end


async def test_the_programs_of_a_killed_gateway_are_ended_once_by_another_after_a_silence(
    database: str, store: PostgresStore, tmp_path: Path
) -> None:
    programs = {"thread": {"thread-id": "thread"}, "mine": {"x-swarmx-workflow-id": "mine"}}
    async with peers(fine="fine", hang="hang") as found:
        with ExitStack() as stack:
            first = gateway(database, tmp_path / "first", found, stack, idle_s=3600.0)
            async with first.http() as http:
                await all_ready(http)
                for headers in (*programs.values(), programs["mine"]):
                    assert await called(http, headers) == 200
                out = asyncio.create_task(called(http, {"x-session-id": "out"}, model="hang"))
                await works_on(found["hang"], 1)
                ids = [f"default:{name}" for name in (*programs, "out")]
                before = await records(store, ids)
                assert [record.state for record in before] == ["running"] * 3
                await until(lambda: recorded(store, ids), lambda counts: counts == [1, 2, 0])
                first.kill()
                await asyncio.gather(out, return_exceptions=True)
            second = gateway(database, tmp_path / "second", found, stack, idle_s=0.5)
            ended = await all_ended(store, ids)
            assert [record.state for record in ended] == ["finished"] * 3
            assert {record.owner for record in ended}.isdisjoint({record.owner for record in before})
            assert [record.outcome for record in ended] == [
                b'{"calls":%d,"ended_by":"silence"}' % calls for calls in (1, 2, 0)
            ]
            async with second.http() as http:
                await all_ready(http)
                assert await called(http, programs["thread"]) == 200  # its client has found the other gateway
                again = await http.ended("default:thread~2")
            assert (again["state"], again["outputs"]["calls"]) == ("finished", 1)
            assert await records(store, ids) == ended
            assert [(await the_end(store, workflow_id)).why for workflow_id in ids] == ["silence"] * 3
            assert "Traceback" not in second.log


async def recorded(store: PostgresStore, ids: list[str]) -> list[int]:
    """How many calls of each program are in the store."""
    return [len(await store.calls(workflow_id, tenant=None)) for workflow_id in ids]


async def test_a_gateway_that_stood_still_does_not_end_a_program_again_that_another_has_ended(
    database: str, store: PostgresStore, tmp_path: Path
) -> None:
    async with peers(fine="fine", hang="hang") as found:
        with ExitStack() as stack:
            first, second = (gateway(database, tmp_path / n, found, stack, idle_s=0.5) for n in ("first", "second"))
            async with first.http() as http:
                await all_ready(http)
                out = asyncio.create_task(called(http, {"x-session-id": "out"}, model="hang"))
                await works_on(found["hang"], 1)  # so that the first gateway cannot take it for silent
                os.kill(first.process.pid, signal.SIGSTOP)
                try:
                    ended = await all_ended(store, ["default:out"])
                finally:
                    os.kill(first.process.pid, signal.SIGCONT)
                found["hang"].release.set()
                await out
                await called(http, {"x-session-id": "later"})
                await http.ended("default:later")  # what was silent before is looked at before
            assert (await the_end(store, "default:out")).why == "silence"
            assert await records(store, ["default:out"]) == ended
            assert "Traceback" not in first.log + second.log
