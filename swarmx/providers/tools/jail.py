"""Runs programs in bubblewrap: no network, a root of their own, limits, and an end that nothing in it survives."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Coroutine
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from swarmx.core.errors import ConfigError
from swarmx.providers.tools import cgroups, seccomp
from swarmx.providers.tools.pipes import read_some, readable
from swarmx.providers.tools.profile import HOSTNAME, OWN_PROCESSES, STDIN, Limits, Program, command, found

_PROBE_S = 20.0
_START_S = 10.0
_FIRST_UID = 60_000
_LAST_UID = 64_000
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a program ended: its exit status (128 and the signal's number, if one ended it).

    `cpu_s` is what all its processes computed, 0 where there are no control groups to count it.
    """

    status: int
    cpu_s: float


class Inmate:
    """A program that runs; `stdout` and `stderr` are pipes to read (`pipes.read_some`), `stdin` is one to write."""

    def __init__(self, process: subprocess.Popen[bytes], *, info: int, group: cgroups.ControlGroup | None) -> None:
        self._pipes = [pipe for pipe in (process.stdin, process.stdout, process.stderr) if pipe is not None]
        self.stdin, self.stdout, self.stderr = (pipe.fileno() for pipe in self._pipes)
        self._process = process
        self._group = group
        self._outer = os.pidfd_open(process.pid)
        self._inner: int | None = None
        self._settled = asyncio.create_task(self._settle(info), name="settling of a sandbox")
        self._over = asyncio.create_task(self._watch(), name="end of a sandbox")
        for pipe in (self.stdin, self.stdout, self.stderr):
            os.set_blocking(pipe, False)

    async def pass_gate(self) -> None:
        """Let the program begin, if it still is there, now that it cannot outlive this process; see `profile.gate`."""
        if await read_some(self.stdout):
            with contextlib.suppress(BrokenPipeError):
                os.write(self.stdin, b"go\n")

    async def wait(self) -> Ended:
        """Returns once nothing of it is left."""
        return await asyncio.shield(self._over)

    async def end(self) -> None:
        """Kill all of it, and return once nothing is left. Not to be cancelled: see `Jail.running`."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._settled), _START_S)
        if self._inner is not None:
            # The init of its pid namespace: the kernel ends every other process in it before init counts as ended,
            # whatever sessions and groups they moved to.
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._inner, signal.SIGKILL)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.wait(), _START_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self.wait()
        self._release()

    async def _settle(self, info: int) -> None:
        """Learn the pid of the init, which bubblewrap tells once it has made the namespaces."""
        said = b""
        try:
            while chunk := await read_some(info):
                said += chunk
        finally:
            os.close(info)
        with contextlib.suppress(msgspec.DecodeError, ProcessLookupError):
            self._inner = os.pidfd_open(msgspec.json.decode(said, type=_Info).child_pid)

    async def _watch(self) -> Ended:
        await readable(self._outer)
        code = self._process.wait()
        await self._settled
        if self._inner is not None:  # bubblewrap itself may have been killed before its child
            await readable(self._inner)
        cpu_s = 0.0 if self._group is None else self._group.cpu_s()
        return Ended(status=code if code >= 0 else 128 - code, cpu_s=cpu_s)

    def _release(self) -> None:
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        for descriptor in (self._outer, self._inner):
            if descriptor is not None:
                os.close(descriptor)


class _Info(msgspec.Struct, rename="kebab"):
    child_pid: int


class Jail:
    """Runs up to `slots` programs at a time, each as a user of its own where this process is root.

    Nothing ever runs outside of bubblewrap: where it is missing, or may not make its namespaces, `open` raises
    ConfigError with the reason. Programs are started from one thread: they end with it.
    """

    def __init__(self, *, slots: int, bwrap: str = "bwrap") -> None:
        self._bwrap = bwrap
        self._slots = slots
        self._users: asyncio.Queue[int | None] = asyncio.Queue()
        self._parents: list[Path] = []
        self._claim: socket.socket | None = None

    @property
    def grouped(self) -> bool:
        """Whether control groups bound all processes of a program together."""
        return bool(self._parents)

    async def open(self) -> None:
        """Run a program under the profile, to know that it holds. Raises ConfigError."""
        self._bwrap = found(self._bwrap)
        self._users = asyncio.Queue()
        first: int | None = None
        if os.geteuid() == 0:
            self._claim, first = _claim_users(self._slots)
        for slot in range(self._slots):
            self._users.put_nowait(None if first is None else first + slot)
        self._parents = cgroups.parents()
        cgroups.sweep(self._parents)
        _sweep_unborn()
        try:
            await self._probe()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Give back the users. Programs are ended by who runs them."""
        if self._claim is not None:
            self._claim.close()
            self._claim = None

    @asynccontextmanager
    async def running(self, program: Program) -> AsyncIterator[Inmate]:
        """The program, started; when the block is left, by cancelling too, nothing of it is left."""
        user = await self._users.get()
        try:
            group = self._group(program.limits, user)
            try:
                inmate = self._start(program, user, group)
                try:
                    await inmate.pass_gate()
                    yield inmate
                finally:
                    await _whatever_happens(inmate.end())
            finally:
                if group is not None:
                    group.remove()
        finally:
            self._users.put_nowait(user)

    async def _probe(self) -> None:
        said = b""
        try:
            async with asyncio.timeout(_PROBE_S), self.running(Program(argv=["/bin/true"], limits=Limits())) as inmate:
                while chunk := await read_some(inmate.stderr):
                    said += chunk
                ended = await inmate.wait()
        except (TimeoutError, OSError) as error:
            raise ConfigError(
                f"programs are not run here, a sandbox cannot be started: {error or 'it hangs'}"
            ) from None
        if ended.status != 0:
            reason = said.decode(errors="replace").strip() or f"it ended with {ended.status}"
            raise ConfigError(
                f"programs are not run here, the sandbox cannot be made: {reason[:500]}. It needs bubblewrap 0.8 or "
                "newer, and user namespaces (in a container: a seccomp profile that allows them)"
            )

    def _group(self, limits: Limits, user: int | None) -> cgroups.ControlGroup | None:
        if not self._parents:
            return None
        name = f"{os.getpid()}-{user if user is not None else os.urandom(4).hex()}"
        return cgroups.ControlGroup(
            self._parents, name, memory_bytes=limits.memory_bytes, processes=limits.processes + OWN_PROCESSES
        )

    def _start(self, program: Program, user: int | None, group: cgroups.ControlGroup | None) -> Inmate:
        with ExitStack() as mine:
            info, told = os.pipe()
            mine.callback(os.close, told)
            passed = [told]
            inside = ["--info-fd", str(told)]
            refused = seccomp.program()
            if refused:
                filters = _sealed(refused)
                mine.callback(os.close, filters)
                passed.append(filters)
                inside += ["--seccomp", str(filters)]
            files = dict(program.files)
            if program.stdin is not None:
                files[STDIN] = program.stdin
            for name, content in files.items():
                file = _sealed(content)
                mine.callback(os.close, file)
                passed.append(file)
                inside += ["--perms", "0444", "--ro-bind-data", str(file), name]
            try:
                process = subprocess.Popen(  # noqa: S603  # the one place that starts a tool's program
                    command(
                        program,
                        bwrap=self._bwrap,
                        laid=inside,
                        user=user,
                        groups=[] if group is None else group.join,
                    ),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    pass_fds=passed,
                    env={},  # bubblewrap's own shows as /proc/1/environ inside
                    cwd="/",
                    start_new_session=True,
                )
            except BaseException:
                os.close(info)
                raise
            os.set_blocking(info, False)
            return Inmate(process, info=info, group=group)


