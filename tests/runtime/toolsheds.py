"""Servers that offer tools, a catalogue that has asked them, and who stands in for their replicas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from aiohttp import web

from swarmx.core.messages import ReplicaChanged
from swarmx.core.nouns import Replica, ReplicaState
from swarmx.core.toolbox import Offer, ToolSpec
from swarmx.providers.tool_replicas import tool_replica
from swarmx.runtime.tool_catalogue import ToolCatalogue


def a_spec(name: str, **more: Any) -> ToolSpec:
    return ToolSpec(
        **{
            "name": name,
            "description": "Does something.",
            "parameters": {"type": "object"},
            "pool": "of-its-file",
            "timeout_s": 30.0,
            "idempotent": False,
            **more,
        }
    )


def an_offer(*specs: ToolSpec, **refused: str) -> Offer:
    return Offer(pool="of-its-file", slots=2, tools=list(specs), refused=refused)


class Shop:
    """A server that offers; what it says may be changed. `asked` counts, `tokens` are those that it was shown."""

    def __init__(self, offer: Offer | bytes) -> None:
        self.offer, self.asked, self.tokens, self.url = offer, 0, list[str | None](), ""

    async def tell(self, request: web.Request) -> web.Response:
        self.asked += 1
        self.tokens.append(request.headers.get("authorization"))
        body = self.offer if isinstance(self.offer, bytes) else msgspec.json.encode(self.offer)
        return web.Response(body=body, content_type="application/json")

    def replica(self, replica_id: str, *, pool: str = "tools") -> Replica:
        return tool_replica(replica_id, pool=pool, url=self.url, slots=2, provider="test")

    def changed(self, replica_id: str, state: ReplicaState = "ready", *, pool: str = "tools") -> ReplicaChanged:
        return ReplicaChanged(replica=self.replica(replica_id, pool=pool), state=state)


@asynccontextmanager
async def shops(*offers: Offer | bytes) -> AsyncIterator[list[Shop]]:
    """A shop for each offer."""
    made = [Shop(offer) for offer in offers]
    runners = []
    try:
        for shop in made:
            app = web.Application()
            app.router.add_get("/v1/tools", shop.tell)
            runners.append(web.AppRunner(app, access_log=None))
            await runners[-1].setup()
            await web.TCPSite(runners[-1], "127.0.0.1", 0).start()
            shop.url = f"http://127.0.0.1:{runners[-1].addresses[0][1]}"
        yield made
    finally:
        for runner in runners:
            await runner.cleanup()


@asynccontextmanager
async def asking(catalogue: ToolCatalogue) -> AsyncIterator[ToolCatalogue]:
    """The catalogue at work."""
    task = asyncio.create_task(catalogue.run())
    try:
        yield catalogue
    finally:
        task.cancel()
        await asyncio.wait((task,))


@asynccontextmanager
async def catalogue_of(*specs: ToolSpec) -> AsyncIterator[ToolCatalogue]:
    """A catalogue that has heard of these tools."""
    async with shops(an_offer(*specs)) as (shop,), asking(ToolCatalogue(["tools"], every_s=0.01)) as catalogue:
        catalogue.observe(shop.changed("a"), 0.0)
        await catalogue.settled()
        yield catalogue


async def until(holds: Callable[[], bool]) -> None:
    """Wait for something that other tasks bring about."""
    async with asyncio.timeout(30.0):
        while not holds():
            await asyncio.sleep(0.005)
