"""Brings emulated replicas to life as processes on this host, and to an end."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import aiohttp
import msgspec

from swarmx.core.engine import EngineProfile
from swarmx.core.errors import ReplicaError
from swarmx.core.nouns import CallKind, EngineOrder, Replica, ReplicaGroup
from swarmx.providers.emulated.telemetry import Report

START_DEADLINE_S = 60.0
STOP_PATIENCE_S = 5.0
_LAST_BREATH_S = 5.0
STDERR_LINES = 20
REQUEST_TIMEOUT = aiohttp.ClientTimeout(total=10.0)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulatedSpec:
    """One replica to emulate; `profile` holds real seconds, `size_class` stretches recorded answers."""

    replica_id: str
    model: str
    kind: CallKind
    device: str
    profile: EngineProfile
    size_class: str = "small"
    engine_order: EngineOrder = "arrival"


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulatedGroup:
    """How `deploy` emulates the replicas of a group; `profile` and `start_s` are in real seconds.

    `start_s` stands for loading the weights. For tests and demos of failures, `fault` lets every start fail: the
    process dies once it has loaded ("exit"), or loads for ever ("hang").
    """

    profile: EngineProfile
    size_class: str = "small"
    start_s: float = 0.0
    fault: Literal["exit", "hang"] | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class _Child:
    """A replica's process, and the last that it said; `url` is empty until it answers."""

    spec: EmulatedSpec
    process: asyncio.subprocess.Process
    said: deque[str] = field(default_factory=lambda: deque(maxlen=STDERR_LINES))
    listener: asyncio.Task[None] | None = None
    url: str = ""


class _Listening(msgspec.Struct):
    port: int


class EmulatedProvider:
    """An ElasticProvider whose replicas are processes that only pretend to compute.

    Every emulated second takes `1 / time_scale` seconds on the wall clock; the profiles of the replicas that `start`
    and `deploy` return are wall times. The same specs, seed and recordings (those that ship with SwarmX, or the folder
    `recorded`) give the same answers. `groups`, by their ids, are those that `deploy` knows.
    """

    def __init__(
        self,
        specs: Sequence[EmulatedSpec],
        *,
        groups: Mapping[str, EmulatedGroup] | None = None,
        time_scale: float = 1.0,
        seed: int = 0,
        recorded: Path | None = None,
    ) -> None:
        self._specs = tuple(specs)
        self._groups = dict(groups or {})
        self._time_scale = time_scale
        self._seed = seed
        self._recorded = recorded
        self._children: dict[str, _Child] = {}

    async def start(self) -> Sequence[Replica]:
        """Start the replicas of all specs at once; return when each answers its health check.

        Raises ReplicaError, with nothing left running, when one does not come up.
        """
        if self._children:
            raise ReplicaError("the emulated replicas are already running: stop them before starting again")
        try:
            async with asyncio.timeout(START_DEADLINE_S), aiohttp.ClientSession(timeout=REQUEST_TIMEOUT) as session:
                results = await asyncio.gather(*(self._spawn(s, session) for s in self._specs), return_exceptions=True)
            for result in results:
                if isinstance(result, BaseException):
                    raise result
        except TimeoutError as error:
            slow = [child.spec.replica_id for child in self._children.values() if not child.url]
            await self.stop()
            raise ReplicaError(
                f"emulated replicas {', '.join(slow)} were not up within {START_DEADLINE_S:.0f} s: lower the load here"
            ) from error
        except BaseException:
            await self.stop()
            raise
        return [self._replica(self._children[spec.replica_id]) for spec in self._specs]

    async def stop(self) -> None:
        """End all processes: asked first, killed after a while. Safe at any time, also after a partial start."""
        await asyncio.gather(*(self.retire(replica_id) for replica_id in list(self._children)))

    async def deploy(self, replica_id: str, group: ReplicaGroup) -> Replica:
        """Start one more process, and return once it has loaded and answers its health check.

        Raises ReplicaError, with nothing of it left running, when it does not come up or cannot be started here.
        """
        emulated = self._groups.get(group.group_id)
        if emulated is None:
            known = ", ".join(self._groups) or "none"
            raise ReplicaError(f"replica {replica_id}: group {group.group_id!r} is not emulated, only: {known}")
        if replica_id in self._children:
            raise ReplicaError(f"replica {replica_id} is running already: choose another id, or retire it first")
        spec = EmulatedSpec(
            replica_id=replica_id,
            model=group.model,
            kind=group.kind,
            device=group.device,
            profile=emulated.profile,
            size_class=emulated.size_class,
            engine_order=group.engine_order,
        )
        patience_s = START_DEADLINE_S + emulated.start_s / self._time_scale
        try:
            async with asyncio.timeout(patience_s), aiohttp.ClientSession(timeout=REQUEST_TIMEOUT) as session:
                await self._spawn(spec, session, loading(emulated))
        except TimeoutError as error:
            await self.retire(replica_id)
            raise ReplicaError(f"replica {replica_id} was not up within {patience_s:.0f} s") from error
        except BaseException:
            await self.retire(replica_id)
            raise
        return self._replica(self._children[replica_id])

    async def retire(self, replica_id: str) -> None:
        """End one process: asked first, killed after a while."""
        child = self._children.get(replica_id)
        if child is not None:
            child.url = ""
            await _end(child)
            self._children.pop(replica_id, None)

    async def reports(self) -> dict[str, Report]:
        """How late each running replica was for its engine, by replica id."""
        async with aiohttp.ClientSession(timeout=REQUEST_TIMEOUT) as session:

            async def one(child: _Child) -> tuple[str, Report]:
                async with session.get(f"{child.url}/emulator/report") as response:
                    return child.spec.replica_id, msgspec.json.decode(await response.read(), type=Report)

            return dict(await self._of_all(one))

    async def reset(self) -> None:
        """Clear caches, counters and lags of all running replicas. Raises ReplicaError when one is not idle."""
        async with aiohttp.ClientSession(timeout=REQUEST_TIMEOUT) as session:

            async def one(child: _Child) -> None:
                async with session.post(f"{child.url}/emulator/reset") as response:
                    if response.status != 200:
                        raise ReplicaError(f"replica {child.spec.replica_id}: {await response.text()}")

            await self._of_all(one)

    async def _of_all(self, one: Callable[[_Child], Awaitable[T]]) -> list[T]:
        try:
            return await asyncio.gather(*(one(child) for child in self._children.values() if child.url))
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ReplicaError(f"an emulated replica does not answer: {error or type(error).__name__}") from error

    async def _spawn(self, spec: EmulatedSpec, session: aiohttp.ClientSession, more: Sequence[str] = ()) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "swarmx.providers.emulated",
            *arguments(spec, time_scale=self._time_scale, seed=self._seed, recorded=self._recorded),
            *more,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        child = _Child(spec=spec, process=process)
        self._children[spec.replica_id] = child
        if process.stderr is not None:
            child.listener = asyncio.create_task(_listen(process.stderr, child.said))
        line = await process.stdout.readline() if process.stdout is not None else b""
        try:
            url = f"http://127.0.0.1:{msgspec.json.decode(line, type=_Listening).port}"
            async with session.get(f"{url}/health") as response:
                response.raise_for_status()
        except (msgspec.DecodeError, aiohttp.ClientError) as error:
            raise ReplicaError(await _obituary(child)) from error
        child.url = url

    def _replica(self, child: _Child) -> Replica:
        return Replica(
            replica_id=child.spec.replica_id,
            model=child.spec.model,
            kind=child.spec.kind,
            device=child.spec.device,
            url=child.url,
            profile=child.spec.profile.scaled(self._time_scale),
            provider="emulated",
            emulated=True,
            priorities="low_first" if child.spec.engine_order == "priority" else "ignored",
        )


