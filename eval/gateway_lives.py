"""Many short lives of real gateways under load, over a ledger of effects; and what must be true after the last."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from eval.doomed_engine import TOOLS, Engine
from eval.doomed_gateway import Doom, points
from eval.doomed_users import Users
from eval.promises import Notes, Tally, check
from swarmx.gateway.keys import Keyring
from swarmx.runtime.clock import WallClock
from swarmx.state_config import StateSection
from swarmx.wiring.state import open_state

HOUR_S, MONTH_S = 3600.0, 30 * 86_400.0
_JUMPS = (HOUR_S, -HOUR_S, MONTH_S, -MONTH_S)
_SMALL_JUMPS = (HOUR_S, -HOUR_S)  # of gateways that share a database, which forget what others still wait for
_USERS = 8
_WRONG = 0.2  # of the lives have a wrong clock, and as many one that jumps
_PEACEFUL = 0.5  # of every fourth life is told to stop
_MOST_HITS = 150
_MOST_S = 1.5
_NAMED_S = 8.0  # by then a heartbeat has come
_LEASE_S = 1.0
_KEPT_S = 86_400.0  # how long the gateway keeps a key, and waits for the signal
_PATIENCE_S = 240.0
_TOKEN = "DOOMED_TOOLS_TOKEN"  # noqa: S105  # the name of a variable
_TRACEBACK = "Traceback (most recent call last)"


class Gateway:
    """One life after the other, each on the same port, with the same state in the folder `state`."""

    def __init__(self, folder: Path, state: Path, settings: str, mother: asyncio.subprocess.Process) -> None:
        self._place = _held_port()
        self.port: int = self._place.getsockname()[1]
        self.pid: int | None = None
        self.on_clock: Callable[[float], None] = lambda ahead_s: None
        self._folder = folder
        self._state = state
        self._mother = mother
        self._config = state.with_suffix(".toml")
        self._config.write_text(settings)
        self._clock_s = (0.0, 0.0)

    async def begin(self, **doom: Any) -> int:
        """Start the next life, of the fields of a `Doom`; returns its pid."""
        whole = Doom(
            config=str(self._config), state_dir=str(self._state), port=self.port, folder=str(self._folder), **doom
        )
        clock_s = (whole.clock_s, whole.clock_s + whole.jump_s)  # it reads the clock before the jump, or after it
        self.on_clock(max(clock_s) - min(self._clock_s))
        self._clock_s = clock_s
        assert self._mother.stdin is not None
        self._mother.stdin.write(msgspec.json.encode(whole) + b"\n")
        self.pid = await self._line()
        return self.pid

    async def end(self, *, after_s: float, by: signal.Signals = signal.SIGKILL) -> bool:
        """Wait for the life to end by itself, and end it after so long; False: it ended with an error of its own."""
        assert self.pid is not None
        dying = asyncio.ensure_future(self._line())
        await asyncio.wait([dying], timeout=after_s)
        if not dying.done():
            with suppress(ProcessLookupError):  # it has just ended, and its line is on its way
                os.kill(self.pid, by)
        status = await dying
        self.pid = None
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, by)
        with (self._folder / "lives").open("a") as file:
            file.write("killed\n" if killed else f"ended {status}\n")
        return killed or status == 0

    async def stand_still(self, *, after_s: float, for_s: float) -> None:
        """Stop all work of the life for a while, whatever it was about to do."""
        assert self.pid is not None
        await asyncio.sleep(after_s)
        with suppress(ProcessLookupError):  # it has ended, and `end` tells
            os.kill(self.pid, signal.SIGSTOP)
            await asyncio.sleep(for_s)
            os.kill(self.pid, signal.SIGCONT)

    async def live(self, count: int, rng: np.random.Generator, *, shared: bool) -> None:
        """So many lives: they end at each failpoint in turn, at any, at any moment, and now and then in peace.

        One whose database is `shared` may stand still, too, until others have taken over what it runs. Raises
        RuntimeError for one that ended in another way.
        """
        named, jumps = points(), _SMALL_JUMPS if shared else _JUMPS
        for number in range(count):
            hits, point, by, after_s = None, None, signal.SIGKILL, float(rng.uniform(0.0, _MOST_S))
            match number % 4:
                case 0:
                    hits, point = int(rng.integers(1, 4)), named[number // 4 % len(named)]
                    after_s = _NAMED_S if point == "owner.heartbeat" else 2 * _MOST_S
                case 1:
                    hits, after_s = int(rng.integers(1, _MOST_HITS)), 2 * _MOST_S
                case 3 if rng.random() < _PEACEFUL:
                    by = signal.SIGTERM
            await self.begin(hits=hits, point=point, **_wrong_clock(rng, jumps))
            if shared and number % 4 == 2:
                await self.stand_still(after_s=2 * after_s, for_s=float(rng.uniform(0.5, 2.5)) * _LEASE_S)
            if not await self.end(after_s=after_s, by=by):
                raise RuntimeError(
                    f"life {number} ended by itself: {(self._folder / 'server.log').read_text()[-2000:]}"
                )

    def close(self) -> None:
        """Give its port back."""
        self._place.close()

    async def _line(self) -> int:
        assert self._mother.stdout is not None
        return int(await self._mother.stdout.readline())


class World:
    """Gateways over one database, none of them begun yet, and users all the time."""

    def __init__(self, folder: Path, gateways: Sequence[Gateway], state: StateSection, token: str, seed: int) -> None:
        self.gateways = gateways
        self._folder = folder
        self._state = state
        self.users = Users(
            urls=[f"http://127.0.0.1:{gateway.port}" for gateway in gateways],
            token=token,
            notes=Notes(folder),
            rng=np.random.default_rng([seed, 2]),
        )
        for gateway in gateways:
            gateway.on_clock = self._clock_set
        self._using = asyncio.ensure_future(self.users.run(_USERS))

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until it is so. Raises TimeoutError, with what the gateways said last."""
        try:
            async with asyncio.timeout(_PATIENCE_S):
                while not holds():  # noqa: ASYNC110  # what it is about is in files
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise TimeoutError(f"not so after {_PATIENCE_S} s; the log ends with: {self.log[-2000:]}") from None

    @property
    def accepted(self) -> int:
        """How many workflows the users know to be accepted."""
        return len(Notes(self._folder).acknowledged)

    @property
    def log(self) -> str:
        """What all gateways have said."""
        path = self._folder / "server.log"
        return path.read_text() if path.exists() else ""

    async def finish(self) -> Tally:
        """Stop once the users have seen all that they began end, by gateways that run; then read the books."""
        self.users.stopping = True
        await asyncio.wait([self._using], timeout=_PATIENCE_S)
        if self._using.done():
            self._using.result()
        else:
            for doing in self.users.doing.values():
                self.users.notes.note("wrong", doing, "has not come to its end")
        for gateway in self.gateways:
            await gateway.end(after_s=0.0, by=signal.SIGTERM)
        async with AsyncExitStack() as stack:
            opened = await open_state(self._state, stack, clock=WallClock().now_s)
            tally = await check(self._folder, opened.store, tenant="default", same_clock=False)
        before, found, defect = self.log.partition(_TRACEBACK)
        if not found:
            return tally
        told = f"a traceback is in the log: ...{before[-500:]}{found}{defect[:5000]}"
        return replace(tally, broken=[*tally.broken, told])

    async def close(self) -> None:
        """End the users, and give back the ports."""
        self._using.cancel()
        await asyncio.gather(self._using, return_exceptions=True)
        for gateway in self.gateways:
            gateway.close()

    def _clock_set(self, ahead_s: float) -> None:
        self.users.leaps += ahead_s > _KEPT_S


