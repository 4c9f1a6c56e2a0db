"""Workflows that are known only from headers: opened by their first call, ended by a final one or by silence."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest

from swarmx.core.errors import StoreError
from swarmx.core.messages import Message, WorkflowEnded, WorkflowSubmitted
from swarmx.core.records import Accepted, CallRecord, StoredEvent
from swarmx.gateway.identity import Identity, Source
from swarmx.gateway.program_events import ProgramEnded, ProgramEvent, outline, program_events
from swarmx.gateway.program_log import MOST_WAITING
from swarmx.gateway.transparent import TransparentWorkflows, Visit
from swarmx.memory.sqlite import SqliteStore
from swarmx.runtime.requests import BadRequest
from tests.agents.worlds import a_call

T = TypeVar("T")


@dataclass
class Clock:
    """Stands still until it is moved."""

    at_s: float = 1000.0

    def now_s(self) -> float:
        return self.at_s


class ShakyStore(SqliteStore):
    """The real store, whose disk fails as often as it is told to."""

    failures = 0
    unanswered = 0

    async def accept(self, *args: Any, **more: Any) -> Accepted:
        self._shake()
        return self._answer(await super().accept(*args, **more))

    async def append(self, *args: Any, **more: Any) -> bool:
        self._shake()
        return self._answer(await super().append(*args, **more))

    def _answer(self, done: T) -> T:
        if self.unanswered:
            self.unanswered -= 1
            raise StoreError("the answer was lost")
        return done

    def _shake(self) -> None:
        if self.failures:
            self.failures -= 1
            raise StoreError("the disk is full")


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[ShakyStore]:
    found = ShakyStore(tmp_path / "x.db")
    await found.open()
    yield found
    await found.close()


def alone(store: SqliteStore, *, exclusive: bool = True) -> Callable[[], Awaitable[int]]:
    """The epoch of a server that has the store to itself: it ends those before it once it is asked for."""
    enlisted: list[asyncio.Future[int]] = []

    async def epoch() -> int:
        if not enlisted:
            enlisted.append(asyncio.ensure_future(store.enlist("me", ttl_s=1e9, exclusive=exclusive)))
        return await enlisted[0]

    return epoch


def among(store: SqliteStore) -> Callable[[], Awaitable[int]]:
    """The epoch of one of several servers that share the store."""
    return alone(store, exclusive=False)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def heard() -> list[Message]:
    """What agents hear of the `open_ones`."""
    return []


@pytest.fixture
def open_ones(store: ShakyStore, clock: Clock, heard: list[Message]) -> TransparentWorkflows:
    return TransparentWorkflows(store, clock, epoch=alone(store), idle_s=0.04, post=heard.append)


def a(workflow_id: str = "w", *, final: bool = False, source: Source = "swarmx", parent: str | None = None) -> Identity:
    return Identity(workflow_id=workflow_id, kind="k", node="n", final=final, source=source, parent=parent)


async def visit(workflows: TransparentWorkflows, identity: Identity, tenant: str = "red") -> str:
    """One call from its beginning to its end; returns the id of its workflow."""
    begun = await workflows.touch(identity, tenant)
    await workflows.release(begun)
    return begun.workflow_id


async def state(store: SqliteStore, workflow_id: str = "red:w") -> str | None:
    record = await store.workflow(workflow_id, tenant=None)
    return None if record is None else record.state


def ended_call(call_id: str, *, at_s: float) -> CallRecord:
    return CallRecord(
        call_id=call_id,
        tenant="red",
        workflow_id="red:w",
        workflow_kind="k",
        node="n",
        role="r",
        kind="llm",
        model="m",
        state="finished",
        attempts=1,
        replica_id="a",
        device="cpu",
        prompt_key="00",
        prompt_bytes=9,
        prompt_tokens=3,
        work_done=5.0,
        forecast_p50=4.0,
        forecast_p90=8.0,
        forecast_source="prior",
        ready_at_s=1000.0,
        dispatched_at_s=1000.0,
        first_token_at_s=None,
        ended_at_s=at_s,
    )


async def until(ask: Callable[[], Awaitable[object]], wanted: object) -> None:
    async with asyncio.timeout(20.0):
        while await ask() != wanted:
            await asyncio.sleep(0.005)


async def test_a_first_call_opens_a_workflow(store: ShakyStore, open_ones: TransparentWorkflows) -> None:
    await open_ones.touch(a(), "red")
    record = await store.workflow("red:w", tenant="red")
    assert record is not None
    assert (record.mode, record.kind, record.name, record.state) == ("transparent", "k", "w", "running")


async def test_a_final_call_ends_it_once_all_its_calls_are_over(
    store: ShakyStore, open_ones: TransparentWorkflows
) -> None:
    first = await open_ones.touch(a(), "red")
    await visit(open_ones, a(final=True))
    assert await state(store) == "running"
    await open_ones.release(first)
    record = await store.workflow("red:w", tenant="red")
    assert record is not None
    assert (record.state, record.outcome) == ("finished", b'{"calls":2,"ended_by":"final"}')


async def test_a_workflow_that_has_ended_takes_no_calls(open_ones: TransparentWorkflows) -> None:
    await visit(open_ones, a(final=True))
    for _ in range(2):
        with pytest.raises(BadRequest, match="'w' has ended"):
            await open_ones.touch(a(), "red")


async def test_no_call_slips_into_an_ended_workflow_beside_another(open_ones: TransparentWorkflows) -> None:
    await visit(open_ones, a(final=True))
    results = await asyncio.gather(*(open_ones.touch(a(), "red") for _ in range(5)), return_exceptions=True)
    assert [type(result) for result in results] == [BadRequest] * 5


async def test_calls_that_begin_together_open_one_workflow(store: ShakyStore, open_ones: TransparentWorkflows) -> None:
    *others, last = await asyncio.gather(*(open_ones.touch(a(), "red") for _ in range(5)))
    for begun in others:
        await open_ones.release(begun)
    await visit(open_ones, a(final=True))
    assert await state(store) == "running"
    await open_ones.release(last)
    assert await state(store) == "finished"


async def test_two_tenants_may_use_the_same_id(store: ShakyStore, open_ones: TransparentWorkflows) -> None:
    await open_ones.touch(a(), "blue")
    await visit(open_ones, a(final=True))
    assert await state(store, "red:w") == "finished"
    assert await state(store, "blue:w") == "running"


async def test_silence_ends_a_workflow_but_not_one_with_a_call_in_flight(
    store: ShakyStore, clock: Clock, open_ones: TransparentWorkflows
) -> None:
    reaper = asyncio.create_task(open_ones.run())
    try:
        await visit(open_ones, a("quiet"))
        busy = await open_ones.touch(a("busy"), "red")
        clock.at_s += 60.0
        await until(lambda: state(store, "red:quiet"), "finished")
        assert await state(store, "red:busy") == "running"
        await open_ones.release(busy)
        clock.at_s += 60.0
        await until(lambda: state(store, "red:busy"), "finished")
    finally:
        reaper.cancel()
        await asyncio.wait({reaper})


async def test_a_restart_takes_open_workflows_up_again(store: ShakyStore, clock: Clock) -> None:
    await TransparentWorkflows(store, clock, epoch=alone(store), idle_s=60.0).touch(a(), "red")
    later = TransparentWorkflows(store, clock, epoch=alone(store), idle_s=60.0)
    await later.recover()
    await visit(later, a(final=True))
    assert await state(store) == "finished"


@asynccontextmanager
async def running(workflows: TransparentWorkflows) -> AsyncIterator[None]:
    task = asyncio.create_task(workflows.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


async def test_what_its_client_goes_on_with_at_another_server_is_left_to_that_one(
    store: ShakyStore, clock: Clock
) -> None:
    told: list[list[Message]] = [[], []]
    there, here = (
        TransparentWorkflows(store, clock, epoch=among(store), idle_s=0.1, post=told[i].append) for i in range(2)
    )
    await visit(there, a("moved"))
    await visit(there, a("stayed"))
    moved = await here.touch(a("moved"), "red")
    clock.at_s += 60.0
    async with running(there):
        await until(lambda: state(store, "red:stayed"), "finished")
        async with asyncio.timeout(20.0):
            while len(told[0]) < 4:
                await asyncio.sleep(0.005)
        assert await state(store, "red:moved") == "running"
    ends = {m.workflow_id: m.state for m in told[0] if isinstance(m, WorkflowEnded)}
    assert ends == {"red:moved": "left", "red:stayed": "finished"}
    await here.release(moved)
    clock.at_s += 60.0
    async with running(here):
        await until(lambda: state(store, "red:moved"), "finished")
    assert told[1][1:] == [WorkflowEnded(workflow_id="red:moved", state="finished")]
    assert await visit(there, a("moved")) == "red:moved~2"


async def test_what_a_client_does_at_a_server_that_does_not_own_it_counts_as_heard_of(
    store: ShakyStore, clock: Clock
) -> None:
    there, here = (TransparentWorkflows(store, clock, epoch=among(store), idle_s=0.1) for _ in range(2))
    busy = await there.touch(a("busy"), "red")
    await visit(here, a("busy"))
    await visit(here, a("quiet"))
    there.seen(busy, msgspec.structs.replace(a_call("c1"), workflow_id="red:busy"), tools_offered=0)
    await there.outline("red:busy")  # writes it down
    clock.at_s += 60.0
    async with running(here):
        await until(lambda: state(store, "red:quiet"), "finished")
        assert await state(store, "red:busy") == "running"
        clock.at_s += 60.0
        await until(lambda: state(store, "red:busy"), "finished")


async def test_the_workflows_of_a_server_that_is_gone_are_ended_once_by_one_of_the_others(
    store: ShakyStore, clock: Clock
) -> None:
    gone = TransparentWorkflows(store, clock, epoch=(died := among(store)), idle_s=60.0)
    await gone.touch(a(), "red")  # and its call never comes back
    told: list[list[Message]] = [[], [], []]
    others = [
        TransparentWorkflows(store, clock, epoch=among(store), idle_s=0.1, others_every_s=0.01, post=told[i].append)
        for i in range(3)
    ]
    async with running(others[0]), running(others[1]), running(others[2]):
        for other, name in zip(others, "xyz", strict=True):
            await visit(other, a(name))
        clock.at_s += 1000.0
        for name in "xyz":
            await until(lambda name=name: state(store, f"red:{name}"), "finished")  # type: ignore[misc]
        assert await state(store) == "running", "while its server may still hear of it"
        await store.retire(await died())
        async with asyncio.timeout(20.0):
            while not any(isinstance(m, WorkflowSubmitted) and m.workflow_id == "red:w" for t in told for m in t):
                await asyncio.sleep(0.005)
        assert await state(store) == "running", "silence counts from then on"
        clock.at_s += 1000.0
        await until(lambda: state(store), "finished")
    heard = [m for t in told for m in t if m.workflow_id == "red:w"]  # type: ignore[union-attr]
    assert [type(m) for m in heard] == [WorkflowSubmitted, WorkflowEnded]
    ends = [event for event in await events_of(store) if isinstance(event, ProgramEnded)]
    assert [end.why for end in ends] == ["silence"]


async def test_a_workflow_that_could_not_be_stored_can_be_begun_again(
    store: ShakyStore, open_ones: TransparentWorkflows
) -> None:
    store.failures = 1
    with pytest.raises(StoreError):
        await open_ones.touch(a(), "red")
    assert await state(store) is None
    await open_ones.touch(a(), "red")
    assert await state(store) == "running"


async def test_a_call_is_over_even_if_its_workflow_cannot_be_ended_and_silence_ends_that_later(
    store: ShakyStore, clock: Clock, open_ones: TransparentWorkflows
) -> None:
    begun = await open_ones.touch(a(final=True), "red")
    store.failures = 2
    await open_ones.release(begun)
    assert await state(store) == "running"
    clock.at_s += 60.0
    reaper = asyncio.create_task(open_ones.run())
    try:
        await until(lambda: state(store), "finished")
    finally:
        reaper.cancel()
        await asyncio.wait({reaper})


SUBMITTED = WorkflowSubmitted(workflow_id="red:w", kind="k")
ENDED = WorkflowEnded(workflow_id="red:w", state="finished")


@dataclass
class Listener:
    """Writes down what agents and figures hear, and in which order."""

    messages: list[Message]
    latencies_s: list[float]

    def listen(self, store: SqliteStore, clock: Clock) -> TransparentWorkflows:
        return TransparentWorkflows(
            store, clock, epoch=alone(store), idle_s=0.04, post=self.messages.append, on_latency=self.latencies_s.append
        )

    async def hear_the_end(self, workflows: TransparentWorkflows) -> None:
        """Wait until silence has ended a workflow."""
        reaper = asyncio.create_task(workflows.run())
        try:
            async with asyncio.timeout(20.0):
                while ENDED not in self.messages:
                    await asyncio.sleep(0.005)
        finally:
            reaper.cancel()
            await asyncio.wait({reaper})


@pytest.fixture
def listener() -> Listener:
    return Listener([], [])


async def test_agents_hear_once_that_a_workflow_begins_and_once_that_it_has_ended(
    store: ShakyStore, clock: Clock, listener: Listener
) -> None:
    workflows = listener.listen(store, clock)
    visits = await asyncio.gather(*(workflows.touch(a(final=True), "red") for _ in range(5)))
    assert listener.messages == [SUBMITTED]
    clock.at_s += 3.0
    await asyncio.gather(*map(workflows.release, visits))
    with pytest.raises(BadRequest):
        await workflows.touch(a(), "red")
    assert (listener.messages, listener.latencies_s) == ([SUBMITTED, ENDED], [3.0])


async def test_agents_hear_nothing_of_a_workflow_that_could_not_be_stored(
    store: ShakyStore, clock: Clock, listener: Listener
) -> None:
    workflows = listener.listen(store, clock)
    store.failures = 1
    with pytest.raises(StoreError):
        await workflows.touch(a(), "red")
    assert listener.messages == []
    await workflows.touch(a(), "red")
    assert listener.messages == [SUBMITTED]


async def test_the_silence_that_ends_a_workflow_is_not_in_its_latency(
    store: ShakyStore, clock: Clock, listener: Listener
) -> None:
    workflows = listener.listen(store, clock)
    begun = await workflows.touch(a(), "red")
    clock.at_s += 2.0
    await workflows.release(begun)
    clock.at_s += 60.0
    await listener.hear_the_end(workflows)
    assert (listener.messages, listener.latencies_s) == ([SUBMITTED, ENDED], [2.0])


async def test_a_workflow_that_was_open_at_the_restart_is_told_again_and_ends_once(
    store: ShakyStore, clock: Clock, listener: Listener
) -> None:
    await TransparentWorkflows(store, clock, epoch=alone(store), idle_s=60.0).touch(a(), "red")
    await store.record_call(ended_call("c", at_s=1004.0))
    await store.record_call(ended_call("d", at_s=1003.0))
    clock.at_s += 60.0
    workflows = listener.listen(store, clock)
    await workflows.recover()
    again = msgspec.structs.replace(SUBMITTED, submitted_at_s=clock.at_s - 60.0)
    assert listener.messages == [again]
    clock.at_s += 60.0
    await listener.hear_the_end(workflows)
    assert (listener.messages, listener.latencies_s) == ([again, ENDED], [4.0])


async def test_an_end_whose_answer_was_lost_is_told_once(store: ShakyStore, clock: Clock, listener: Listener) -> None:
    workflows = listener.listen(store, clock)
    begun = await workflows.touch(a(final=True), "red")
    store.unanswered = 1
    await workflows.release(begun)
    assert await state(store) == "finished"
    assert listener.messages == [SUBMITTED]
    clock.at_s += 60.0
    await listener.hear_the_end(workflows)
    assert listener.messages == [SUBMITTED, ENDED]


async def test_agents_that_raise_do_not_hurt_a_workflow(store: ShakyStore, clock: Clock) -> None:
    def raises(heard: object) -> None:
        raise RuntimeError("listener")

    workflows = TransparentWorkflows(store, clock, epoch=alone(store), idle_s=0.04, post=raises, on_latency=raises)
    await visit(workflows, a(final=True))
    assert await state(store) == "finished"


CLIENTS: list[Source] = ["swarmx", "dynamo", "claude_code", "codex", "deepseek", "session", "trace"]


@pytest.fixture
def fall_silent(
    open_ones: TransparentWorkflows, clock: Clock, heard: list[Message]
) -> Callable[[str], Awaitable[None]]:
    """Lets so much time go by that the workflow has ended."""

    async def fall(workflow_id: str) -> None:
        clock.at_s += 1000.0
        reaper = asyncio.create_task(open_ones.run())
        ended = WorkflowEnded(workflow_id=workflow_id, state="finished")
        try:
            async with asyncio.timeout(20.0):
                while ended not in heard:
                    await asyncio.sleep(0.005)
        finally:
            reaper.cancel()
            await asyncio.wait({reaper})

    return fall


async def events_of(store: ShakyStore, workflow_id: str = "red:w") -> list[ProgramEvent]:
    return program_events(await store.events(workflow_id))


@pytest.mark.parametrize("source", CLIENTS)
async def test_a_session_that_was_ended_by_silence_is_answered_as_its_next_generation(
    store: ShakyStore, fall_silent: Callable[[str], Awaitable[None]], open_ones: TransparentWorkflows, source: Source
) -> None:
    ids = [await visit(open_ones, a(source=source))]
    for _ in range(5):
        await fall_silent(ids[-1])
        ids.append(await visit(open_ones, a(source=source)))
        assert await visit(open_ones, a(source=source)) == ids[-1]
    assert ids == ["red:w", "red:w~2", "red:w~3", "red:w~4", "red:w~5", "red:w~6"]
    page = await store.workflows(tenant="red", state=None, limit=10, cursor=None)
    assert {(record.name, record.kind, record.mode) for record in page.workflows} == {("w", "k", "transparent")}


@pytest.mark.parametrize("source", CLIENTS[1:])
async def test_a_foreign_session_goes_on_even_after_its_final_call(
    open_ones: TransparentWorkflows, source: Source
) -> None:
    assert await visit(open_ones, a(source=source, final=True)) == "red:w"
    assert await visit(open_ones, a(source=source)) == "red:w~2"


async def test_an_id_of_ours_that_ended_in_silence_may_end_for_good_later(
    store: ShakyStore, fall_silent: Callable[[str], Awaitable[None]], open_ones: TransparentWorkflows
) -> None:
    await fall_silent(await visit(open_ones, a()))
    assert await visit(open_ones, a(final=True)) == "red:w~2"
    with pytest.raises(BadRequest, match="'w' has ended"):
        await visit(open_ones, a())


async def test_calls_that_come_back_together_begin_one_generation(
    store: ShakyStore, fall_silent: Callable[[str], Awaitable[None]], open_ones: TransparentWorkflows
) -> None:
    await fall_silent(await visit(open_ones, a()))
    visits = await asyncio.gather(*(open_ones.touch(a(), "red") for _ in range(5)))
    assert {begun.workflow_id for begun in visits} == {"red:w~2"}


async def test_a_call_that_comes_while_its_workflow_ends_belongs_to_the_next_generation(
    open_ones: TransparentWorkflows,
) -> None:
    last = await open_ones.touch(a(source="session", final=True), "red")
    _, begun = await asyncio.gather(open_ones.release(last), open_ones.touch(a(source="session"), "red"))
    assert begun.workflow_id == "red:w~2"


async def test_a_beginning_whose_answer_was_lost_is_taken_up(store: ShakyStore, clock: Clock) -> None:
    workflows = TransparentWorkflows(store, clock, epoch=alone(store), idle_s=60.0)
    store.unanswered = 1
    with pytest.raises(StoreError):
        await workflows.touch(a(), "red")
    assert await visit(workflows, a(final=True)) == "red:w"
    assert await state(store) == "finished"


async def test_a_client_may_say_that_it_is_over_without_a_call(
    store: ShakyStore, open_ones: TransparentWorkflows
) -> None:
    await open_ones.close(a("unknown"), "red")
    assert await state(store, "red:unknown") is None
    begun = await open_ones.touch(a(), "red")
    await open_ones.close(a(), "red")
    assert await state(store) == "running"
    await open_ones.release(begun)
    assert await state(store) == "finished"


async def test_a_child_knows_its_parent_and_outlives_it(store: ShakyStore, open_ones: TransparentWorkflows) -> None:
    parent = await open_ones.touch(a("p", source="session", final=True), "red")
    child = await open_ones.touch(a("c", source="session", parent="p"), "red")
    await open_ones.release(parent)
    assert (await state(store, "red:p"), await state(store, "red:c")) == ("finished", "running")
    record = await store.workflow(child.workflow_id, tenant="red")
    assert record is not None
    assert record.parent_id == "red:p"
    assert outline(await events_of(store, "red:p"))["subagents"] == ["red:c"]
    assert (await open_ones.outline("red:c"))["parent_id"] == "red:p"


async def test_a_child_names_the_generation_of_its_parent_that_is_open(
    store: ShakyStore, fall_silent: Callable[[str], Awaitable[None]], open_ones: TransparentWorkflows
) -> None:
    await fall_silent(await visit(open_ones, a("p")))
    await open_ones.touch(a("p"), "red")
    record = await store.workflow(await visit(open_ones, a("c", parent="p")), tenant="red")
    assert record is not None
    assert record.parent_id == "red:p~2"


async def forever(begun: Visit) -> None:
    await begun.guard(asyncio.Event().wait())


async def test_cancelling_a_parent_lets_the_calls_of_its_whole_tree_go(
    store: ShakyStore, open_ones: TransparentWorkflows
) -> None:
    tree = {"p": None, "c": "p", "d": "c", "other": None, "early": "late", "late": "d"}
    visits = {
        name: await open_ones.touch(a(name, source="session", parent=parent), "red") for name, parent in tree.items()
    }
    visits["blue"] = await open_ones.touch(a("c", source="session", parent="p"), "blue")
    calls = {name: asyncio.ensure_future(forever(begun)) for name, begun in visits.items()}
    await asyncio.sleep(0)
    assert await open_ones.cancel("red:p", "red")
    gone = {"p", "c", "d", "late", "early"}
    for name in gone:
        with pytest.raises(BadRequest, match="was cancelled"):
            await calls[name]
        assert await state(store, f"red:{name}") == "cancelling"
        await open_ones.release(visits[name])
        assert await state(store, f"red:{name}") == "cancelled"
    for name in visits.keys() - gone:
        assert not calls[name].done()
        calls[name].cancel()
    assert (await state(store, "red:other"), await state(store, "blue:c")) == ("running", "running")


async def test_a_step_that_begins_after_the_cancel_is_let_go_too(open_ones: TransparentWorkflows) -> None:
    begun = await open_ones.touch(a(), "red")
    assert await open_ones.cancel("red:w", None)
    with pytest.raises(BadRequest, match="was cancelled"):
        await forever(begun)


async def test_a_time_out_of_the_step_s_own_is_no_cancel(open_ones: TransparentWorkflows) -> None:
    async def late() -> None:
        raise TimeoutError("of its own")

    begun = await open_ones.touch(a(), "red")
    with pytest.raises(TimeoutError, match="of its own"):
        await begun.guard(late())


@pytest.mark.parametrize("source", CLIENTS)
async def test_what_was_cancelled_takes_no_calls_whoever_makes_them(
    store: ShakyStore, open_ones: TransparentWorkflows, source: Source
) -> None:
    begun = await open_ones.touch(a(source=source), "red")
    assert await open_ones.cancel("red:w", "red")
    with pytest.raises(BadRequest, match="'w' was cancelled"):
        await open_ones.touch(a(source=source), "red")
    await open_ones.release(begun)
    with pytest.raises(BadRequest, match="'w' was cancelled"):
        await open_ones.touch(a(source=source), "red")


async def test_a_tenant_cannot_cancel_what_is_another_s_and_nobody_what_is_not_open(
    store: ShakyStore, open_ones: TransparentWorkflows
) -> None:
    await open_ones.touch(a(), "red")
    assert not await open_ones.cancel("red:w", "blue")
    assert not await open_ones.cancel("red:unknown", None)
    assert await state(store) == "running"


async def test_a_cancel_holds_over_a_restart(store: ShakyStore, clock: Clock) -> None:
    before = TransparentWorkflows(store, clock, epoch=alone(store), idle_s=60.0)
    await before.touch(a("p"), "red")
    await before.touch(a("c", parent="p"), "red")
    await before.touch(a("q"), "red")
    assert await before.cancel("red:c", None)
    later = TransparentWorkflows(store, clock, epoch=alone(store), idle_s=1.0)
    await later.recover()
    reaper = asyncio.create_task(later.run())
    try:
        await until(lambda: state(store, "red:c"), "cancelled")
    finally:
        reaper.cancel()
        await asyncio.wait({reaper})
    assert await state(store, "red:p") == "running"
    with pytest.raises(BadRequest, match="was cancelled"):
        await later.touch(a("c", parent="p"), "red")


async def test_the_tree_is_known_after_a_restart(store: ShakyStore, clock: Clock) -> None:
    before = TransparentWorkflows(store, clock, epoch=alone(store), idle_s=60.0)
    await before.touch(a("p"), "red")
    await before.touch(a("c", parent="p"), "red")
    later = TransparentWorkflows(store, clock, epoch=alone(store), idle_s=60.0)
    await later.recover()
    assert await later.cancel("red:p", None)
    assert (await state(store, "red:p"), await state(store, "red:c")) == ("cancelled", "cancelled")


async def test_parents_in_a_circle_are_cancelled_once(store: ShakyStore, open_ones: TransparentWorkflows) -> None:
    await visit(open_ones, a("p", parent="c"))
    await visit(open_ones, a("c", parent="p"))
    assert await open_ones.cancel("red:c", None)
    assert (await state(store, "red:p"), await state(store, "red:c")) == ("cancelled", "cancelled")


async def test_what_is_seen_of_a_program_is_kept_in_order(store: ShakyStore, open_ones: TransparentWorkflows) -> None:
    call = msgspec.structs.replace(a_call("c1"), workflow_id="red:w")
    begun = await open_ones.touch(a(source="codex", final=True), "red")
    open_ones.seen(begun, call, tools_offered=3)
    open_ones.answered(call, ("grep", "read"))
    open_ones.tools_returned("red:w", ("grep", "read"), 0.5)
    open_ones.answered(msgspec.structs.replace(call, workflow_id="wf_declared"), ("other",))
    await open_ones.release(begun)
    events = await events_of(store)
    assert [type(event).__name__ for event in events] == [
        "ProgramStarted", "CallSeen", "CallAnswered", "ToolGap", "ProgramEnded",
    ]  # fmt: skip
    assert outline(events) == {
        "source": "codex", "parent_id": None, "subagents": [], "tools": {"grep": 1, "read": 1}, "gaps_s": 0.5,
        "ended_by": "final",
    }  # fmt: skip


async def test_events_are_written_while_the_program_runs_and_a_full_disk_only_delays_them(
    store: ShakyStore, clock: Clock, open_ones: TransparentWorkflows
) -> None:
    begun = await open_ones.touch(a(), "red")
    open_ones.seen(begun, msgspec.structs.replace(a_call("c1"), workflow_id="red:w"), tools_offered=0)
    store.failures, store.unanswered = 2, 1

    async def count() -> int:
        return len(await store.events("red:w"))

    reaper = asyncio.create_task(open_ones.run())
    try:
        await until(count, 2)
        open_ones.tools_returned("red:w", ("grep",), 1.0)
        await until(count, 3)
    finally:
        reaper.cancel()
        await asyncio.wait({reaper})
    assert [type(event).__name__ for event in await events_of(store)] == ["ProgramStarted", "CallSeen", "ToolGap"]


async def test_events_that_are_too_many_are_counted(store: ShakyStore, open_ones: TransparentWorkflows) -> None:
    begun = await open_ones.touch(a(final=True), "red")
    for _ in range(MOST_WAITING + 7):
        open_ones.tools_returned("red:w", ("grep",), 1.0)
    await open_ones.release(begun)
    events = await events_of(store)
    assert len(events) == MOST_WAITING + 2
    assert events[-1] == ProgramEnded(at_s=1000.0, why="final", lost=7)


async def test_the_last_events_are_written_when_the_server_stops(
    store: ShakyStore, open_ones: TransparentWorkflows
) -> None:
    reaper = asyncio.create_task(open_ones.run())
    await asyncio.sleep(0)
    await open_ones.touch(a(), "red")
    open_ones.tools_returned("red:w", ("grep",), 1.0)
    reaper.cancel()
    await asyncio.wait({reaper})
    assert outline(await events_of(store))["gaps_s"] == 1.0


def test_events_of_another_version_are_told_from_nonsense() -> None:
    with pytest.raises(StoreError, match="another version"):
        program_events([StoredEvent(seq=1, at_s=0.0, body=b'{"type":"Unheard"}')])
