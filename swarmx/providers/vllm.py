"""Real vLLM servers on this host's CPU, started from a checkout after `make setup-vllm`."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import msgspec

from swarmx.core.engine import EngineProfile
from swarmx.core.errors import ConfigError, ReplicaError
from swarmx.core.nouns import Replica

SERVE = Path("scripts/vllm/serve.sh")
DEFAULT_MODEL = Path(".models/qwen2.5-coder-0.5b-instruct")
_START_S = 300.0
# Where util-linux is, the kernel ends the server even when its parent is killed before it can.
_DIES_WITH_PARENT = ("setpriv", "--pdeathsig", "TERM") if shutil.which("setpriv") else ()

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


class VllmProvider:
    """Implements `core.ports.Provider`: `count` servers of one model, one core each, on free ports of loopback."""

    def __init__(self, *, model: Path, name: str, count: int, logs: Path) -> None:
        if not SERVE.exists():
            raise ConfigError(f"{SERVE} is not here: real vLLM servers are started from a checkout of SwarmX.")
        if not (model / "config.json").exists():
            raise ConfigError(f"{model} holds no model: run `make setup-vllm`, or name a folder with --model.")
        self._model = model
        self._name = name
        self._count = count
        self._logs = logs
        self._running: list[asyncio.subprocess.Process] = []

    async def start(self) -> Sequence[Replica]:
        """Start all at once; returns when each answers its health check. Raises ReplicaError with the log's end."""
        self._logs.mkdir(parents=True, exist_ok=True)
        return await asyncio.gather(*(self._start(number) for number in range(self._count)))

    async def stop(self) -> None:
        for process in self._running:
            _signal(process, signal.SIGTERM)
        for process in self._running:
            try:
                await asyncio.wait_for(process.wait(), 15.0)
            except TimeoutError:
                _signal(process, signal.SIGKILL)
                await process.wait()
        self._running.clear()

    async def _start(self, number: int) -> Replica:
        port = _free_port()
        log_path = self._logs / f"vllm-{number}.log"
        cores = sorted(os.sched_getaffinity(0))
        with log_path.open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *_DIES_WITH_PARENT,
                *("bash", str(SERVE), str(self._model), self._name, str(port)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
                env={**os.environ, "SWARMX_VLLM_CPUS": str(cores[number % len(cores)])},
                start_new_session=True,
            )
        self._running.append(process)
        url = f"http://127.0.0.1:{port}"
        await _healthy(process, url, log_path)
        return Replica(
            replica_id=f"vllm-{number}",
            model=self._name,
            kind="llm",
            device="cpu",
            url=url,
            profile=msgspec.structs.replace(CPU_PROFILE, model=self._name),
            provider="vllm",
            emulated=False,
        )


async def _healthy(process: asyncio.subprocess.Process, url: str, log_path: Path) -> None:
    deadline_s = asyncio.get_running_loop().time() + _START_S
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2.0)) as session:
        while asyncio.get_running_loop().time() < deadline_s:
            if process.returncode is not None:
                raise ReplicaError(f"vLLM ended with {process.returncode}; its log ends:\n{_tail(log_path)}")
            try:
                async with session.get(f"{url}/health") as response:
                    if response.status == 200:
                        return
            except (aiohttp.ClientError, TimeoutError):
                pass
            await asyncio.sleep(0.5)
    raise ReplicaError(f"vLLM was not healthy after {_START_S:g} s; its log ends:\n{_tail(log_path)}")


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    """To the whole process group: vLLM's workers are children of its API server."""
    if process.returncode is None:
        os.killpg(process.pid, number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-15:])
