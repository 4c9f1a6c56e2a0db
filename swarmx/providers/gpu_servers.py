"""vLLM servers on this host's GPUs: each waits for its place, loads alone on its GPUs, and gives the place back."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from swarmx.core.errors import ConfigError, ReplicaError
from swarmx.core.nouns import EngineOrder
from swarmx.providers.gpu_places import GpuPlaces
from swarmx.providers.gpus import VISIBLE_VARIABLE, Gpu, Gpus, of_device, visible
from swarmx.providers.server_process import ServerProcess, free_port
from swarmx.providers.vllm_command import GpuServing, environment

_START_S = 900.0  # for weights of some hundred GB, and graphs to capture
_STOP_PATIENCE_S = 15.0
_ROOM_PATIENCE_S = 10.0  # the driver takes a moment to free what a process held that was killed


class GpuHost:
    """The GPUs of this host as the servers of this process share them."""

    def __init__(self, gpus: Gpus) -> None:
        self._gpus = gpus
        self._places = GpuPlaces()
        self._loading: dict[str, asyncio.Lock] = {}  # by UUID

    def check(self, serving: GpuServing) -> None:
        """Raises ConfigError when this host has not the GPUs for one server, or no vLLM to call."""
        serving.executable()
        try:
            there = self._meant(serving.device)
        except ReplicaError as error:
            raise ConfigError(f"device = {serving.device!r} asks for a GPU. {error}") from error
        if len(there) < serving.tensor_parallel_size:
            raise ConfigError(
                f"tensor_parallel_size is {serving.tensor_parallel_size}, and of {serving.device} there are "
                f"{len(there)}: {', '.join(map(str, there))}; give a server as many as there are at most."
            )

    async def place(self, server: str, serving: GpuServing) -> Sequence[Gpu]:
        """Claim room for the server, until `give_back`. Raises ReplicaError, with what each GPU has, without.

        Where others hold what our servers do not, it waits a while: it may be what one that has just ended held.
        """
        loop = asyncio.get_running_loop()
        give_up_at_s = loop.time() + _ROOM_PATIENCE_S
        share, count = serving.gpu_memory_utilization, serving.tensor_parallel_size
        while True:
            gpus = await asyncio.to_thread(self._meant, serving.device)
            try:
                return self._places.take(server, gpus, share=share, count=count)
            except ReplicaError as error:
                if loop.time() >= give_up_at_s or not self._places.might_fit(gpus, share=share, count=count):
                    raise ReplicaError(f"replica {server}: {error}") from None
            await asyncio.sleep(0.5)

    @asynccontextmanager
    async def loading(self, server: str, gpus: Sequence[Gpu]) -> AsyncIterator[None]:
        """While no other server of ours loads on these GPUs: vLLM measures what it takes by what becomes free or held
        on the whole GPU meanwhile, whoever does it."""
        async with AsyncExitStack() as stack:
            for gpu in gpus:  # always in the same order, or two servers would wait for each other
                await stack.enter_async_context(self._loading.setdefault(gpu.uuid, asyncio.Lock()))
            yield
            self._places.loaded(server)

    def give_back(self, server: str) -> None:
        """The server has ended, or never began; one that has no place is fine."""
        self._places.give_back(server)

    def _meant(self, device: str) -> Sequence[Gpu]:
        """Raises ConfigError when no GPU is meant, and ReplicaError when they cannot be read."""
        there = self._gpus.read()
        value = os.environ.get(VISIBLE_VARIABLE)
        left = visible(there, value)
        meant = of_device(left, device)
        if not meant:
            found = ", ".join(map(str, left)) or "none"
            bound = "" if value is None else f" with {VISIBLE_VARIABLE}={value}"
            raise ConfigError(
                f"device = {device!r} names no GPU of this host{bound}; there are: {found}. A part of such a name was "
                'expected, such as h100 of "NVIDIA H100 80GB HBM3", or cpu.'
            )
        return meant


class GpuServer:
    """One `vllm serve` of the model in a folder, on a free port of loopback; it ends when this process does.

    `name` is that of the replica, `model` what clients ask for. Each start writes `log` anew.
    """

    def __init__(
        self,
        host: GpuHost,
        *,
        name: str,
        model: str,
        folder: Path,
        serving: GpuServing,
        engine_order: EngineOrder,
        log: Path,
    ) -> None:
        self._host = host
        self._name = name
        self._model = model
        self._folder = folder.absolute()
        self._serving = serving
        self._engine_order = engine_order
        self._process = ServerProcess(what=f"vLLM {name}", log=log)
        self._end: asyncio.Task[None] | None = None
        self._stopped = False

    async def start(self) -> str:
        """Returns its URL once it answers its health check: after minutes where the model is large, or others load.

        Raises ReplicaError without room, or with the log's end when it does not come up. Then, and when cancelled,
        nothing of it is left, and its place is free.
        """
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        try:
            gpus = await self._host.place(self._name, self._serving)
            async with self._host.loading(self._name, gpus):
                if self._stopped:
                    raise ReplicaError(f"replica {self._name} was ended before it began to load")
                await self._process.start(
                    (
                        self._serving.executable(),
                        *self._serving.arguments(str(self._folder), self._model, str(port), self._engine_order),
                    ),
                    health=f"{url}/health",
                    start_s=_START_S,
                    stop_s=_STOP_PATIENCE_S,
                    env=environment(gpus),
                )
        except ConfigError as error:  # what was there at the start of SwarmX is not there any more
            self._host.give_back(self._name)
            raise ReplicaError(f"replica {self._name}: {error}") from error
        except BaseException:
            self._host.give_back(self._name)
            raise
        self._end = asyncio.create_task(self._give_back_at_its_end(), name=f"end of {self._name}")
        return url

    async def stop(self) -> None:
        """Ask it to end, and kill it after a while; its place is free then. Safe at any time."""
        self._stopped = True
        await self._process.stop(_STOP_PATIENCE_S)
        if self._end is not None:
            await self._end

    async def _give_back_at_its_end(self) -> None:
        await self._process.wait()
        self._host.give_back(self._name)
