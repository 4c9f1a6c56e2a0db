"""How servers on GPUs are placed, started, bounded and ended; a program stands in for vLLM, the processes are real."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from swarmx.core.errors import ConfigError, ReplicaError
from swarmx.core.nouns import Replica, ReplicaGroup
from swarmx.providers import gpu_servers as module
from swarmx.providers.gpus import Gpu, of_device
from swarmx.providers.process import ProcessProvider
from swarmx.providers.static import UNKNOWN_TEXT
from swarmx.providers.vllm_command import GpuServing, refused_option
from tests.e2e.fleet import children, until
from tests.providers.gpu_stand_in import TableGpus, gpu, held_bytes, vllm

pytestmark = pytest.mark.process

GROUP = ReplicaGroup(
    group_id="m-h100",
    model="m",
    kind="llm",
    device="h100",
    provider="process",
    profile=UNKNOWN_TEXT,
    min_replicas=0,
    max_replicas=4,
    limit=4,
    start_s=1.0,
)


OTHER = msgspec.structs.replace(GROUP, group_id="m-l40s", device="l40s")


@dataclass(slots=True, kw_only=True, eq=False)
class Host:
    """A host with GPUs: a folder for models and logs, one for what its servers hold, and how they are called."""

    folder: Path
    gpus: TableGpus
    serving: dict[str, GpuServing]

    @property
    def held(self) -> Path:
        return self.folder / "held"

    def provider(self, **more: Any) -> ProcessProvider:
        return ProcessProvider(
            models=dict.fromkeys(self.serving, self.folder / "model"),
            logs=self.folder / "logs",
            serving={name: replace(serving, **more) for name, serving in self.serving.items()},
            gpus=self.gpus,
        )

    def said(self, replica_id: str) -> dict[str, Any]:
        """How the server of a replica was called."""
        first, *_ = (self.folder / "logs" / f"{replica_id}.log").read_text().splitlines()
        found: dict[str, Any] = json.loads(first)
        return found

    def on(self, replica_id: str) -> str:
        return str(self.said(replica_id)["CUDA_VISIBLE_DEVICES"])


def a_host(folder: Path, *gpus: Gpu) -> Host:
    held, model = folder / "held", folder / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    program = str(vllm(folder, held, gpus))
    kinds = {group.device: group for group in (GROUP, OTHER)}
    serving = {
        group.group_id: GpuServing(device=device, gpu_memory_utilization=0.4, command=program)
        for device, group in kinds.items()
        if of_device(gpus, device)
    }
    return Host(folder=folder, gpus=TableGpus(gpus, held), serving=serving)


@pytest.fixture
async def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Host]:
    """A host with one GPU, on which nothing is left at the end."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    before = set(children(os.getpid()))
    yield a_host(tmp_path, gpu(0))
    assert set(children(os.getpid())) == before


@pytest.fixture
async def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Host]:
    """A host with two GPUs."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    before = set(children(os.getpid()))
    yield a_host(tmp_path, gpu(0), gpu(1))
    assert set(children(os.getpid())) == before


@pytest.fixture
async def mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Host]:
    """A host with two GPUs of two kinds, each with a group of its own."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    before = set(children(os.getpid()))
    yield a_host(tmp_path, gpu(0), gpu(1, name="NVIDIA L40S"))
    assert set(children(os.getpid())) == before


async def answer(replica: Replica) -> str:
    body = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{replica.url}/v1/chat/completions", json=body) as response,
    ):
        assert response.status == 200
        return str((await response.json())["choices"][0]["message"]["content"])


async def test_servers_share_a_gpu_as_far_as_their_shares_fit_and_room_is_free_again_after_them(host: Host) -> None:
    provider = host.provider()
    replicas = await asyncio.gather(*(provider.deploy(name, GROUP) for name in ("a", "b")))
    assert all(await asyncio.gather(*map(answer, replicas)))
    assert held_bytes(host.held, 0) > 0.8 * host.gpus.table[0].total_bytes
    with pytest.raises(
        ReplicaError, match=r"no room on a GPU for a share of 0\.4: GPU 0 \(NVIDIA H100\) has 15\.0 GiB"
    ):
        await provider.deploy("c", GROUP)
    assert not (host.folder / "logs" / "c.log").exists()
    await provider.retire("a")
    assert await answer(await provider.deploy("c", GROUP))
    await provider.stop()
    assert held_bytes(host.held, 0) == 0


