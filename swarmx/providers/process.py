"""Real vLLM servers as processes on this host's CPU, started from a checkout after `make setup-vllm`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from swarmx.core.engine import EngineProfile
from swarmx.core.errors import ConfigError, ReplicaError
from swarmx.core.nouns import EngineOrder, Replica, ReplicaGroup
from swarmx.providers.server_process import ServerProcess, free_port

SERVE = Path("scripts/vllm/serve.sh")
DEFAULT_MODEL = Path(".models/qwen2.5-coder-0.5b-instruct")
_START_S = 300.0
_STOP_PATIENCE_S = 15.0
_ARGUMENTS: Mapping[EngineOrder, Sequence[str]] = {"arrival": (), "priority": ("--scheduling-policy", "priority")}

# The 0.5B model in float32 on two cores without AVX-512, fitted by `python -m eval.emulator check --url ...`
# (eval/LOG.md). Other CPUs differ by factors; between equal servers only the form matters.
CPU_PROFILE = EngineProfile(
    model="qwen2.5-coder-0.5b-instruct",
    device="cpu",
    step_base_s=0.214,
    decode_seq_s=0.0076,
    decode_ctx_token_s=5.2e-7,
    prefill_token_s=0.00586,
    prefill_ctx_token_s=2.5e-6,
    call_base_s=0.048,
    kv_capacity_tokens=43_600,
    max_batch=8,
    max_step_tokens=4096,
)


class VllmServer:
    """One `vllm serve` of the model in a folder, on a free port of loopback; it ends when this process does.

    `cores` are those that it computes on, all that this process may use if None; each start writes `log` anew.
    """

    def __init__(
        self,
        *,
        model_dir: Path,
        name: str,
        log: Path,
        cores: Sequence[int] | None = None,
        engine_order: EngineOrder = "arrival",
    ) -> None:
        self._model_dir = model_dir
        self._name = name
        self._cores = cores
        self._arguments = _ARGUMENTS[engine_order]
        self._server = ServerProcess(what=f"vLLM {name}", log=log)

    async def start(self) -> str:
        """Returns its URL once it answers its health check, after about a minute.

        Raises ReplicaError with the log's end when it does not. Then, and when cancelled, nothing of it is left.
        """
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        await self._server.start(
            ("bash", str(SERVE), str(self._model_dir), self._name, str(port), *self._arguments),
            health=f"{url}/health",
            start_s=_START_S,
            stop_s=_STOP_PATIENCE_S,
            env={} if self._cores is None else {"SWARMX_VLLM_CPUS": ",".join(map(str, self._cores))},
        )
        return url

    async def wait(self) -> int:
        """Returns the exit status once the server that was started has ended, by itself or by `stop`."""
        return await self._server.wait()

    async def stop(self) -> None:
        """Ask it to end, and kill it after a while. Safe at any time."""
        await self._server.stop(_STOP_PATIENCE_S)

    def last_words(self) -> str:
        """The end of its log."""
        return self._server.last_words()


def check_model(folder: Path) -> None:
    """Raises ConfigError when vLLM cannot be started here, or the folder holds no model for it."""
    if not SERVE.exists():
        raise ConfigError(f"{SERVE} is not here: real vLLM servers are started from a checkout of SwarmX.")
    if not (folder / "config.json").exists():
        raise ConfigError(f"{folder} holds no model: run `make setup-vllm`, or name a folder that does.")


class ProcessProvider:
    """An ElasticProvider of vLLM servers, one a replica, each bound to the core with the fewest of them.

    `models` are the folders of the groups, by group id; a server logs to REPLICA_ID.log in `logs`. Nothing runs before
    `deploy`. Raises ConfigError when there is nothing to start or to serve.
    """

    def __init__(self, *, models: Mapping[str, Path], logs: Path) -> None:
        for folder in models.values():
            check_model(folder)
        self._models = dict(models)
        self._logs = logs
        self._servers: dict[str, tuple[VllmServer, int]] = {}  # with the core of each

    async def start(self) -> Sequence[Replica]:
        return ()

    async def stop(self) -> None:
        """End all servers."""
        await asyncio.gather(*(self.retire(replica_id) for replica_id in list(self._servers)))

    async def deploy(self, replica_id: str, group: ReplicaGroup) -> Replica:
        """Start one more server; takes about a minute. Raises ReplicaError with the log's end."""
        folder = self._models.get(group.group_id)
        if folder is None:
            known = ", ".join(self._models) or "none"
            raise ReplicaError(f"replica {replica_id}: there is no model of group {group.group_id!r}, only of: {known}")
        if replica_id in self._servers:
            raise ReplicaError(f"replica {replica_id} is running already: choose another id, or retire it first")
        core = self._idlest_core()
        server = VllmServer(
            model_dir=folder,
            name=group.model,
            log=self._logs / f"{replica_id}.log",
            cores=[core],
            engine_order=group.engine_order,
        )
        self._servers[replica_id] = server, core
        try:
            url = await server.start()
        except BaseException:
            await self.retire(replica_id)
            raise
        return group.replica(replica_id, url)

    async def retire(self, replica_id: str) -> None:
        """End one server."""
        if replica_id in self._servers:
            await self._servers[replica_id][0].stop()
            self._servers.pop(replica_id, None)

    def _idlest_core(self) -> int:
        taken = [core for _, core in self._servers.values()]
        return min(sorted(os.sched_getaffinity(0)), key=taken.count)
