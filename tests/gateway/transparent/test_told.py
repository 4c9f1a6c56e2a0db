"""What agents and figures hear of transparent workflows: each begins once and ends once."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import msgspec
import pytest

from swarmx.core.errors import StoreError
from swarmx.core.messages import Message, WorkflowEnded, WorkflowSubmitted
from swarmx.core.records import CallRecord
from swarmx.gateway.transparent import TransparentWorkflows
from swarmx.memory.sqlite import SqliteStore
from swarmx.runtime.requests import BadRequest
from tests.gateway.transparent.programs import Clock, ShakyStore, a, alone, state, visit


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
