"""Workflows that are known only from headers: opened by their first call, ended by a final one or by silence."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from swarmx.core.errors import StoreError
from swarmx.core.messages import Message, WorkflowEnded, WorkflowSubmitted
from swarmx.core.records import CallRecord, WorkflowRecord
from swarmx.gateway.transparent import Identity, TransparentWorkflows, identity_of, store_id
from swarmx.memory.sqlite import SqliteStore
from swarmx.runtime.requests import BadRequest


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

    async def accept(self, workflow: WorkflowRecord, events: Any) -> None:
        self._shake()
        await super().accept(workflow, events)

    async def append(self, *args: Any, **more: Any) -> bool:
        self._shake()
        done = await super().append(*args, **more)
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


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def open_ones(store: ShakyStore, clock: Clock) -> TransparentWorkflows:
    return TransparentWorkflows(store, clock, idle_s=0.04)


def a(workflow_id: str = "w", *, final: bool = False, kind: str = "k") -> Identity:
    return Identity(workflow_id=workflow_id, kind=kind, node="n", final=final)


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


def test_without_the_header_there_is_no_workflow() -> None:
    assert identity_of({"x-swarmx-workflow-kind": "k", "x-swarmx-node": "n"}) is None


def test_the_headers_say_who_a_call_is() -> None:
    headers = {
        "x-swarmx-workflow-id": "run-7",
        "x-swarmx-workflow-kind": "support",
        "x-swarmx-node": "plan",
        "x-swarmx-workflow-final": "TRUE",
    }
    assert identity_of(headers) == Identity(workflow_id="run-7", kind="support", node="plan", final=True)


def test_the_id_alone_is_enough() -> None:
    identity = Identity(workflow_id="x", kind="transparent", node="", final=False)
    assert identity_of({"x-swarmx-workflow-id": "x"}) == identity


@pytest.mark.parametrize("said", ["0", "false", "no", "", "maybe"])
def test_only_a_clear_yes_is_final(said: str) -> None:
    identity = identity_of({"x-swarmx-workflow-id": "x", "x-swarmx-workflow-final": said})
    assert identity is not None
    assert not identity.final


@pytest.mark.parametrize("bad", ["", " ", "a b", "a/b", "-a", "x" * 129, "ä", "a\nb"])
def test_an_id_that_cannot_be_one_is_refused(bad: str) -> None:
    with pytest.raises(BadRequest, match="x-swarmx-workflow-id"):
        identity_of({"x-swarmx-workflow-id": bad})


def test_labels_are_cut_to_a_bounded_length() -> None:
    headers = {"x-swarmx-workflow-id": "x", "x-swarmx-workflow-kind": "k" * 999, "x-swarmx-node": "n" * 999}
    identity = identity_of(headers)
    assert identity is not None
    assert (len(identity.kind), len(identity.node)) == (64, 64)


def test_tenants_do_not_share_ids() -> None:
    assert store_id(a("w"), "red") != store_id(a("w"), "blue")


async def test_a_first_call_opens_a_workflow(store: ShakyStore, open_ones: TransparentWorkflows) -> None:
    await open_ones.touch(a(), "red")
    record = await store.workflow("red:w", tenant="red")
    assert record is not None
    assert (record.mode, record.kind, record.name, record.state) == ("transparent", "k", "w", "running")


async def test_a_final_call_ends_it_once_all_its_calls_are_over(
    store: ShakyStore, open_ones: TransparentWorkflows
) -> None:
    await open_ones.touch(a(), "red")
    await open_ones.touch(a(final=True), "red")
    await open_ones.release(a(final=True), "red")
    assert await state(store) == "running"
    await open_ones.release(a(), "red")
    record = await store.workflow("red:w", tenant="red")
    assert record is not None
    assert (record.state, record.outcome) == ("finished", b'{"calls":2}')


async def test_a_workflow_that_has_ended_takes_no_calls(open_ones: TransparentWorkflows) -> None:
    await open_ones.touch(a(final=True), "red")
    await open_ones.release(a(final=True), "red")
    for _ in range(2):
        with pytest.raises(BadRequest, match="'w' has ended"):
            await open_ones.touch(a(), "red")


async def test_no_call_slips_into_an_ended_workflow_beside_another(open_ones: TransparentWorkflows) -> None:
    await open_ones.touch(a(final=True), "red")
    await open_ones.release(a(final=True), "red")
    results = await asyncio.gather(*(open_ones.touch(a(), "red") for _ in range(5)), return_exceptions=True)
    assert [type(result) for result in results] == [BadRequest] * 5


async def test_calls_that_begin_together_open_one_workflow(store: ShakyStore, open_ones: TransparentWorkflows) -> None:
    await asyncio.gather(*(open_ones.touch(a(), "red") for _ in range(5)))
    for _ in range(4):
        await open_ones.release(a(), "red")
    await open_ones.touch(a(final=True), "red")
    await open_ones.release(a(final=True), "red")
    assert await state(store) == "running"
    await open_ones.release(a(), "red")
    assert await state(store) == "finished"


async def test_two_tenants_may_use_the_same_id(store: ShakyStore, open_ones: TransparentWorkflows) -> None:
    await open_ones.touch(a(final=True), "red")
    await open_ones.touch(a(), "blue")
    await open_ones.release(a(final=True), "red")
    assert await state(store, "red:w") == "finished"
    assert await state(store, "blue:w") == "running"


async def test_silence_ends_a_workflow_but_not_one_with_a_call_in_flight(
    store: ShakyStore, clock: Clock, open_ones: TransparentWorkflows
) -> None:
    reaper = asyncio.create_task(open_ones.run())
    try:
        await open_ones.touch(a("quiet"), "red")
        await open_ones.release(a("quiet"), "red")
        await open_ones.touch(a("busy"), "red")
        clock.at_s += 60.0
        await until(lambda: state(store, "red:quiet"), "finished")
        assert await state(store, "red:busy") == "running"
        await open_ones.release(a("busy"), "red")
        clock.at_s += 60.0
        await until(lambda: state(store, "red:busy"), "finished")
    finally:
        reaper.cancel()
        await asyncio.wait({reaper})


async def test_a_restart_takes_open_workflows_up_again(store: ShakyStore, clock: Clock) -> None:
    await TransparentWorkflows(store, clock, idle_s=60.0).touch(a(), "red")
    later = TransparentWorkflows(store, clock, idle_s=60.0)
    await later.recover()
    await later.touch(a(final=True), "red")
    await later.release(a(final=True), "red")
    assert await state(store) == "finished"


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
    await open_ones.touch(a(final=True), "red")
    store.failures = 2
    await open_ones.release(a(final=True), "red")
    assert await state(store) == "running"
    clock.at_s += 60.0
    reaper = asyncio.create_task(open_ones.run())
    try:
        await until(lambda: state(store), "finished")
    finally:
        reaper.cancel()
        await asyncio.wait({reaper})


async def test_the_end_of_an_unknown_call_is_nothing(open_ones: TransparentWorkflows) -> None:
    await open_ones.release(a(), "red")


SUBMITTED = WorkflowSubmitted(workflow_id="red:w", kind="k")
ENDED = WorkflowEnded(workflow_id="red:w", state="finished")


@dataclass
class Listener:
    """Writes down what agents and figures hear, and in which order."""

    messages: list[Message]
    latencies_s: list[float]

    def listen(self, store: SqliteStore, clock: Clock) -> TransparentWorkflows:
        return TransparentWorkflows(
            store, clock, idle_s=0.04, post=self.messages.append, on_latency=self.latencies_s.append
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
    await asyncio.gather(*(workflows.touch(a(final=True), "red") for _ in range(5)))
    assert listener.messages == [SUBMITTED]
    clock.at_s += 3.0
    await asyncio.gather(*(workflows.release(a(final=True), "red") for _ in range(5)))
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
    await workflows.touch(a(), "red")
    clock.at_s += 2.0
    await workflows.release(a(), "red")
    clock.at_s += 60.0
    await listener.hear_the_end(workflows)
    assert (listener.messages, listener.latencies_s) == ([SUBMITTED, ENDED], [2.0])


async def test_a_workflow_that_was_open_at_the_restart_is_told_again_and_ends_once(
    store: ShakyStore, clock: Clock, listener: Listener
) -> None:
    await TransparentWorkflows(store, clock, idle_s=60.0).touch(a(), "red")
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
    await workflows.touch(a(final=True), "red")
    store.unanswered = 1
    await workflows.release(a(final=True), "red")
    assert await state(store) == "finished"
    assert listener.messages == [SUBMITTED]
    clock.at_s += 60.0
    await listener.hear_the_end(workflows)
    assert listener.messages == [SUBMITTED, ENDED]


async def test_agents_that_raise_do_not_hurt_a_workflow(store: ShakyStore, clock: Clock) -> None:
    def raises(heard: object) -> None:
        raise RuntimeError("listener")

    workflows = TransparentWorkflows(store, clock, idle_s=0.04, post=raises, on_latency=raises)
    await workflows.touch(a(final=True), "red")
    await workflows.release(a(final=True), "red")
    assert await state(store) == "finished"
