"""Real vLLM servers as processes on this host: on its CPU from a checkout after `make setup-vllm`, or on its GPUs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from swarmx.core.engine import EngineProfile
from swarmx.core.errors import ConfigError, ReplicaError
from swarmx.core.nouns import EngineOrder, Replica, ReplicaGroup
from swarmx.providers.gpu_servers import GpuHost, GpuServer
from swarmx.providers.gpus import Gpus, NvmlGpus
from swarmx.providers.server_process import ServerProcess, free_port
from swarmx.providers.vllm_command import ORDER_ARGUMENTS, GpuServing

SERVE = Path("scripts/vllm/serve.sh")
DEFAULT_MODEL = Path(".models/qwen2.5-coder-0.5b-instruct")
_START_S = 300.0
_STOP_PATIENCE_S = 15.0

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
    """One `vllm serve` on the CPU of the model in a folder, on a free port of loopback; it ends when this process does.

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
        self._arguments = ORDER_ARGUMENTS[engine_order]
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
    """Raises ConfigError when vLLM cannot be started on the CPU here, or the folder holds no model for it."""
    if not SERVE.exists():
        raise ConfigError(f"{SERVE} is not here: real vLLM servers are started from a checkout of SwarmX.")
    _check_folder(folder)


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").exists():
        raise ConfigError(f"{folder} holds no model: run `make setup-vllm`, or name a folder that does.")


class ProcessProvider:
    """An ElasticProvider of vLLM servers, one a replica.

    `models` are the folders of the groups, by group id; a server logs to REPLICA_ID.log in `logs`. Groups that are in
    `serving` compute on GPUs of this host, which `gpus` reads; servers of the others are each bound to the core with
    the fewest of them. Nothing runs before `deploy`. Raises ConfigError when there is nothing to start, to serve or to
    compute on.
    """

    def __init__(
        self,
        *,
        models: Mapping[str, Path],
        logs: Path,
        serving: Mapping[str, GpuServing] | None = None,
        gpus: Gpus | None = None,
    ) -> None:
        self._models = dict(models)
        self._logs = logs
        self._serving = dict(serving or {})
        self._host = GpuHost(gpus or NvmlGpus())
        self._servers: dict[str, VllmServer | GpuServer] = {}
        self._cores: dict[str, int] = {}  # of the servers that are bound to one
        for group_id, folder in models.items():
            if group_id in self._serving:
                _check_folder(folder)
                self._host.check(self._serving[group_id])
            else:
                check_model(folder)

    async def start(self) -> Sequence[Replica]:
        return ()

    async def stop(self) -> None:
        """End all servers."""
        await asyncio.gather(*(self.retire(replica_id) for replica_id in list(self._servers)))

    async def deploy(self, replica_id: str, group: ReplicaGroup) -> Replica:
        """Start one more server; takes about a minute. Raises ReplicaError with the log's end, or what has no room."""
        folder = self._models.get(group.group_id)
        if folder is None:
            known = ", ".join(self._models) or "none"
            raise ReplicaError(f"replica {replica_id}: there is no model of group {group.group_id!r}, only of: {known}")
        if replica_id in self._servers:
            raise ReplicaError(f"replica {replica_id} is running already: choose another id, or retire it first")
        server = self._servers[replica_id] = self._server(replica_id, group, folder)
        try:
            url = await server.start()
        except BaseException:
            await self.retire(replica_id)
            raise
        return group.replica(replica_id, url)

    async def retire(self, replica_id: str) -> None:
        """End one server."""
        if replica_id in self._servers:
            await self._servers[replica_id].stop()
            self._servers.pop(replica_id, None)
            self._cores.pop(replica_id, None)

    def _server(self, replica_id: str, group: ReplicaGroup, folder: Path) -> VllmServer | GpuServer:
        log = self._logs / f"{replica_id}.log"
        serving = self._serving.get(group.group_id)
        if serving is not None:
            return GpuServer(
                self._host,
                name=replica_id,
                model=group.model,
                folder=folder,
                serving=serving,
                engine_order=group.engine_order,
                log=log,
            )
        core = self._cores[replica_id] = self._idlest_core()
        return VllmServer(model_dir=folder, name=group.model, log=log, cores=[core], engine_order=group.engine_order)

    def _idlest_core(self) -> int:
        taken = list(self._cores.values())
        return min(sorted(os.sched_getaffinity(0)), key=taken.count)
