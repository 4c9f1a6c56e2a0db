"""Real vLLM servers share a real GPU: placed by what NVML tells, refused without room, their memory free after them."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import signal
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from swarmx.core.errors import ReplicaError
from swarmx.core.nouns import Replica, ReplicaGroup
from swarmx.providers.gpus import Gpu, NvmlGpus
from swarmx.providers.process import ProcessProvider
from swarmx.providers.static import UNKNOWN_TEXT
from swarmx.providers.vllm_command import GpuServing
from swarmx.runtime.watch import read_signal

VLLM = shutil.which(os.environ.get("SWARMX_GPU_VLLM") or "vllm")
MODEL = os.environ.get("SWARMX_GPU_MODEL")
# Random weights: of the model only its config.json and its tokenizer are needed.
OPTIONS = shlex.split(os.environ.get("SWARMX_GPU_OPTIONS", "--load-format dummy --enforce-eager"))
SHARE = 0.4
PATIENCE_S = 60.0  # until the driver has freed what a process held
GIB = 2**30

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        VLLM is None or MODEL is None,
        reason="needs a GPU: make test-gpu SWARMX_GPU_VLLM=program SWARMX_GPU_MODEL=folder of a model",
    ),
]
GROUP = ReplicaGroup(
    group_id="m-gpu",
    model="m",
    kind="llm",
    device="nvidia",
    provider="process",
    profile=UNKNOWN_TEXT,
    min_replicas=0,
    max_replicas=3,
    limit=3,
    start_s=60.0,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """The one GPU that the test may use, and what was free on it before."""

    before: Gpu
    provider: ProcessProvider
    logs: Path

    def held_bytes(self) -> int:
        """What is held beyond what was held before."""
        now = NvmlGpus().read()[self.before.index]
        return self.before.free_bytes - now.free_bytes


@pytest.fixture
async def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Card]:
    gpu = max((gpu for gpu in NvmlGpus().read() if gpu.fault is None), key=lambda gpu: gpu.free_bytes)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpu.uuid)
    serving = GpuServing(
        device=GROUP.device,
        gpu_memory_utilization=SHARE,
        max_model_len=2048,
        slots=16,
        command=str(VLLM),
        options=tuple(OPTIONS),
    )
    logs = tmp_path / "logs"
    provider = ProcessProvider(models={GROUP.group_id: Path(str(MODEL))}, logs=logs, serving={GROUP.group_id: serving})
    print(f"\n{gpu}, {gpu.uuid}: {gpu.free_bytes / GIB:.2f} GiB free of {gpu.total_bytes / GIB:.2f}")
    yield Card(before=gpu, provider=provider, logs=logs)
    await provider.stop()


def servers() -> set[int]:
    """The processes that this one has started."""
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


async def until(holds: Callable[[], bool], *, deadline_s: float) -> None:
    end_s = time.monotonic() + deadline_s
    while not holds():
        assert time.monotonic() < end_s, f"not so after {deadline_s:g} s"
        await asyncio.sleep(0.2)


async def asked(replica: Replica, path: str, body: dict[str, Any] | None = None) -> bytes:
    async with (
        aiohttp.ClientSession() as session,
        session.request("GET" if body is None else "POST", replica.url + path, json=body) as response,
    ):
        text = await response.read()
        assert response.status == 200, text
        return text


async def test_real_servers_share_a_gpu_and_one_that_is_killed_makes_room_for_the_next(card: Card) -> None:
    provider, total_bytes = card.provider, card.before.total_bytes

    async def deployed(name: str) -> Replica:
        """Start one, and tell how long it took and what it holds."""
        began_s = time.monotonic()
        replica = await provider.deploy(name, GROUP)
        print(f"{name} is up after {time.monotonic() - began_s:.1f} s; {card.held_bytes() / GIB:.2f} GiB are held")
        return replica

    a = await deployed("a")
    (first,) = servers()
    assert card.held_bytes() > 0.9 * SHARE * total_bytes
    b = await deployed("b")
    assert 2 * 0.9 * SHARE * total_bytes < card.held_bytes() < 2.2 * SHARE * total_bytes
    for replica in (a, b):
        said = await asked(replica, "/v1/completions", {"model": "m", "prompt": "Hello", "max_tokens": 4})
        assert b'"completion_tokens":4' in said.replace(b" ", b"")
        signal_read = read_signal(await asked(replica, "/metrics"), replica, 0.0)
        assert signal_read is not None
        assert (signal_read.running, signal_read.waiting) == (0, 0)

    with pytest.raises(ReplicaError, match=r"replica c: there is no room on a GPU for a share of 0\.4") as full:
        await provider.deploy("c", GROUP)
    print(full.value)
    assert not (card.logs / "c.log").exists()

    os.kill(first, signal.SIGKILL)
    await until(lambda: card.held_bytes() < 1.2 * SHARE * total_bytes, deadline_s=PATIENCE_S)
    c = None
    end_s = time.monotonic() + PATIENCE_S
    while c is None:  # nobody retires a: until its end was heard of there is no room
        try:
            c = await deployed("c")
        except ReplicaError:
            assert time.monotonic() < end_s
    assert await asked(c, "/health") == await asked(b, "/health")

    await provider.stop()
    await until(lambda: card.held_bytes() < GIB, deadline_s=PATIENCE_S)
    assert not servers()


async def test_servers_that_are_wanted_at_once_load_one_after_the_other(card: Card) -> None:
    replicas = await asyncio.gather(*(card.provider.deploy(name, GROUP) for name in ("a", "b")))
    for replica in replicas:
        assert await asked(replica, "/v1/completions", {"model": "m", "prompt": "Hello", "max_tokens": 4})
    await card.provider.stop()
    await until(lambda: card.held_bytes() < GIB, deadline_s=PATIENCE_S)


async def test_a_start_that_is_called_off_leaves_no_memory_behind(card: Card) -> None:
    start = asyncio.create_task(card.provider.deploy("a", GROUP))
    await until(lambda: card.held_bytes() > GIB or start.done(), deadline_s=600.0)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    await until(lambda: card.held_bytes() < GIB, deadline_s=PATIENCE_S)
    assert not servers()
