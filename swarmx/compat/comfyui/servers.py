"""The servers of a front: which of them are up, what they can run, and what they are to forget."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import aiohttp

from swarmx.compat.comfyui.events import Listener
from swarmx.compat.comfyui.nodes import NodeBook
from swarmx.compat.comfyui.server import ComfyServer, ServerAway
from swarmx.compat.comfyui.settings import FrontSettings

log = logging.getLogger(__name__)

_FAILURES = 2  # looks in a row that a server may miss
_EAGER_S = 0.5


class OnChange(Protocol):
    """A server is up or down; with `told`, it may have said something new of what it can run."""

    def __call__(self, server: str, *, told: bool) -> None: ...


class Servers(Mapping[str, ComfyServer]):
    """Looks at every server now and then, and listens to its events. The three hooks are set before `run`."""

    def __init__(self, settings: FrontSettings, session: aiohttp.ClientSession, book: NodeBook) -> None:
        self._settings = settings
        self._book = book
        self._servers = {
            server.name: ComfyServer(server.name, server.url, session, timeout_s=settings.timeout_s)
            for server in settings.servers
        }
        self._listeners = {
            name: Listener(
                server,
                on_event=lambda *event, name=name: self.on_event(name, *event),
                on_binary=lambda frame, name=name: self.on_binary(name, frame),  # type: ignore[misc]
                on_drop=lambda name=name: self.ask_again(name),  # type: ignore[misc]
            )
            for name, server in self._servers.items()
        }
        self._up: set[str] = set()
        self._abandoned: dict[str, set[str]] = {name: set() for name in self._servers}
        self._doubts = dict.fromkeys(self._servers, 0)
        self._announced = -1  # the generation of the book that whoever listens was told of last
        self._looks = {name: asyncio.Event() for name in self._servers}
        self.stats: dict[str, dict[str, Any]] = {}
        self.on_change: OnChange = lambda server, *, told: None
        self.on_event: Any = lambda server, kind, prompt_id, text: None
        self.on_binary: Any = lambda server, frame: None

    def __getitem__(self, name: str) -> ComfyServer:
        return self._servers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._servers)

    def __len__(self) -> int:
        return len(self._servers)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._servers)

    def is_up(self, name: str) -> bool:
        """Whether it answered of late."""
        return name in self._up

    def client_id(self, name: str) -> str:
        """Under which id it sends events now."""
        return self._listeners[name].client_id

    def doubt(self, name: str) -> None:
        """It lost a job: it gets no other one before it has answered."""
        self._up.discard(name)
        self._doubts[name] += 1
        self.on_change(name, told=False)
        self.ask_again(name)

    def ask_again(self, name: str) -> None:
        """Look at it now."""
        self._looks[name].set()

    def abandon(self, name: str, prompt_id: str) -> None:
        """If the server still has this job, it is to stop: the job runs elsewhere."""
        self._abandoned[name].add(prompt_id)

    async def run(self) -> None:
        """Watch and listen, for ever."""
        async with asyncio.TaskGroup() as group:
            for name in self._servers:
                group.create_task(self._watch(name), name=f"watch {name}")
                group.create_task(self._listeners[name].run(), name=f"listen {name}")

    async def _watch(self, name: str) -> None:
        failures = 0
        while True:
            try:
                await self._look(name)
                failures = 0
            except ServerAway as away:
                failures += 1
                if failures >= _FAILURES and name in self._up:
                    log.warning("%s is down: %s", name, away)
                    self._up.discard(name)
                    self.on_change(name, told=False)
            except Exception:
                log.exception("looking at %s failed", name)
            settled = name in self._up and not failures
            try:
                async with asyncio.timeout(self._settings.refresh_s if settled else _EAGER_S):
                    await self._looks[name].wait()
            except TimeoutError:
                pass
            self._looks[name].clear()

    async def _look(self, name: str) -> None:
        server, doubts = self._servers[name], self._doubts[name]
        await self._fence(name)
        self._book.told(name, await server.object_info())
        self.stats[name] = await server.system_stats()
        if self._doubts[name] != doubts:  # it lost a job while it was asked, and may still be at it
            return
        told = self._book.generation != self._announced
        if told or name not in self._up:
            self._announced = self._book.generation
            if name not in self._up:
                log.info("%s is up", name)
            self._up.add(name)
            self.on_change(name, told=told)

    async def _fence(self, name: str) -> None:
        """Stop what runs there and was given up meanwhile; nothing else may go there before that has ended.

        Its history goes, too: another attempt at the same server would be taken to have ended so.
        """
        server, abandoned = self._servers[name], frozenset(self._abandoned[name])
        still = abandoned & await server.queue()
        for prompt_id in still:
            await server.stop(prompt_id)
        if still:
            raise ServerAway("it is still at a job that it was told to stop")
        if abandoned:
            await server.forget(abandoned)
            self._abandoned[name] -= abandoned
