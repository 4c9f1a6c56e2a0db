"""The catalogue of tools before real servers on loopback: what is known, to whom, and for how long."""

from __future__ import annotations

import pytest

from swarmx.core.messages import TimerFired
from swarmx.runtime.tool_catalogue import ToolCatalogue
from tests.agents.worlds import changed
from tests.runtime.toolsheds import Shop, a_spec, an_offer, asking, shops, until


async def test_what_a_ready_replica_offers_is_known_under_the_name_of_its_pool() -> None:
    tokens = {"a": "secret"}
    async with (
        shops(an_offer(a_spec("add"), a_spec("grep"), broken="no sandbox")) as (shop,),
        asking(ToolCatalogue(["tools"], token_of=tokens.get)) as catalogue,
    ):
        assert (catalogue.of(None), catalogue.is_settled) == ({}, False)
        catalogue.observe(shop.changed("a", "starting"), 0.0)
        catalogue.observe(changed("a model's"), 0.0)
        catalogue.observe(TimerFired(key="x"), 0.0)
        catalogue.observe(shop.changed("a"), 0.0)
        await catalogue.settled()
        found = catalogue.of(None)
        assert [(name, spec.pool) for name, spec in found.items()] == [("add", "tools"), ("grep", "tools")]
        assert catalogue.refused == {"tools": {"broken": "no sandbox"}}
        assert shop.tokens == ["Bearer secret"]


async def test_a_tool_of_some_tenants_does_not_exist_for_others() -> None:
    async with (
        shops(an_offer(a_spec("all"), a_spec("mine", tenants=("acme",)))) as (shop,),
        asking(ToolCatalogue(["tools"])) as catalogue,
    ):
        catalogue.observe(shop.changed("a"), 0.0)
        await catalogue.settled()
        assert set(catalogue.of("acme")) == set(catalogue.of(None)) == {"all", "mine"}
        assert set(catalogue.of("other")) == {"all"}


async def test_a_pool_without_replicas_keeps_the_tools_that_it_had() -> None:
    async with shops(an_offer(a_spec("add"))) as (shop,), asking(ToolCatalogue(["tools"])) as catalogue:
        catalogue.observe(shop.changed("a"), 0.0)
        await catalogue.settled()
        catalogue.observe(shop.changed("a", "gone"), 0.0)
        assert set(catalogue.of(None)) == {"add"}


async def test_tools_are_those_of_all_replicas_of_a_pool_and_follow_what_they_say_later() -> None:
    async with (
        shops(an_offer(a_spec("add")), an_offer(a_spec("add"), a_spec("notes.read"))) as (few, all_),
        asking(ToolCatalogue(["tools"], every_s=0.01)) as catalogue,
    ):
        for name, shop in (("a", few), ("b", all_)):
            catalogue.observe(shop.changed(name), 0.0)
        await until(lambda: set(catalogue.of(None)) == {"add", "notes.read"})
        catalogue.observe(all_.changed("b", "gone"), 0.0)
        assert set(catalogue.of(None)) == {"add"}
        few.offer = an_offer(a_spec("subtract"))
        await until(lambda: set(catalogue.of(None)) == {"subtract"})


async def test_of_two_tools_with_one_name_that_of_the_first_pool_counts() -> None:
    async with (
        shops(an_offer(a_spec("add")), an_offer(a_spec("add"))) as (one, other),
        asking(ToolCatalogue(["tools-a", "tools-b"])) as catalogue,
    ):
        catalogue.observe(other.changed("b", pool="tools-b"), 0.0)
        catalogue.observe(one.changed("a", pool="tools-a"), 0.0)
        await catalogue.settled()
        assert catalogue.of(None)["add"].pool == "tools-a"


@pytest.mark.parametrize("said", [b"<html>", b"[]", b"\xff", b"[" * 100_000])
async def test_a_replica_that_says_nothing_sensible_is_asked_again_and_hides_no_other(said: bytes) -> None:
    async with (
        shops(said, an_offer(a_spec("add"))) as (mad, sane),
        asking(ToolCatalogue(["tools"], every_s=0.01)) as catalogue,
    ):
        catalogue.observe(mad.changed("a"), 0.0)
        catalogue.observe(sane.changed("b"), 0.0)
        await catalogue.settled()
        assert set(catalogue.of(None)) == {"add"}
        await until(lambda: mad.asked >= 2)


async def test_a_pool_that_never_answers_holds_nobody_up_for_ever() -> None:
    nowhere = Shop(b"")
    nowhere.url = "http://127.0.0.1:9"
    async with asking(ToolCatalogue(["tools"], patience_s=0.05)) as catalogue:
        catalogue.observe(nowhere.changed("a"), 0.0)
        await catalogue.settled()
        assert catalogue.of(None) == {}


def test_without_pools_it_is_known_that_there_are_no_tools() -> None:
    catalogue = ToolCatalogue()
    assert (catalogue.is_settled, catalogue.of("acme")) == (True, {})
