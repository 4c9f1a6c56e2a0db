"""The actor of one replica: starts its engine on the node where Ray put it, opens the door, and watches beside it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import Any

import msgspec

from swarmx.core.errors import ReplicaError
from swarmx.providers.ray.door import Door
from swarmx.providers.ray.engine import EngineProcess
from swarmx.providers.ray.lookout import find_lookout
from swarmx.providers.ray.observer import Observer
from swarmx.providers.ray.wire import News, Standing, Wanted


class ReplicaActor:
    """Found by its name, by whichever gateway comes next; what it is given and gives are JSON.

    It lives as long as somebody asks for it: the gateway that put it here, or another after a restart.
    """

    def __init__(self, wanted: bytes, namespace: str) -> None:
        self._wanted = msgspec.json.decode(wanted, type=Wanted)
        self._namespace = namespace
        self._engine = EngineProcess(self._wanted.engine, token=self._wanted.token)
        self._standing: Standing | None = None
        self._door: Door | None = None
        self._beside: list[asyncio.Task[None]] = []
        self._over = asyncio.Event()
        self._why = ""

    async def up(self) -> tuple[bytes | None, str]:
        """Start; returns what stands then, or None and the reason why nothing does."""
        import ray

        try:
            engine_url = await self._engine.start()
        except ReplicaError as error:
            return None, str(error)
        host = ray.util.get_node_ip_address()
        self._door = Door(engine_url, self._wanted.token)
        port = await self._door.open(host)
        shown = f"[{host}]" if ":" in host else host
        node_id = ray.get_runtime_context().get_node_id()
        self._standing = Standing(wanted=self._wanted, url=f"http://{shown}:{port}", node_id=node_id)
        observer = Observer(self._wanted.replica, engine_url, tell=self._tell)
        for work in (observer.run(), self._follow_engine(), self._follow_callers(self._door)):
            self._beside.append(asyncio.create_task(work))
        return msgspec.json.encode(self._standing), ""

    async def standing(self) -> bytes | None:
        """What stands; None while it is starting, or for one that did not come up."""
        return None if self._standing is None else msgspec.json.encode(self._standing)

    async def over(self) -> str:
        """Returns the reason once the replica is no more, though its actor is."""
        await self._over.wait()
        return self._why

    async def end(self) -> None:
        """End the engine, and close the door. Safe at any time; kill the actor afterwards."""
        for task in self._beside:
            task.cancel()
        await self._engine.stop()
        if self._door is not None:
            await self._door.close()

    async def _follow_engine(self) -> None:
        status = await self._engine.wait()
        self._why = f"its engine ended with {status}: {self._engine.last_words()}"
        self._over.set()

    async def _follow_callers(self, door: Door) -> None:
        """A gateway asks how the engine is every second; without any for long, nobody will ever end this one."""
        await door.deserted(self._wanted.orphan_s)
        await self._engine.stop()
        os._exit(0)

    async def _tell(self, news: News) -> None:
        """Put it where gateways look for news; without that place they go by what they ask themselves."""
        with contextlib.suppress(Exception):
            await self._lookout().say.remote(msgspec.json.encode(news))

    def _lookout(self) -> Any:
        return find_lookout(self._namespace)
