"""The server of a replica as a child process on its node: started, waited for, and ended with all that it started."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
from collections import deque

import aiohttp
import msgspec

from swarmx.core.errors import ReplicaError
from swarmx.providers.ray.wire import Engine

_STOP_PATIENCE_S = 10.0
_LAST_BREATH_S = 5.0
_LINES = 20
_LOOK_S = 0.1
_PYTHON, _PORT = "{python}", "{port}"
# Where util-linux is, the kernel ends the server even when the actor is killed before it can.
_DIES_WITH_PARENT = ("setpriv", "--pdeathsig", "TERM") if shutil.which("setpriv") else ()


class _Listening(msgspec.Struct):
    port: int


class EngineProcess:
    """One engine; its standard input stays open for as long as this process lives."""

    def __init__(self, engine: Engine, *, token: str) -> None:
        self._engine = engine
        self._token = token
        self._process: asyncio.subprocess.Process | None = None
        self._said: deque[str] = deque(maxlen=_LINES)
        self._listeners: list[asyncio.Task[None]] = []

    async def start(self) -> str:
        """Returns its URL once it answers its health check. Raises ReplicaError, with nothing of it left running."""
        try:
            async with asyncio.timeout(self._engine.start_s):
                return await self._start()
        except TimeoutError:
            await self.stop()
            raise ReplicaError(f"it was not up within {self._engine.start_s:.0f} s: {self.last_words()}") from None
        except OSError as error:
            await self.stop()
            raise ReplicaError(f"it cannot be started: {error}") from None
        except BaseException:
            await self.stop()
            raise

    async def wait(self) -> int:
        """The exit status, once it has ended; its workers may outlive it, and are ended here."""
        if self._process is None:
            raise ReplicaError("the engine was never started: there is no end to wait for")
        status = await self._process.wait()
        self._signal(signal.SIGKILL)
        return status

    async def stop(self) -> None:
        """Ask it to end, and kill it after a while. Safe at any time."""
        if self._process is None:
            return
        if self._process.returncode is None:
            self._signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self._process.wait(), _STOP_PATIENCE_S)
            except TimeoutError:
                self._signal(signal.SIGKILL)
        await self.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        for listener in self._listeners:
            listener.cancel()

    def last_words(self) -> str:
        """What it said last."""
        return " | ".join(self._said) or "it said nothing"

    async def _start(self) -> str:
        port = _free_port()
        asked = self._engine.argv
        argv = [part.replace(_PYTHON, sys.executable).replace(_PORT, str(port)) for part in asked]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}  # its token, too
        env = {**inherited, **self._engine.env}
        if self._engine.token_variable:
            env[self._engine.token_variable] = self._token
        self._process = process = await asyncio.create_subprocess_exec(
            *_DIES_WITH_PARENT,
            *argv,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=env,
            start_new_session=True,
        )
        assert process.stdout is not None and process.stderr is not None  # noqa: S101, PT018  # both are pipes
        self._listeners.append(asyncio.create_task(self._listen(process.stderr)))
        if not any(_PORT in part for part in asked):
            line = await process.stdout.readline()
            try:
                port = msgspec.json.decode(line, type=_Listening).port
            except msgspec.MsgspecError:
                raise ReplicaError(await self._obituary()) from None
        self._listeners.append(asyncio.create_task(self._listen(process.stdout)))
        url = f"http://127.0.0.1:{port}"
        await self._healthy(process, url)
        return url

    async def _healthy(self, process: asyncio.subprocess.Process, url: str) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2.0)) as session:
            while True:
                if process.returncode is not None:
                    raise ReplicaError(await self._obituary())
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                    async with session.get(f"{url}/health") as response:
                        if response.status == 200:
                            return
                await asyncio.sleep(_LOOK_S)

    async def _listen(self, stream: asyncio.StreamReader) -> None:
        """Keep the last lines, and hand all of them to the log that Ray keeps of this actor."""
        async for line in stream:
            text = line.decode(errors="replace").rstrip()
            self._said.append(text)
            sys.stderr.write(text + "\n")

    async def _obituary(self) -> str:
        """Why it did not start, in its own words. One that is about to end is left to: a signal would change how."""
        assert self._process is not None  # noqa: S101  # it was started
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), _LAST_BREATH_S)
        await asyncio.wait(self._listeners, timeout=_LAST_BREATH_S)
        return f"it did not start, exit status {self._process.returncode}: {self.last_words()}"

    def _signal(self, number: signal.Signals) -> None:
        """To its whole group: an engine may have workers."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
