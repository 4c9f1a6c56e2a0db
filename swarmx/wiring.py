"""The composition root: the only module that knows everyone, and puts a running SwarmX together."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import IO, Any

import msgspec
from fastapi import FastAPI

from swarmx.agents.router import RouterAgent
from swarmx.config import EmulatedReplicas, Settings
from swarmx.core.actions import Cancel, Dispatch, Refuse
from swarmx.core.engine import profiles
from swarmx.core.errors import ConfigError
from swarmx.core.messages import DecisionMade, Message
from swarmx.core.ports import Provider
from swarmx.core.records import CallRecord
from swarmx.gateway.app import create_app
from swarmx.gateway.context import Context
from swarmx.gateway.keys import Keyring
from swarmx.gateway.telemetry import Telemetry
from swarmx.gateway.transparent import TransparentWorkflows
from swarmx.memory.sqlite import SqliteStore
from swarmx.neural.empirical import EmpiricalForecaster
from swarmx.providers.emulated.provider import EmulatedProvider, EmulatedSpec
from swarmx.providers.static import StaticProvider, static_replica
from swarmx.runtime.calls import CallService
from swarmx.runtime.clock import WallClock
from swarmx.runtime.fleet_book import FleetBook
from swarmx.runtime.journal import FileJournal, MemoryJournal
from swarmx.runtime.live import LiveShell
from swarmx.runtime.switchboard import Switchboard
from swarmx.runtime.upstream import Upstream
from swarmx.runtime.watch import Watch
from swarmx.runtime.workflows import WorkflowRunner

log = logging.getLogger(__name__)


class Background:
    """Records that nobody waits for, handed to the store together every 50 ms: one commit carries many.

    At most `limit` wait; more are counted as lost, as are those that the store refuses.
    """

    def __init__(self, telemetry: Telemetry, *, every_s: float = 0.05, limit: int = 20_000) -> None:
        self._telemetry = telemetry
        self._every_s = every_s
        self._limit = limit
        self._waiting: list[Coroutine[Any, Any, None]] = []
        self._writing = asyncio.Lock()

    def add(self, work: Coroutine[Any, Any, None]) -> None:
        if len(self._waiting) < self._limit:
            self._waiting.append(work)
        else:
            work.close()
            self._telemetry.record_lost()

    async def run(self) -> None:
        """Flush for ever; cancel it, then flush once more."""
        while True:
            await asyncio.sleep(self._every_s)
            await self.flush()

    async def flush(self) -> None:
        """Return once everything that was added before is in the store."""
        async with self._writing:
            batch, self._waiting = self._waiting, []
            for result in await asyncio.gather(*batch, return_exceptions=True):
                if isinstance(result, Exception):
                    self._telemetry.record_lost()
                    log.error("a record was lost: %s", result)


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[tuple[FastAPI, Context]]:
    """Everything started, in order, and stopped again in the opposite order."""
    settings.state.dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    async with AsyncExitStack() as stack:
        stack.callback(_lock(settings.state.dir).close)
        clock = WallClock()
        store = SqliteStore(settings.state.dir / "swarmx.db")
        await store.open()
        stack.push_async_callback(store.close)

        book = FleetBook(clock)
        telemetry = Telemetry(book, faults=lambda: switchboard.faults)
        background = Background(telemetry)
        stack.push_async_callback(background.flush)
        stack.push_async_callback(_cancelled, asyncio.create_task(background.run(), name="records"))

        agent = RouterAgent(settings.router.settings())
        switchboard = Switchboard([agent], epoch=int(clock.now_s()), journal=_journal(settings, agent, stack))
        upstream = Upstream()
        stack.push_async_callback(upstream.close)

        def record_call(record: CallRecord) -> None:
            telemetry.call_ended(record)
            background.add(store.record_call(record))

        def log_decision(message: Message, now_s: float) -> None:
            if isinstance(message, DecisionMade):
                background.add(store.record_decision(message.decision))

        calls = CallService(
            post=lambda message: shell.post(message),
            clock=clock,
            forecaster=EmpiricalForecaster(),
            upstream=upstream,
            book=book,
            on_record=record_call,
        )
        shell = LiveShell(
            switchboard,
            clock,
            {Dispatch: calls.perform_dispatch, Cancel: calls.perform_cancel, Refuse: calls.perform_refuse},
        )
        stack.callback(shell.close)
        switchboard.observers += [book.observe, calls.observe, telemetry.observe, log_decision]

        watch = Watch(
            shell.post,
            clock,
            every_s=settings.watch.every_s,
            timeout_s=settings.watch.timeout_s,
            failures=settings.watch.failures,
        )
        stack.push_async_callback(watch.close)
        for provider in _providers(settings):
            stack.push_async_callback(provider.stop)
            for replica in await provider.start():
                watch.add(replica)

        workflows = WorkflowRunner(store, calls, clock)
        stack.push_async_callback(workflows.close)
        transparent = TransparentWorkflows(store, clock, idle_s=settings.workflows.transparent_idle_s)
        await transparent.recover()
        reaper = asyncio.create_task(transparent.run(), name="transparent workflows")
        stack.push_async_callback(_cancelled, reaper)
        await workflows.recover()

        context = Context(
            clock=clock,
            store=store,
            keys=Keyring(settings.state.dir / "keys.json"),
            post=shell.post,
            flush=background.flush,
            calls=calls,
            workflows=workflows,
            transparent=transparent,
            book=book,
            telemetry=telemetry,
            policy=agent.policy.name,
            parameters=agent.parameters,
        )
        yield create_app(context, max_body_bytes=settings.server.max_body_bytes), context


def _lock(folder: Path) -> IO[bytes]:
    """One server a state folder: two would both run the workflows in it. Raises ConfigError."""
    file = os.fdopen(os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "rb+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(f"another SwarmX runs on {folder}; stop it, or choose a folder with --state-dir.") from None
    return file


def _journal(settings: Settings, agent: RouterAgent, stack: AsyncExitStack) -> FileJournal | MemoryJournal:
    if not settings.state.journal:
        return MemoryJournal(limit=0)
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime()) + f"-{time.time_ns() % 1_000_000_000:09d}"
    path = settings.state.dir / "journals" / f"{stamp}.jsonl"
    journal = FileJournal(path, {agent.name: msgspec.to_builtins(agent.settings)})
    flusher = asyncio.create_task(_flush(journal), name="journal")
    stack.callback(journal.close)
    stack.push_async_callback(_cancelled, flusher)
    return journal


async def _flush(journal: FileJournal) -> None:
    while True:
        await asyncio.sleep(0.5)
        journal.flush()


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _providers(settings: Settings) -> Sequence[Provider]:
    static = [
        static_replica(replica_id=r.id, model=r.model, kind=r.kind, device=r.device, url=r.url, profile=r.profile)
        for r in settings.replicas
    ]
    providers: list[Provider] = [StaticProvider(static)]
    if settings.emulated:
        specs = [spec for group in settings.emulated for spec in _emulated(group)]
        emulation = settings.emulation
        providers.append(EmulatedProvider(specs, time_scale=emulation.time_scale, seed=emulation.seed))
    return providers


def _emulated(group: EmulatedReplicas) -> Sequence[EmulatedSpec]:
    profile = profiles().get((group.model, group.device))
    if profile is not None and (profile.max_batch == 1) != (group.kind == "image"):
        raise ConfigError(
            f"emulated: {group.model!r} serves {'images' if profile.max_batch == 1 else 'text'}; set kind."
        )
    if profile is None:
        devices = sorted(device for model, device in profiles() if model == group.model)
        models = sorted({model for model, _ in profiles()})
        known = f"{group.model} is profiled on {', '.join(devices)}" if devices else f"models are {', '.join(models)}"
        raise ConfigError(f"emulated: there is no profile of {group.model!r} on {group.device!r}; {known}.")
    return [
        EmulatedSpec(
            replica_id=replica_id,
            model=group.model,
            kind=group.kind,
            device=group.device,
            size_class=group.size_class,
            profile=profile,
        )
        for replica_id in group.ids()
    ]