async def test_a_server_is_told_its_gpus_its_bounds_and_its_order(host: Host) -> None:
    provider = host.provider(slots=32, max_model_len=8192, options=("--load-format", "dummy"))
    replica = await provider.deploy("a", msgspec.structs.replace(GROUP, engine_order="priority"))
    assert replica.priorities == "low_first"
    said = host.said("a")
    port = replica.url.rpartition(":")[2]
    assert said["argv"] == [
        *("serve", str(host.folder / "model"), "--served-model-name", "m", "--host", "127.0.0.1", "--port", port),
        *("--gpu-memory-utilization", "0.4", "--tensor-parallel-size", "1"),
        *("--max-model-len", "8192", "--max-num-seqs", "32", "--scheduling-policy", "priority"),
        *("--load-format", "dummy"),
    ]
    assert (said["CUDA_VISIBLE_DEVICES"], said["CUDA_DEVICE_ORDER"], said["HF_HUB_OFFLINE"]) == ("0", "PCI_BUS_ID", "1")
    await provider.stop()


async def test_the_place_of_a_server_that_is_killed_is_free_though_nobody_retired_it(host: Host) -> None:
    provider = host.provider(gpu_memory_utilization=0.9)
    before = set(children(os.getpid()))
    await provider.deploy("a", GROUP)
    (pid,) = set(children(os.getpid())) - before
    os.kill(pid, signal.SIGKILL)

    async def again() -> str:
        try:
            return (await provider.deploy("b", GROUP)).url
        except ReplicaError:  # until the end of the process was heard of
            return ""

    assert await until(again, bool)
    await provider.stop()


async def test_a_server_that_dies_at_its_start_is_quoted_and_its_place_is_free(host: Host) -> None:
    provider = host.provider(gpu_memory_utilization=0.9)
    (host.folder / "model" / "broken").touch()
    with pytest.raises(ReplicaError, match=r"(?s)vLLM a ended with 1; its log ends:.*CUDA out of memory"):
        await provider.deploy("a", GROUP)
    (host.folder / "model" / "broken").unlink()
    await provider.deploy("b", GROUP)
    await provider.stop()


async def test_a_server_loads_alone_on_its_gpu_while_those_on_others_go_on(mixed: Host) -> None:
    provider = mixed.provider()
    (mixed.held / "hold-0").touch()
    a = asyncio.create_task(provider.deploy("a", GROUP))
    await until(lambda: asyncio.sleep(0, (mixed.held / "loading-0").exists()), bool)
    b = asyncio.create_task(provider.deploy("b", GROUP))
    await provider.deploy("c", OTHER)  # time enough for b, were it not to wait
    assert not (mixed.folder / "logs" / "b.log").exists()
    (mixed.held / "hold-0").unlink()
    await asyncio.gather(a, b)
    assert [mixed.on(name) for name in ("a", "b", "c")] == ["0", "0", "1"]
    await provider.stop()


@pytest.mark.parametrize("way", ["cancelled", "retired"])
async def test_a_server_that_is_called_off_before_it_loads_never_loads_and_leaves_its_place(
    host: Host, way: str
) -> None:
    provider = host.provider()
    (host.held / "hold-0").touch()
    a = asyncio.create_task(provider.deploy("a", GROUP))
    await until(lambda: asyncio.sleep(0, (host.held / "loading-0").exists()), bool)
    seen = host.gpus.reads
    b = asyncio.create_task(provider.deploy("b", GROUP))
    await until(lambda: asyncio.sleep(0, host.gpus.reads), lambda reads: reads == seen + 1)
    await (provider.retire("b") if way == "retired" else asyncio.sleep(0, b.cancel()))
    (host.held / "hold-0").unlink()
    with pytest.raises(asyncio.CancelledError if way == "cancelled" else ReplicaError, match=r"^$|was ended before"):
        await b
    await a
    assert not (host.folder / "logs" / "b.log").exists()
    await provider.deploy("c", GROUP)
    await provider.stop()