def _sweep_unborn() -> None:
    """End what a killed replica left: a sandbox whose maker died before it was made waits for a word that never comes.

    Nothing runs in it, and its parent is the init of this host.
    """
    for entry in Path("/proc").iterdir():
        if os.getpid() != 1 and entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile, or belongs to somebody else
                argv = (entry / "cmdline").read_bytes().split(b"\0")
                parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[1]
                if parent == "1" and argv[0].endswith(b"bwrap") and HOSTNAME.encode() in argv:
                    os.kill(int(entry.name), signal.SIGKILL)


def _sealed(content: bytes) -> int:
    """A file in memory that nobody can change, at its beginning."""
    file = os.memfd_create("sandbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with os.fdopen(os.dup(file), "wb") as writer:
            writer.write(content)
        os.lseek(file, 0, os.SEEK_SET)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(file)
        raise
    return file


def _claim_users(count: int) -> tuple[socket.socket, int]:
    """The first of users that no other jail on this host has, and the socket that claims them.

    The processes of a user are counted together, whose sandbox they are in.
    """
    for first in range(_FIRST_UID, _LAST_UID, 100):
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0swarmx-sandbox-users-{first}")
        except OSError:
            claim.close()
            continue
        if count <= 100:
            return claim, first
        claim.close()
        break
    raise ConfigError(f"there are no {count} spare users for sandboxes: run at most 100 at a time, in 40 processes")


async def _whatever_happens(ending: Coroutine[Any, Any, None]) -> None:
    """Finish even when cancelled meanwhile, and say so afterwards."""
    task = asyncio.create_task(ending)
    cancelled = False
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            cancelled = True
    await task
    if cancelled:
        raise asyncio.CancelledError