def arguments(spec: EmulatedSpec, *, time_scale: float, seed: int, recorded: Path | None = None) -> list[str]:
    """The options of `python -m swarmx.providers.emulated` for one replica that ends with its parent."""
    options = {
        "--model": spec.model,
        "--device": spec.device,
        "--kind": spec.kind,
        "--time-scale": repr(time_scale),
        "--seed": str(seed),
        "--size-class": spec.size_class,
        "--engine-order": spec.engine_order,
        "--profile-json": msgspec.json.encode(spec.profile).decode(),
    }
    if recorded is not None:
        options["--recorded"] = str(recorded)
    return [*(part for option in options.items() for part in option), "--port", "0", "--exit-with-parent"]


def loading(group: EmulatedGroup) -> Sequence[str]:
    """The options of a process that loads before it listens, or never does."""
    return ["--start-s", repr(group.start_s), *(["--fault", group.fault] if group.fault else [])]


async def _listen(stderr: asyncio.StreamReader, said: deque[str]) -> None:
    """Keep the last lines, so that the pipe never fills up and errors can be quoted."""
    async for line in stderr:
        said.append(line.decode(errors="replace").rstrip())


async def _obituary(child: _Child) -> str:
    """Why a replica did not start, in its own words; ends its process.

    One that is about to end by itself is left to: a signal would take its exit status from us.
    """
    with suppress(TimeoutError):
        await asyncio.wait_for(child.process.wait(), _LAST_BREATH_S)
    await _end(child)
    said = " | ".join(child.said) or "it said nothing"
    return f"replica {child.spec.replica_id} did not start, exit status {child.process.returncode}: {said}"


async def _end(child: _Child) -> None:
    process = child.process
    if process.returncode is None:
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_PATIENCE_S)
        except TimeoutError:
            process.kill()
            await process.wait()
    if process.stdin is not None:
        process.stdin.close()
    if child.listener is not None:
        await child.listener