async def test_a_model_is_spread_over_as_many_gpus_as_it_asks_for(two: Host) -> None:
    provider = two.provider(tensor_parallel_size=2)
    assert await answer(await provider.deploy("a", GROUP))
    assert two.on("a") == "0,1"
    await provider.stop()


async def test_room_that_others_hold_is_waited_for_a_while(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROOM_PATIENCE_S", 0.0)
    (empty,) = host.gpus.table
    host.gpus.table = [gpu(0, free=1)]
    provider = host.provider()
    with pytest.raises(ReplicaError, match="no room"):
        await provider.deploy("a", GROUP)
    monkeypatch.setattr(module, "_ROOM_PATIENCE_S", 60.0)
    waiting = asyncio.create_task(provider.deploy("a", GROUP))
    await asyncio.sleep(0)
    host.gpus.table = [empty]
    assert await answer(await waiting)
    await provider.stop()


async def test_a_gpu_that_is_lost_gets_no_servers(two: Host) -> None:
    provider = two.provider()
    two.gpus.table[0] = replace(two.gpus.table[0], fault="NVML says: GPU is lost")
    await provider.deploy("a", GROUP)
    await provider.deploy("b", GROUP)
    assert (two.on("a"), two.on("b")) == ("1", "1")
    two.gpus.table[0] = gpu(0, total=0, name="unknown", fault="NVML says: GPU is lost")
    two.gpus.table[1] = gpu(1, total=0, name="unknown", fault="NVML says: GPU is lost")
    with pytest.raises(ReplicaError, match=r"replica c: .*there are: GPU 0 \(unknown\), GPU 1 \(unknown\)"):
        await provider.deploy("c", GROUP)
    await provider.stop()


async def test_only_visible_gpus_are_used(two: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1")
    provider = two.provider()
    await provider.deploy("a", GROUP)
    assert two.on("a") == "1"
    await provider.stop()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match=r"with CUDA_VISIBLE_DEVICES=; there are: none"):
        two.provider()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"device": "l40s"}, r"'l40s' names no GPU of this host; there are: GPU 0 \(NVIDIA H100\)"),
        ({"tensor_parallel_size": 2}, r"tensor_parallel_size is 2, and of h100 there are 1: GPU 0"),
        ({"command": "no-such-vllm"}, "no-such-vllm is neither a program nor on PATH"),
    ],
)
def test_what_this_host_cannot_serve_is_an_error_at_the_start(tmp_path: Path, more: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        a_host(tmp_path, gpu(0)).provider(**more)


def test_a_host_whose_gpus_cannot_be_read_is_an_error_at_the_start(tmp_path: Path) -> None:
    host = a_host(tmp_path, gpu(0))

    class Broken:
        def read(self) -> list[Gpu]:
            raise ReplicaError("NVML cannot be opened")

    host.gpus = Broken()  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"device = 'h100' asks for a GPU\. NVML cannot be opened"):
        host.provider()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--port", "SwarmX sets --port itself"),
        ("--port=1", "leave it out"),
        ("--gpu_memory_utilization=0.5", "use gpu_memory_utilization"),
        ("--max-num-s", "SwarmX sets --max-num-seqs itself, or counts on its default; use slots"),
        ("-tp", "use tensor_parallel_size"),
        ("--scheduling-policy", "use engine_order"),
        ("--kv-cache-memory-bytes", "use gpu_memory_utilization"),
    ],
)
def test_options_that_swarmx_sets_are_refused_in_every_spelling_that_vllm_takes(option: str, said: str) -> None:
    assert said in str(refused_option(("--enforce-eager", option)))


def test_other_options_are_passed_on() -> None:
    given = ("--kv-cache-dtype", "fp8", "-O3", "--compilation-config.level=1", "--load-format=dummy", "--", "-")
    assert refused_option(given) is None