@asynccontextmanager
async def world(folder: Path, seed: int, *, postgres: str = "", state: Path | None = None) -> AsyncIterator[World]:
    """One gateway with a database in the folder `state`, or two that share an empty one in PostgreSQL."""
    first = folder / "state" if state is None else state
    first.mkdir(mode=0o700, exist_ok=True)
    token = Keyring(first / "keys.json").add("users", "admin", "default")
    states = [first]
    if postgres:
        states.append(shutil.copytree(first, folder / "second"))
    engine = Engine(folder, np.random.default_rng([seed, 1]))
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(engine.serving())
        settings = _settings(engine.url, postgres)
        mothers = [await stack.enter_async_context(_mother()) for _ in states]
        gateways = [Gateway(folder, place, settings, mother) for place, mother in zip(states, mothers, strict=True)]
        all_of_it = World(folder, gateways, StateSection(dir=first, database=postgres), token, seed)
        stack.push_async_callback(all_of_it.close)
        yield all_of_it


async def live(folder: Path, count: int, seed: int, *, postgres: str = "") -> Tally:
    """Have so many lives end, of one gateway or of two at a time, and hold what they left against what was promised."""
    async with world(folder, seed, postgres=postgres) as around:
        several = around.gateways
        lives = [len(range(number, count, len(several))) for number in range(len(several))]
        rngs = [np.random.default_rng([seed, 3, number]) for number in range(len(several))]
        each = zip(several, lives, rngs, strict=True)
        await asyncio.gather(*(gateway.live(n, rng, shared=bool(postgres)) for gateway, n, rng in each))
        for gateway in several:
            await gateway.begin()
        return await around.finish()


@asynccontextmanager
async def _mother() -> AsyncIterator[asyncio.subprocess.Process]:
    """What gateways are forked from; they end with it."""
    mother = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "eval.doomed_gateway"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, _TOKEN: "of the tools"},
    )
    try:
        yield mother
    finally:
        mother.kill()
        await mother.wait()


def _wrong_clock(rng: np.random.Generator, jumps: Sequence[float]) -> Mapping[str, float]:
    clock_s = float(rng.choice(jumps)) if rng.random() < _WRONG else 0.0
    jump_s = float(rng.choice(jumps)) if rng.random() < _WRONG else 0.0
    return {"clock_s": clock_s, "jump_s": jump_s, "jump_after_s": float(rng.uniform(0.3, 1.0))}


def _settings(engine_url: str, postgres: str) -> str:
    kinds = {"a": ("m", "llm"), "b": ("m", "llm"), "c": ("p", "image")}
    replicas = (
        f'[[replicas]]\nid = "{name}"\nmodel = "{model}"\nkind = "{kind}"\nurl = "{engine_url}"\n'
        for name, (model, kind) in kinds.items()
    )
    tools = f'[[tools]]\nid = "shop-1"\nurl = "{engine_url}"\npool = "{TOOLS.pool}"\nslots = {TOOLS.slots}\n'
    tools += f'token_variable = "{_TOKEN}"\n'
    rest = '[coordinator]\nengine = "off"\n[server]\ndrain_s = 60\n[watch]\nevery_s = 0.2\n'
    if postgres:
        rest += f"[state]\ndatabase = {json.dumps(postgres)}\nlease_s = {_LEASE_S}\n"
    return "\n".join([*replicas, tools, rest])


def _held_port() -> socket.socket:
    """A port that no other process is given between two lives: it is bound here, and listened to there."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held
