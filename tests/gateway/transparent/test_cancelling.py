"""Transparent workflows that are cancelled let their calls go, with their whole tree, and take no more."""

from __future__ import annotations

import asyncio

import pytest

from swarmx.gateway.identity import Source
from swarmx.gateway.transparent import TransparentWorkflows, Visit
from swarmx.runtime.requests import BadRequest
from tests.gateway.transparent.programs import CLIENTS, Clock, ShakyStore, a, alone, state, until, visit


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
