"""What is durable about a running workflow: retries, timeouts, forks, keys, and who owns it."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

from swarmx.core.errors import KeyReused, StoreError, WorkflowError
from swarmx.core.failures import Cause, Failure
from swarmx.core.records import (
    Accepted,
    Commit,
    Committed,
    Idempotency,
    Input,
    ModelRequest,
    ModelResult,
    WorkflowRecord,
)
from swarmx.memory.sqlite import SqliteStore
from swarmx.runtime.workflows import WorkflowRunner
from swarmx.workflows.events import NodeRetried, NodeStarted, decode_event
from swarmx.workflows.spec import parse_workflow
from tests.contract.test_store import call_record
from tests.runtime.runners import CHAIN, ONE, TWO, EchoModel, FixedClock, Start, chat, kinds_of, terminal_events, until

RETRIED = (
    "{name: r, nodes: {only: {kind: llm, model: m, prompt: hello, retry: {attempts: 3, backoff_s: %s, jitter: 0}}}}"
)
MONTH_S = 30 * 86_400.0
T = TypeVar("T")


def failing(times: int, cause: Cause = "replica") -> Callable[[ModelRequest], ModelResult]:
    left = [times]

    def answer(request: ModelRequest) -> ModelResult:
        left[0] -= 1
        if left[0] >= 0:
            failure = Failure(cause=cause, error="broke")
            return ModelResult(call_id="c", replica_id=None, attempts=1, failure=failure)
        return EchoModel().result(request, "there")

    return answer


async def test_a_failed_attempt_is_made_again(store: SqliteStore, start: Start) -> None:
    model = EchoModel(answers={"only": failing(2)})
    runner = start(model)
    workflow_id = await runner.submit(parse_workflow(RETRIED % 0), {}, "a")
    record = await runner.wait(workflow_id, "a")
    assert record.state == "finished"
    assert [request.request_id for request in model.asked] == [f"{workflow_id}/only/{n}" for n in (1, 2, 3)]
    assert {request.idempotency_key for request in model.asked} == {f"{workflow_id}/only"}
    node = (await runner.describe(workflow_id, "a"))["nodes"][0]
    assert (node["attempt"], node["error"], node["state"]) == (3, None, "finished")


async def test_what_the_engine_rejects_is_not_asked_again(start: Start) -> None:
    model = EchoModel(answers={"only": failing(1, "rejected")})
    runner = start(model)
    workflow_id = await runner.submit(parse_workflow(RETRIED % 0), {}, "a")
    assert (await runner.wait(workflow_id, "a")).state == "failed"
    assert len(model.asked) == 1


async def test_an_answer_of_no_use_is_worth_another_attempt(start: Start) -> None:
    answers = iter([{"choices": []}, chat("good")])

    def answer(request: ModelRequest) -> ModelResult:
        return ModelResult(call_id="c", replica_id="r", attempts=1, answer=next(answers))

    runner = start(EchoModel(answers={"only": answer}))
    workflow_id = await runner.submit(parse_workflow(RETRIED % 0), {}, "a")
    assert (await runner.wait(workflow_id, "a")).state == "finished"


async def test_a_retry_waits_its_backoff_across_a_restart(store: SqliteStore, start: Start) -> None:
    runner = start(EchoModel(answers={"only": failing(1)}))
    workflow_id = await runner.submit(parse_workflow(RETRIED % 60), {}, "a")

    async def rests() -> bool:
        return NodeRetried in await kinds_of(store, workflow_id)

    await until(rests)
    shown = (await runner.describe(workflow_id, "a"))["nodes"][0]
    assert (shown["state"], shown["not_before_s"], shown["error"]) == ("ready", 1060.0, "broke")
    await runner.close()
    early = EchoModel()
    again = start(early, FixedClock(1059.0))
    assert await again.recover() == 1
    for _ in range(20):
        await asyncio.sleep(0)
    assert early.asked == []
    await again.close()
    late = EchoModel()
    last = start(late, FixedClock(1060.0))
    await last.recover()
    assert (await last.wait(workflow_id, "a")).state == "finished"
    assert [request.request_id for request in late.asked] == [f"{workflow_id}/only/2"]


async def test_an_attempt_that_takes_too_long_is_let_go_and_made_again(store: SqliteStore, start: Start) -> None:
    hung = [True]

    async def first_hangs(request: ModelRequest) -> ModelResult:
        if hung.pop() if hung else False:
            clock.time_s += 1.0
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                model.cancelled.append(request.request_id)
                raise
        return EchoModel().result(request, "there")

    clock = FixedClock()
    model = EchoModel(answers={"only": first_hangs})
    runner = start(model, clock)
    source = "{name: t, nodes: {only: {kind: llm, model: m, prompt: p, timeout_s: 0.01, retry: {backoff_s: 0}}}}"
    workflow_id = await runner.submit(parse_workflow(source), {}, "a")
    assert (await runner.wait(workflow_id, "a")).state == "finished"
    assert model.cancelled == [f"{workflow_id}/only/1"]
    started = [decode_event(event.body) for event in await store.events(workflow_id)]
    assert [e.timeout_at_s for e in started if isinstance(e, NodeStarted)] == [1000.01, 1001.01]


async def test_the_record_of_a_call_is_in_the_store_as_soon_as_its_node_is_finished(
    store: SqliteStore, start: Start
) -> None:
    def answer(request: ModelRequest) -> ModelResult:
        assert request.owned
        record = call_record("c1", workflow_id=request.workflow_id)
        return ModelResult(call_id="c1", replica_id="r", attempts=1, answer=chat("x"), record=record)

    runner = start(EchoModel(answers={"a": answer}, hung=frozenset({"b"})))
    workflow_id = await runner.submit(parse_workflow(TWO), {}, "a")

    async def finished() -> bool:
        return len(await store.events(workflow_id)) == 4

    await until(finished)
    assert [call.call_id for call in await store.calls(workflow_id, tenant="a")] == ["c1"]


async def test_the_record_of_a_call_whose_workflow_was_lost_is_kept_all_the_same(
    store: SqliteStore, start: Start
) -> None:
    hold = asyncio.Event()

    async def late(request: ModelRequest) -> ModelResult:
        await hold.wait()
        record = call_record("late", workflow_id=request.workflow_id)
        return ModelResult(call_id="late", replica_id="r", attempts=1, answer=chat("x"), record=record)

    slow = start(EchoModel(answers={"only": late}))
    workflow_id = await slow.submit(parse_workflow(ONE), {}, "a")

    async def begun() -> bool:
        return len(await store.events(workflow_id)) == 2

    await until(begun)
    other = start(EchoModel())
    await other.recover()
    await other.wait(workflow_id, "a")
    hold.set()

    async def kept() -> bool:
        return await store.call("late", tenant="a") is not None

    await until(kept)
    assert await terminal_events(store, workflow_id) == ["Finished"]


class Deaf(SqliteStore):
    """A store that has accepted the first workflow, and whose answer got lost."""

    heard = False

    async def accept(
        self, workflow: WorkflowRecord, events: Sequence[bytes], *, idempotency: Idempotency | None = None
    ) -> Accepted:
        accepted = await super().accept(workflow, events, idempotency=idempotency)
        if not self.heard:
            self.heard = True
            raise StoreError("it is not known whether this write was stored")
        return accepted


async def test_what_was_accepted_without_anybody_hearing_of_it_runs(
    start: Start, store: SqliteStore, tmp_path: Path
) -> None:
    deaf = Deaf(tmp_path / "swarmx.db")
    await deaf.open()
    runner = start(EchoModel(), store=deaf, exclusive=False, lease_s=0.03)
    with pytest.raises(StoreError, match="not known"):
        await runner.submit(parse_workflow(ONE), {}, "a")
    (record,) = (await store.workflows(tenant="a", state=None, limit=9, cursor=None)).workflows
    async with asyncio.timeout(60.0):
        while (await runner.wait(record.workflow_id, "a")).state != "finished":
            await asyncio.sleep(0.001)
    assert await terminal_events(store, record.workflow_id) == ["Finished"]
    await runner.close()
    await deaf.close()


class Broken(SqliteStore):
    """A store with a defect."""

    looks = 0

    async def waiting(self, epoch: int) -> list[str]:
        self.looks += 1
        raise KeyError(epoch)


async def test_a_defect_in_a_look_around_does_not_end_the_heartbeats(
    start: Start, store: SqliteStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Broken(tmp_path / "swarmx.db")
    await broken.open()
    runner = start(EchoModel(), store=broken, exclusive=False, lease_s=0.03)
    await runner.recover()
    async with asyncio.timeout(60.0):
        while broken.looks < 3:
            await asyncio.sleep(0.001)
    assert "could not be looked at" in caplog.text
    await runner.close()
    await broken.close()


class Crowded(SqliteStore):
    """A store in which others have left more than can be looked at between two heartbeats."""

    beats = 0

    async def waiting(self, epoch: int) -> list[str]:
        await asyncio.Event().wait()
        return []

    async def heartbeat(self, epoch: int, *, ttl_s: float) -> bool:
        self.beats += 1
        return await super().heartbeat(epoch, ttl_s=ttl_s)


async def test_a_look_around_that_takes_long_does_not_hold_up_the_heartbeats(start: Start, tmp_path: Path) -> None:
    crowded = Crowded(tmp_path / "crowded.db")
    await crowded.open()
    runner = start(EchoModel(), store=crowded, exclusive=False, lease_s=0.03)
    await runner.recover()
    async with asyncio.timeout(60.0):
        while crowded.beats < 3:
            await asyncio.sleep(0.001)
    await runner.close()
    await crowded.close()


async def test_a_fork_runs_from_its_node_on_and_names_where_it_came_from(store: SqliteStore, start: Start) -> None:
    runner = start(EchoModel())
    old = await runner.submit(parse_workflow(CHAIN), {"topic": "bees"}, "a")
    before = await runner.wait(old, "a")
    model = EchoModel(answers={"each[1].work": lambda request: EchoModel().result(request, "better")})
    other = start(model)
    new = (await other.fork(old, "each[1].work", "a")).workflow_id
    record = await other.wait(new, "a")
    assert json.loads(record.outcome or b"") == {"answer": "WORK ON ONE, BETTER, WORK ON THREE"}
    assert sorted(request.node for request in model.asked) == ["each[1].work", "sum_up"]
    assert (record.forked_from, record.spec_sha256, record.tenant) == (old, before.spec_sha256, "a")
    assert len(record.spec_sha256) == 64
    with pytest.raises(WorkflowError, match="no node 'nope'"):
        await other.fork(old, "nope", "a")


def key(name: str, fingerprint: str = "f") -> Idempotency:
    return Idempotency(key=name, fingerprint=fingerprint, expires_at_s=2000.0)


async def test_a_key_that_comes_twice_at_once_brings_one_workflow(store: SqliteStore, start: Start) -> None:
    model = EchoModel()
    runner = start(model)
    spec = parse_workflow(ONE)
    accepted = await asyncio.gather(*(runner.accept(spec, {}, "a", idempotency=key("k")) for _ in range(5)))
    assert len({one.workflow_id for one in accepted}) == 1
    assert [one.replayed for one in accepted].count(False) == 1
    await runner.wait(accepted[0].workflow_id, "a")
    assert len(model.asked) == 1
    with pytest.raises(KeyReused, match="came with another request"):
        await runner.accept(spec, {}, "a", idempotency=key("k", "other"))
    assert not (await runner.accept(spec, {}, "b", idempotency=key("k", "other"))).replayed, "keys are of a tenant"


async def test_a_process_that_cannot_renew_stops_its_own_work(store: SqliteStore, start: Start) -> None:
    model = EchoModel(hung=frozenset({"only"}))
    runner = start(model, lease_s=0.3)
    workflow_id = await runner.submit(parse_workflow(ONE), {}, "a")
    await model.hanging.wait()
    successor = await store.enlist("successor", ttl_s=60.0, exclusive=True)
    await runner.wait(workflow_id, "a")
    while not model.cancelled:
        await asyncio.sleep(0.001)
    assert runner.running == 0
    assert [record.workflow_id for record in await store.claim(successor, limit=9)] == [workflow_id]


class Unreachable(SqliteStore):
    """A store that a process cannot reach any more once it is told to."""

    lost = False

    async def write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        if self.lost:
            raise StoreError("no connection")
        return await super().write(work)


@pytest.fixture
async def unreachable(store: SqliteStore, tmp_path: Path) -> AsyncIterator[Unreachable]:
    opened = Unreachable(tmp_path / "swarmx.db")
    await opened.open()
    yield opened
    await opened.close()


async def test_a_process_without_a_connection_lets_go_and_another_takes_over(
    start: Start, unreachable: Unreachable, store: SqliteStore
) -> None:
    model = EchoModel(hung=frozenset({"only"}))
    runner = start(model, store=unreachable, exclusive=False, lease_s=2.0)
    workflow_id = await runner.submit(parse_workflow(ONE), {}, "a")
    await model.hanging.wait()
    unreachable.lost = True
    other = start(EchoModel(), exclusive=False)
    assert await other.recover() == 0, "the lease of the first still runs"
    while (await other.wait(workflow_id, "a")).state != "finished":
        await asyncio.sleep(0.01)
        await other.recover()
    assert model.cancelled == ["only"]
    assert await terminal_events(store, workflow_id) == ["Finished"]
    await runner.close()


class Unreadable(SqliteStore):
    """A store that cannot read its inbox the first time."""

    tried = 0

    async def inputs(self, workflow_id: str) -> list[Input]:
        self.tried += 1
        if self.tried == 1:
            raise StoreError("not now")
        return await super().inputs(workflow_id)


async def test_an_inbox_that_cannot_be_read_now_is_read_later(tmp_path: Path) -> None:
    store = Unreadable(tmp_path / "swarmx.db")
    await store.open()
    model = EchoModel(hung=frozenset({"only"}))
    runner = WorkflowRunner(store, model, FixedClock())
    workflow_id = await runner.submit(parse_workflow(ONE), {}, "a")
    await model.hanging.wait()
    assert (await runner.cancel(workflow_id, "a")).state == "cancelled"
    await runner.close()
    await store.close()


async def test_transparent_workflows_are_neither_killed_nor_forked(store: SqliteStore, start: Start) -> None:
    record = WorkflowRecord(
        workflow_id="t", tenant="a", mode="transparent", kind="k", name="n", state="running", created_at_s=0.0
    )
    await store.accept(record, [])
    runner = start(EchoModel())
    with pytest.raises(WorkflowError, match="client's own"):
        await runner.kill("t", "a")
    with pytest.raises(WorkflowError, match="client's own"):
        await runner.fork("t", "x", "a")


class Slow(SqliteStore):
    """A store that notes which commits it was given."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.changes: list[Commit] = []

    async def commit(self, change: Commit) -> Committed:
        self.changes.append(change)
        return await super().commit(change)


