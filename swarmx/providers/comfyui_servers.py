"""ComfyUI servers as replicas that come and go: each a process of this host, which a graph makes an image model."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from swarmx.core.errors import ConfigError, ReplicaError
from swarmx.core.nouns import Replica, ReplicaGroup
from swarmx.providers.comfyui import ImageReplica, Template, served
from swarmx.providers.server_process import ServerProcess, free_port

log = logging.getLogger(__name__)

_START_S = 300.0
_STOP_PATIENCE_S = 15.0
_FOLDERS = ("output", "temp", "input", "user")


@dataclass(frozen=True, slots=True, kw_only=True)
class ComfyUISpec:
    """How the servers of a group are started: a checkout of ComfyUI, an interpreter that can run it (None: this one),
    options of its command line, and the graph that answers requests."""

    folder: Path
    graph: Path
    python: Path | None = None
    options: tuple[str, ...] = ()


class ComfyUIProvider:
    """An ElasticProvider of ComfyUI servers; models are those of the checkout. Raises ConfigError where none can start.

    A server logs to REPLICA_ID.log in `logs`, and keeps what it makes in a folder of its own, REPLICA_ID in `work`.
    """

    def __init__(self, *, groups: Mapping[str, ComfyUISpec], logs: Path, work: Path) -> None:
        self._groups = dict(groups)
        self._templates = {name: _template(spec) for name, spec in groups.items()}
        self._logs = logs
        self._work = work
        self._running: dict[str, AsyncExitStack] = {}

    async def start(self) -> Sequence[Replica]:
        return ()

    async def stop(self) -> None:
        """End all servers."""
        await asyncio.gather(*(self.retire(replica_id) for replica_id in list(self._running)))

    async def deploy(self, replica_id: str, group: ReplicaGroup) -> Replica:
        """Start one more server; takes some ten seconds. Raises ReplicaError with the log's end."""
        spec = self._groups.get(group.group_id)
        if spec is None:
            known = ", ".join(self._groups) or "none"
            raise ReplicaError(
                f"replica {replica_id}: there is no ComfyUI of group {group.group_id!r}, only of: {known}"
            )
        if replica_id in self._running:
            raise ReplicaError(f"replica {replica_id} is running already: choose another id, or retire it first")
        stack = self._running[replica_id] = AsyncExitStack()
        try:
            url = await self._server(stack, replica_id, spec)
            template = self._templates[group.group_id]
            replica = ImageReplica(url=url, model=group.model, template=template, token=None)
            port = await stack.enter_async_context(served(replica))
        except BaseException as error:
            await self.retire(replica_id)
            if isinstance(error, OSError):
                raise ReplicaError(f"replica {replica_id} could not be started: {error}") from error
            raise
        return group.replica(replica_id, f"http://127.0.0.1:{port}")

    async def retire(self, replica_id: str) -> None:
        """End one server. What it made stays in its folder."""
        stack = self._running.get(replica_id)
        if stack is not None:
            await stack.aclose()
            self._running.pop(replica_id, None)

    async def _server(self, stack: AsyncExitStack, replica_id: str, spec: ComfyUISpec) -> str:
        own = (self._work / replica_id).resolve()
        for name in _FOLDERS:
            (own / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        server = ServerProcess(what=f"ComfyUI {replica_id}", log=self._logs / f"{replica_id}.log")
        stack.push_async_callback(server.stop, _STOP_PATIENCE_S)
        await server.start(
            (
                *(str(spec.python or sys.executable), "main.py", "--listen", "127.0.0.1", "--port", str(port)),
                *(part for name in _FOLDERS for part in (f"--{name}-directory", str(own / name))),
                *("--database-url", f"sqlite:///{own / 'user' / 'comfyui.db'}", *spec.options),
            ),
            health=f"{url}/queue",
            start_s=_START_S,
            stop_s=_STOP_PATIENCE_S,
            cwd=spec.folder.resolve(),
        )
        return url


def _template(spec: ComfyUISpec) -> Template:
    """The graph of a group. Raises ConfigError for one that cannot be served, or where there is no ComfyUI."""
    if not (spec.folder / "main.py").exists():
        raise ConfigError(f"{spec.folder} holds no ComfyUI: name the folder of a checkout, which has a main.py.")
    return Template(spec.graph)
