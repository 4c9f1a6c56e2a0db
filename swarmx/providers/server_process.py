"""A server that runs as a process of this host: started, watched until it answers, ended with all its children."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import aiohttp

from swarmx.core.errors import ReplicaError

# Where util-linux is, the kernel ends the server even when its parent is killed before it can.
_DIES_WITH_PARENT = ("setpriv", "--pdeathsig", "TERM") if shutil.which("setpriv") else ()


class ServerProcess:
    """One process in a group of its own; it ends when this one does. Each start writes `log` anew.

    `what` is its name in errors, such as "vLLM m".
    """

    def __init__(self, *, what: str, log: Path) -> None:
        self._what = what
        self._log = log
        self._process: asyncio.subprocess.Process | None = None
        self._ended: asyncio.Task[int] | None = None

    async def start(
        self,
        command: Sequence[str],
        *,
        health: str,
        start_s: float,
        stop_s: float,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        """Returns once the URL `health` answers 200, after `start_s` at most; `env` is added to that of this process.

        Raises ReplicaError with the log's end when it does not. Then, and when cancelled, nothing of it is left.
        """
        if self._process is not None and self._process.returncode is None:
            raise ReplicaError(f"{self._what} is running already: stop it before starting it again.")
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *_DIES_WITH_PARENT,
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                cwd=cwd,
                start_new_session=True,
            )
        self._ended = asyncio.create_task(_ended(self._process), name=self._what)
        try:
            await self._healthy(self._process, health, start_s)
        except BaseException:
            await self.stop(stop_s)
            raise

    async def wait(self) -> int:
        """Returns the exit status once the server that was started has ended, by itself or by `stop`."""
        if self._ended is None:
            raise ReplicaError(f"{self._what} was never started: there is no end to wait for.")
        return await asyncio.shield(self._ended)

    async def stop(self, patience_s: float) -> None:
        """Ask it to end, and kill it after a while. Safe at any time."""
        if self._process is None:
            return
        if self._process.returncode is None:
            _signal_group(self._process, signal.SIGTERM)
        try:
            await asyncio.wait_for(self.wait(), patience_s)
        except TimeoutError:
            _signal_group(self._process, signal.SIGKILL)
            await self.wait()

    def last_words(self) -> str:
        """The end of its log."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])

    async def _healthy(self, process: asyncio.subprocess.Process, url: str, patience_s: float) -> None:
        deadline_s = asyncio.get_running_loop().time() + patience_s
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2.0)) as session:
            while asyncio.get_running_loop().time() < deadline_s:
                if process.returncode is not None:
                    said = self.last_words()
                    raise ReplicaError(f"{self._what} ended with {process.returncode}; its log ends:\n{said}")
                try:
                    async with session.get(url) as response:
                        if response.status == 200:
                            return
                except (aiohttp.ClientError, TimeoutError):
                    pass
                await asyncio.sleep(0.5)
        raise ReplicaError(f"{self._what} was not healthy after {patience_s:g} s; its log ends:\n{self.last_words()}")


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def _ended(process: asyncio.subprocess.Process) -> int:
    """Wait for the server, and end its workers, which may outlive it."""
    status = await process.wait()
    _signal_group(process, signal.SIGKILL)
    return status


def _signal_group(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    """To the whole process group: a server's workers are its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
