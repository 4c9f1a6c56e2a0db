"""Workflows that are known only from headers: opened by their first call, ended by a final one or by silence."""

from __future__ import annotations

import asyncio

import pytest

from swarmx.core.errors import StoreError
from swarmx.gateway.transparent import TransparentWorkflows
from swarmx.runtime.requests import BadRequest
from tests.gateway.transparent.programs import Clock, ShakyStore, a, alone, state, until, visit


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
