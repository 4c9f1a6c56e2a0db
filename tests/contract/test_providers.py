"""What every provider that can start single replicas must do; the one of real vLLM servers with `-m vllm`."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from swarmx.core.engine import EngineProfile
from swarmx.core.errors import ReplicaError
from swarmx.core.nouns import ReplicaGroup
from swarmx.core.ports import ElasticProvider
from swarmx.providers.emulated.provider import EmulatedGroup, EmulatedProvider
from swarmx.providers.process import CPU_PROFILE, DEFAULT_MODEL, ProcessProvider
from swarmx.providers.static import UNKNOWN_TEXT
from swarmx.providers.vllm_command import GpuServing
from tests.e2e.fleet import alive, children
from tests.providers.gpu_stand_in import TableGpus, gpu, vllm


def processes() -> set[int]:
    """Everything that descends from this process."""
    found, new = set(), {os.getpid()}
    while new:
        new = {child for pid in new if alive(pid) for child in children(pid)} - found
        found |= new
    return {pid for pid in found if alive(pid)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A provider, a group whose replicas start, and one whose replicas die at their start.

    `running` are the processes that its replicas are.
    """

    provider: ElasticProvider
    sound: ReplicaGroup
    broken: ReplicaGroup
    running: Callable[[], set[int]] = processes


def a_group(group_id: str, provider: str, profile: EngineProfile, *, kind: Any) -> ReplicaGroup:
    return ReplicaGroup(
        group_id=group_id,
        model="m",
        kind=kind,
        device=profile.device,
        provider=provider,
        profile=profile,
        min_replicas=0,
        max_replicas=2,
        limit=2,
        start_s=1.0,
    )


def emulated() -> Subject:
    real = EngineProfile(model="m", device="l40s", step_base_s=0.2, max_batch=1)
    groups = {"sound": EmulatedGroup(profile=real, start_s=1.0), "broken": EmulatedGroup(profile=real, fault="exit")}
    return Subject(
        provider=EmulatedProvider([], groups=groups, time_scale=10.0),
        sound=a_group("sound", "emulated", real.scaled(10.0), kind="image"),
        broken=a_group("broken", "emulated", real.scaled(10.0), kind="image"),
    )


def process(folder: Path) -> Subject:
    empty = folder / "empty"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    profile = msgspec.structs.replace(CPU_PROFILE, model="m")
    return Subject(
        provider=ProcessProvider(models={"sound": DEFAULT_MODEL, "broken": empty}, logs=folder / "logs"),
        sound=a_group("sound", "process", profile, kind="llm"),
        broken=a_group("broken", "process", profile, kind="llm"),
    )


def on_gpus(folder: Path) -> Subject:
    """A program stands in for vLLM; the contract of the real one on a GPU is `make test-gpu`."""
    models = {name: folder / name for name in ("sound", "broken")}
    for name, model in models.items():
        model.mkdir()
        (model / "config.json").write_text("{}")
        (model / name).touch()
    command = str(vllm(folder, folder / "held", [gpu(0)]))
    serving = GpuServing(device="h100", gpu_memory_utilization=0.9, command=command)
    profile = msgspec.structs.replace(UNKNOWN_TEXT, model="m", device="h100")
    return Subject(
        provider=ProcessProvider(
            models=models,
            logs=folder / "logs",
            serving=dict.fromkeys(models, serving),
            gpus=TableGpus([gpu(0)], folder / "held"),
        ),
        sound=a_group("sound", "process", profile, kind="llm"),
        broken=a_group("broken", "process", profile, kind="llm"),
    )


@pytest.fixture(
    params=[
        pytest.param("emulated", marks=pytest.mark.process),
        pytest.param("on GPUs", marks=pytest.mark.process),
        pytest.param(
            "process",
            marks=[
                pytest.mark.vllm,
                pytest.mark.timeout(900),
                pytest.mark.skipif(not DEFAULT_MODEL.exists(), reason="make setup-vllm fetches the model"),
            ],
        ),
    ]
)
async def subject(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Subject]:
    before = processes()
    made = {"emulated": lambda _: emulated(), "on GPUs": on_gpus, "process": process}[request.param](tmp_path)
    yield made
    await made.provider.stop()
    assert processes() == before


async def healthy(url: str) -> bool:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10.0)) as session:
        try:
            async with session.get(f"{url}/health") as response:
                return response.status == 200
        except aiohttp.ClientError:
            return False


def killed(subject: Subject, before: set[int]) -> set[int]:
    """The processes to kill: where they are children of this one, only those, as their own may end by themselves."""
    new = subject.running() - before
    return new & set(children(os.getpid())) or new


async def test_a_deployed_replica_is_what_its_group_says_and_answers_until_it_is_retired(subject: Subject) -> None:
    before = subject.running()
    group = subject.sound
    assert list(await subject.provider.start()) == []
    replica = await subject.provider.deploy("a", group)
    assert (replica.replica_id, replica.model, replica.kind, replica.device, replica.provider, replica.profile) == (
        *("a", group.model, group.kind, group.device, group.provider),
        group.profile,
    )
    assert await healthy(replica.url)
    with pytest.raises(ReplicaError, match="replica a is running already"):
        await subject.provider.deploy("a", group)
    assert await healthy(replica.url)
    await subject.provider.retire("a")
    assert not await healthy(replica.url)
    assert subject.running() == before
    await subject.provider.retire("a")
    await subject.provider.retire("never seen")


async def test_one_that_was_killed_can_be_retired_and_its_name_used_again(subject: Subject) -> None:
    before = subject.running()
    await subject.provider.deploy("a", subject.sound)
    for pid in killed(subject, before):
        os.kill(pid, signal.SIGKILL)
    await subject.provider.retire("a")
    assert subject.running() == before
    replica = await subject.provider.deploy("a", subject.sound)
    assert await healthy(replica.url)
    await subject.provider.stop()
    assert subject.running() == before


async def test_a_deploy_that_is_cancelled_leaves_nothing_running(subject: Subject) -> None:
    before = subject.running()
    task = asyncio.create_task(subject.provider.deploy("a", subject.sound))
    while subject.running() == before:
        await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert subject.running() == before


async def test_one_that_dies_at_its_start_is_an_error_with_its_last_words_and_leaves_nothing(subject: Subject) -> None:
    before = subject.running()
    with pytest.raises(ReplicaError, match=r"(?s)told to fail at its start|its log ends:\n.*\w"):
        await subject.provider.deploy("a", subject.broken)
    assert subject.running() == before


async def test_a_group_that_it_does_not_know_is_refused_with_those_it_knows(subject: Subject) -> None:
    unknown = msgspec.structs.replace(subject.sound, group_id="other")
    with pytest.raises(ReplicaError, match=r"replica a: .*group 'other'.* sound, broken"):
        await subject.provider.deploy("a", unknown)