async def test_a_step_is_one_commit(tmp_path: Path) -> None:
    store = Slow(tmp_path / "swarmx.db")
    await store.open()
    runner = WorkflowRunner(store, EchoModel(), FixedClock())
    nodes = ", ".join(
        f"n{i}: {{kind: llm, model: m, prompt: p{', needs: [n' + str(i - 1) + ']' if i else ''}}}" for i in range(5)
    )
    workflow_id = await runner.submit(parse_workflow(f"{{name: five, nodes: {{{nodes}}}}}"), {}, "a")
    await runner.wait(workflow_id, "a")
    assert len(store.changes) == 6, "the start, four answers with the next start each, the last answer with the end"
    await runner.close()
    await store.close()


async def test_a_clock_that_is_set_back_between_lives_makes_no_rest_longer(store: SqliteStore, start: Start) -> None:
    clock = FixedClock(1000.0 + MONTH_S)
    runner = start(EchoModel(answers={"only": failing(1)}), clock)
    workflow_id = await runner.submit(parse_workflow(RETRIED % 0.01), {}, "a")

    async def rests() -> bool:
        return NodeRetried in await kinds_of(store, workflow_id)

    await until(rests)
    await runner.close()
    clock.time_s = 1000.0
    rested = start(EchoModel(), clock)
    await rested.recover()
    clock.time_s += 0.02
    assert (await rested.wait(workflow_id, "a")).state == "finished"


async def test_a_clock_that_is_set_back_between_lives_gives_no_attempt_more_time(
    store: SqliteStore, start: Start
) -> None:
    source = "{name: t, nodes: {only: {kind: llm, model: m, prompt: p, timeout_s: 0.01, retry: {backoff_s: 0}}}}"
    clock = FixedClock(1000.0 + MONTH_S)
    first = start(hangs := EchoModel(hung=frozenset({"only"})), clock)
    workflow_id = await first.submit(parse_workflow(source), {}, "a")
    await hangs.hanging.wait()
    await first.close()
    clock.time_s = 1000.0
    second = start(hangs := EchoModel(hung=frozenset({"only"})), clock)
    await second.recover()
    await hangs.hanging.wait()
    clock.time_s += 0.02
    while not hangs.cancelled:
        await asyncio.sleep(0.001)
    await second.close()
    assert NodeRetried in await kinds_of(store, workflow_id)
