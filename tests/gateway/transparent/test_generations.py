"""A client that comes back after its workflow ended goes on in the next generation; children know their parents."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from swarmx.core.errors import StoreError
from swarmx.gateway.identity import Source
from swarmx.gateway.program_events import outline
from swarmx.gateway.transparent import TransparentWorkflows
from swarmx.runtime.requests import BadRequest
from tests.gateway.transparent.programs import CLIENTS, Clock, ShakyStore, a, alone, events_of, state, visit


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
