"""Replicas of tools: processes on this host that end with this one, and servers that somebody else runs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import msgspec

from swarmx.core.engine import EngineProfile
from swarmx.core.errors import ConfigError, ReplicaError
from swarmx.core.nouns import Replica, ReplicaGroup
from swarmx.providers.tools.settings import ToolSettings, load

DEVICE = "cpu"
TOKEN_VARIABLE = "SWARMX_TOOLS_TOKEN"  # noqa: S105  # the name of the variable that holds it
_COST_WEIGHT = 0.05  # of an L40S: some cores for a while
_START_S = 60.0
_STOP_PATIENCE_S = 15.0
_LAST_BREATH_S = 5.0
_LOG_LINES = 15
# What a Python process needs to run and to reach the web; whatever else this one has is not for tools.
_INHERITED = (
    *("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolPool:
    """What each replica of a pool runs, its `file` read as `settings`; `count` of them are there from the start."""

    file: Path
    settings: ToolSettings
    count: int = 0

    @property
    def name(self) -> str:
        return self.settings.pool

    @property
    def start_s(self) -> float:
        """How long a replica may take to be up; its MCP servers are waited for."""
        return _START_S + max((server.start_s for server in self.settings.mcp), default=0.0)

    @property
    def longest_s(self) -> float:
        """How long one of its tools may take."""
        settings = self.settings
        bounds = (*settings.command, *settings.python, *settings.http, *settings.mcp)
        return max((bound.timeout_s for bound in bounds), default=0.0)


class _Listening(msgspec.Struct):
    port: int


@dataclass(slots=True, kw_only=True, eq=False)
class _Child:
    process: asyncio.subprocess.Process
    token: str
    log: Path
    url: str = ""


class ToolReplicas:
    """An ElasticProvider of tool replicas, each a process with a token of its own.

    They inherit no more of the environment than they need, and the variables that their files name as secrets. A
    replica logs to REPLICA_ID.log in `logs`.
    """

    def __init__(self, pools: Mapping[str, ToolPool], *, logs: Path) -> None:
        self._pools = dict(pools)
        self._logs = logs
        self._children: dict[str, _Child] = {}

    def token_of(self, replica_id: str) -> str | None:
        """What the replica wants to be shown; None for one that is not of here."""
        child = self._children.get(replica_id)
        return None if child is None else child.token

    async def start(self) -> Sequence[Replica]:
        """Start those that are there from the start, at once. Raises ReplicaError, with nothing left running."""
        wanted = [(f"{name}-{DEVICE}-{n}", name) for name, pool in self._pools.items() for n in range(pool.count)]
        found = await asyncio.gather(
            *(self._up(replica_id, name) for replica_id, name in wanted), return_exceptions=True
        )
        for one in found:
            if isinstance(one, BaseException):
                await self.stop()
                raise one
        return [replica for replica in found if isinstance(replica, Replica)]

    async def stop(self) -> None:
        """End all of them, with all that they have started. Safe at any time."""
        await asyncio.gather(*(self.retire(replica_id) for replica_id in list(self._children)))

    async def deploy(self, replica_id: str, group: ReplicaGroup) -> Replica:
        """Start one more. Raises ReplicaError, with nothing of it left running."""
        if group.model not in self._pools:
            known = ", ".join(self._pools) or "none"
            raise ReplicaError(f"replica {replica_id}: there is no pool of tools {group.model!r}, only: {known}")
        if replica_id in self._children:
            raise ReplicaError(f"replica {replica_id} is running already: choose another id, or retire it first")
        return await self._up(replica_id, group.model)

    async def retire(self, replica_id: str) -> None:
        """End one of them: asked first, killed after a while. What its tools had running ends with it."""
        child = self._children.get(replica_id)
        if child is not None:
            await _end(child.process)
            self._children.pop(replica_id, None)

    async def _up(self, replica_id: str, name: str) -> Replica:
        pool = self._pools[name]
        try:
            async with asyncio.timeout(pool.start_s):
                child = await self._spawn(replica_id, pool)
        except TimeoutError:
            await self.retire(replica_id)
            raise ReplicaError(f"tool replica {replica_id} was not up within {pool.start_s:.0f} s") from None
        except BaseException:
            await self.retire(replica_id)
            raise
        return tool_replica(replica_id, pool=name, url=child.url, slots=pool.settings.slots, provider="tools")

    async def _spawn(self, replica_id: str, pool: ToolPool) -> _Child:
        token = secrets.token_urlsafe(32)
        self._logs.mkdir(parents=True, exist_ok=True)
        path = self._logs / f"{replica_id}.log"
        with path.open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "swarmx.providers.tools", "--config", str(pool.file), "--exit-with-parent"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env={**_environment(pool.settings), TOKEN_VARIABLE: token},
            )
        child = self._children[replica_id] = _Child(process=process, token=token, log=path)
        line = await process.stdout.readline() if process.stdout is not None else b""
        try:
            url = f"http://127.0.0.1:{msgspec.json.decode(line, type=_Listening).port}"
            async with aiohttp.ClientSession() as session, session.get(f"{url}/health") as response:
                response.raise_for_status()
        except (msgspec.MsgspecError, aiohttp.ClientError) as error:
            with contextlib.suppress(TimeoutError):  # if it is about to end, a signal would take its status from us
                await asyncio.wait_for(process.wait(), _LAST_BREATH_S)
            await _end(process)
            raise ReplicaError(
                f"tool replica {replica_id} did not start, exit status {process.returncode}: {_last_words(path)}"
            ) from error
        child.url = url
        return child


def read_pool(file: Path, *, count: int = 0) -> ToolPool:
    """The pool of a file of tools. Raises ConfigError."""
    return ToolPool(file=file.absolute(), settings=load(file), count=count)


def tool_replica(replica_id: str, *, pool: str, url: str, slots: int, provider: str) -> Replica:
    """A replica of tools at a URL."""
    return Replica(
        replica_id=replica_id,
        model=pool,
        kind="tool",
        device=DEVICE,
        url=url.rstrip("/"),
        profile=tool_profile(pool, slots),
        provider=provider,
        emulated=False,
    )


def tool_profile(pool: str, slots: int) -> EngineProfile:
    """The work of tools are seconds, which pass at the same rate whatever else is in the slots."""
    return EngineProfile(model=pool, device=DEVICE, step_base_s=1.0, max_batch=slots, cost_weight=_COST_WEIGHT)


def token_from(variable: str, *, replica_id: str) -> str:
    """The token of a replica that somebody else runs, from the environment. Raises ConfigError when it is not there."""
    token = os.environ.get(variable, "")
    if not token or not token.isascii() or not token.isprintable():
        raise ConfigError(f"tools: the environment does not have {variable}, the token of {replica_id}.")
    return token


def secrets_of(settings: ToolSettings) -> dict[str, str]:
    """The variables of this process that the tools name as secrets."""
    secret = [*(tool.secret_headers for tool in settings.http), *(server.secret_headers for server in settings.mcp)]
    named = {variable for headers in secret for variable in headers.values()}
    return {name: os.environ[name] for name in sorted(named) if name in os.environ}


def _environment(settings: ToolSettings) -> dict[str, str]:
    return {**{name: os.environ[name] for name in _INHERITED if name in os.environ}, **secrets_of(settings)}


def _last_words(log: Path) -> str:
    return " | ".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:]) or "it said nothing"


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), _STOP_PATIENCE_S)
        except TimeoutError:
            process.kill()
            await process.wait()
    if process.stdin is not None:
        process.stdin.close()
