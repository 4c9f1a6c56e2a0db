"""Replicas on a Ray cluster, as the gateway has them: each by its name, wherever Ray put it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

import msgspec

from swarmx.core.errors import ReplicaError
from swarmx.core.messages import DrainNoticed, Message, SignalReported
from swarmx.core.nouns import Replica, ReplicaGroup
from swarmx.providers.ray.wire import (
    Answer,
    Connected,
    Curve,
    Deploy,
    Ended,
    Engine,
    Failed,
    Find,
    Found,
    Load,
    Lost,
    Noticed,
    Place,
    Request,
    Retire,
    Standing,
    Up,
    Wanted,
)
from swarmx.runtime.clock import Clock

log = logging.getLogger(__name__)

_CONNECT_S = 90.0
_PATIENCE_S = 30.0  # beyond what a start may take
_RETIRE_S = 90.0
_AGAIN_S, _AGAIN_MOST_S = 1.0, 30.0
_LINES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class RayGroup:
    """What each replica of a group runs, and what it takes of a node."""

    engine: Engine
    place: Place


class RayProvider:
    """An ElasticProvider whose replicas are named, detached actors: they outlive the gateway that placed them.

    `start` returns those that an earlier life left and that are still what `groups` (by id) say; others it ends. `stop`
    ends all replicas, unless they are `kept`. What is heard of them goes to `post` as messages; a loss goes to
    `on_lost`. When the link to Ray is lost, replicas go on, and it is made anew.
    """

    def __init__(
        self,
        *,
        address: str,
        namespace: str,
        groups: Mapping[str, RayGroup],
        clock: Clock,
        post: Callable[[Message], None],
        on_lost: Callable[[str], None],
        kept: bool = False,
        orphan_s: float = 900.0,
    ) -> None:
        self._command = (sys.executable, "-m", "swarmx.providers.ray", "--address", address, "--namespace", namespace)
        self._address = address
        self._groups = dict(groups)
        self._clock = clock
        self._post = post
        self._on_lost = on_lost
        self._kept = kept
        self._orphan_s = orphan_s
        self._standing: dict[str, Standing] = {}
        self._starting: set[str] = set()
        self._line = _Line(self._command, hear=self._hear, on_end=self._line_ended)
        self._again: asyncio.Task[None] | None = None
        self._stopped = False

    def token_of(self, replica_id: str) -> str | None:
        """What the replica wants to be shown; None for one that is not of here."""
        standing = self._standing.get(replica_id)
        return None if standing is None else standing.wanted.token

    def group_of(self, replica_id: str) -> str:
        """The group of a replica that is up. Raises KeyError."""
        return self._standing[replica_id].wanted.group_id

    async def start(self) -> Sequence[Replica]:
        """Connect, and take over what is there. Raises ReplicaError when Ray cannot be reached."""
        await self._line.open()
        found = await self._find()
        sound = [standing for standing in found if self._is_as_wanted(standing.wanted)]
        for standing in found:
            if standing not in sound:
                log.info("replica %s was started by other settings, and is ended", standing.wanted.replica.replica_id)
                await self._end(standing.wanted.replica.replica_id)
        for standing in sound:
            self._standing[standing.wanted.replica.replica_id] = standing
        return [_replica(standing) for standing in sound]

    async def stop(self) -> None:
        """End all replicas, unless they are to be kept, and the link. Safe at any time."""
        self._stopped = True
        if self._again is not None:
            self._again.cancel()
        if not self._kept:
            ids = [*self._standing, *self._starting]
            for problem in await asyncio.gather(*(self.retire(one) for one in ids), return_exceptions=True):
                if isinstance(problem, Exception):
                    log.warning("%s; it ends by itself after %g s", problem, self._orphan_s)
        await self._line.close()

    async def deploy(self, replica_id: str, group: ReplicaGroup) -> Replica:
        """Have one more placed. Raises ReplicaError, with nothing of it left running."""
        asked = self._groups.get(group.group_id)
        if asked is None:
            known = ", ".join(self._groups) or "none"
            raise ReplicaError(f"replica {replica_id}: group {group.group_id!r} has no place on Ray, only: {known}")
        if replica_id in self._standing or replica_id in self._starting:
            raise ReplicaError(f"replica {replica_id} is running already: choose another id, or retire it first")
        if not self._line.is_open:
            await self._line.open()
        wanted = Wanted(
            replica=group.replica(replica_id),
            group_id=group.group_id,
            engine=asked.engine,
            place=asked.place,
            token=secrets.token_urlsafe(32),
            orphan_s=self._orphan_s,
        )
        self._starting.add(replica_id)
        try:
            answer = await self._line.ask(
                lambda number: Deploy(number=number, wanted=wanted), patience_s=asked.engine.start_s + _PATIENCE_S
            )
            if not isinstance(answer, Up):
                raise ReplicaError(f"replica {replica_id}: the link to Ray answered {type(answer).__name__}")
            self._standing[replica_id] = answer.standing
            return _replica(answer.standing)
        except asyncio.CancelledError:
            await asyncio.shield(self._end(replica_id))
            raise
        finally:
            self._starting.discard(replica_id)

    async def retire(self, replica_id: str) -> None:
        """End one of them, wherever it is. Raises ReplicaError when Ray cannot be asked; it is known still."""
        if replica_id in self._standing or replica_id in self._starting:
            await self._end(replica_id)
            self._standing.pop(replica_id, None)

    async def _end(self, replica_id: str) -> None:
        if not self._line.is_open:
            await self._line.open()
        await self._line.ask(lambda number: Retire(number=number, replica_id=replica_id), patience_s=_RETIRE_S)

    async def _find(self) -> list[Standing]:
        answer = await self._line.ask(lambda number: Find(number=number), patience_s=_RETIRE_S)
        return answer.standing if isinstance(answer, Found) else []

    def _is_as_wanted(self, wanted: Wanted) -> bool:
        asked = self._groups.get(wanted.group_id)
        return asked is not None and (asked.engine, asked.place) == (wanted.engine, wanted.place)

    def _hear(self, told: Answer) -> None:
        """What the link says unasked."""
        now_s = self._clock.now_s()
        match told:
            case Lost():
                self._lost(told.replica_id, told.problem)
            case Noticed() if told.replica_id in self._standing:
                deadline_at_s = None if told.left_s is None else now_s + told.left_s
                self._post(DrainNoticed(replica_id=told.replica_id, deadline_at_s=deadline_at_s))
            case Load() if told.replica_id in self._standing:  # as of its arrival: clocks of machines differ
                self._post(
                    SignalReported(
                        replica_id=told.replica_id,
                        running=told.running,
                        waiting=told.waiting,
                        kv_usage=told.kv_usage,
                        measured_at_s=now_s,
                    )
                )
            case Curve() if told.curve.replica_id in self._standing:
                self._post(msgspec.structs.replace(told.curve, measured_at_s=now_s))
            case _:
                pass

    def _lost(self, replica_id: str, problem: str) -> None:
        if self._standing.get(replica_id) is not None:
            log.warning("replica %s is lost: %s", replica_id, problem)
            self._on_lost(replica_id)

    def _line_ended(self, why: str) -> None:
        if self._stopped:
            return
        log.warning("the link to Ray at %s is lost, replicas go on: %s", self._address, why)
        if self._again is None or self._again.done():
            self._again = asyncio.create_task(self._reconnect(), name="link to Ray")

    async def _reconnect(self) -> None:
        wait_s = _AGAIN_S
        while True:
            await asyncio.sleep(wait_s)
            wait_s = min(2.0 * wait_s, _AGAIN_MOST_S)
            with contextlib.suppress(ReplicaError):
                if not self._line.is_open:
                    await self._line.open()
                there = {standing.wanted.replica.replica_id for standing in await self._find()}
                for replica_id in self._standing.keys() - there:
                    self._lost(replica_id, "it was gone when the link to Ray was there again")
                for replica_id in there - self._standing.keys() - self._starting:
                    await self._end(replica_id)  # its start came to an end when nobody could be told
                log.info("the link to Ray at %s is there again", self._address)
                return


class _Line:
    """The process that is connected to Ray, while there is one, and who waits for its answers."""

    def __init__(
        self, command: Sequence[str], *, hear: Callable[[Answer], None], on_end: Callable[[str], None]
    ) -> None:
        self._command = command
        self._hear = hear
        self._on_end = on_end
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._listening: asyncio.Task[None] | None = None
        self._said: list[str] = []
        self._number = 0
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._opening = asyncio.Lock()

    @property
    def is_open(self) -> bool:
        return self._process is not None and self._reading is not None and not self._reading.done()

    async def open(self) -> None:
        """Start it, and wait until it has reached the cluster. Raises ReplicaError."""
        async with self._opening:
            if self.is_open:
                return
            self._said.clear()
            self._process = process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                limit=1 << 24,
                start_new_session=True,  # Ctrl-C is for the gateway, which still needs it to end replicas
            )
            self._listening = asyncio.create_task(self._listen(process), name="what the link to Ray says")
            try:
                async with asyncio.timeout(_CONNECT_S):
                    line = await self._out(process).readline()
            except TimeoutError:
                line = b""
            except BaseException:
                await self.close()
                raise
            if not line or not isinstance(msgspec.json.decode(line, type=Answer), Connected):
                await self.close()  # and hear the rest of what it says
                raise ReplicaError(f"there is no link to Ray: {self._last_words()}")
            self._reading = asyncio.create_task(self._read(process), name="answers of the link to Ray")

    async def close(self) -> None:
        """It ends when its standard input does. Twice is fine."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), 10.0)
        except TimeoutError:
            process.kill()
            await process.wait()
        for task in (self._reading, self._listening):
            if task is not None:
                await asyncio.wait((task,))

    async def ask(self, request: Callable[[int], Request], *, patience_s: float) -> Answer:
        """Raises ReplicaError for a Failed, for an answer that does not come, and when the line is lost meanwhile."""
        if not self.is_open or self._process is None or self._process.stdin is None:
            raise ReplicaError("there is no link to Ray now; it is being made anew")
        self._number = number = self._number + 1
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            self._process.stdin.write(msgspec.json.encode(request(number)) + b"\n")
            async with asyncio.timeout(patience_s):
                answer = await future
        except TimeoutError:
            raise ReplicaError(f"the link to Ray did not answer within {patience_s:.0f} s") from None
        finally:
            del self._waiting[number]
        if isinstance(answer, Failed):
            raise ReplicaError(answer.problem)
        return answer

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        try:
            async for line in self._out(process):
                self._take(msgspec.json.decode(line, type=Answer))
        finally:
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(ReplicaError(f"the link to Ray is lost: {self._last_words()}"))
            if self._process is process:
                self._process = None
                self._on_end(self._last_words())

    def _take(self, told: Answer) -> None:
        match told:
            case Up() | Ended() | Found() | Failed():
                future = self._waiting.get(told.number)
                if future is not None and not future.done():
                    future.set_result(told)
            case Lost() | Noticed() | Load() | Curve() | Connected():
                self._hear(told)
            case _:
                assert_never(told)

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None  # noqa: S101  # it is a pipe
        async for line in process.stderr:
            self._said.append(line.decode(errors="replace").rstrip())
            del self._said[:-_LINES]

    def _out(self, process: asyncio.subprocess.Process) -> asyncio.StreamReader:
        assert process.stdout is not None  # noqa: S101  # it is a pipe
        return process.stdout

    def _last_words(self) -> str:
        return " | ".join(self._said) or "it said nothing"


def _replica(standing: Standing) -> Replica:
    return msgspec.structs.replace(standing.wanted.replica, url=standing.url)
