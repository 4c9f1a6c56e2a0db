"""The provider starts what it was told to, says why when it cannot, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import aiohttp
import pytest

from swarmx.core.engine import EngineProfile
from swarmx.core.errors import ReplicaError
from swarmx.core.nouns import ReplicaGroup
from swarmx.core.ports import Provider
from swarmx.providers.emulated.provider import EmulatedGroup, EmulatedProvider, EmulatedSpec

pytestmark = pytest.mark.process

PROFILE = EngineProfile(model="sdxl", device="l40s", step_base_s=0.2, max_batch=1)


def spec(replica_id: str, *, kind: str = "image", size_class: str = "small") -> EmulatedSpec:
    return EmulatedSpec(
        replica_id=replica_id,
        model="sdxl",
        kind="llm" if kind == "llm" else "image",
        device="l40s",
        profile=PROFILE,
        size_class=size_class,
    )


GROUP = ReplicaGroup(
    group_id="images",
    model="sdxl",
    kind="image",
    device="l40s",
    provider="emulated",
    profile=PROFILE.scaled(4.0),
    min_replicas=0,
    max_replicas=4,
    limit=4,
    start_s=1.0,
)


def children() -> set[int]:
    """Processes whose parent is this one."""
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


async def test_started_replicas_answer_and_stopped_ones_are_gone() -> None:
    before = children()
    provider: Provider = EmulatedProvider([spec("a"), spec("b")], time_scale=4.0)
    replicas = await provider.start()
    assert len(children() - before) == 2
    assert [r.replica_id for r in replicas] == ["a", "b"]
    for replica in replicas:
        assert (replica.provider, replica.emulated, replica.model, replica.device) == ("emulated", True, "sdxl", "l40s")
        assert replica.profile.step_base_s == pytest.approx(0.05)
        async with aiohttp.ClientSession() as session, session.get(f"{replica.url}/health") as response:
            assert response.status == 200
    await provider.stop()
    assert children() == before
    await provider.stop()


async def test_a_replica_that_dies_on_start_is_quoted_and_takes_the_others_along(tmp_path: Path) -> None:
    before = children()
    provider = EmulatedProvider([spec("good"), spec("bad", kind="llm")], recorded=tmp_path)
    with pytest.raises(ReplicaError, match=r"replica bad did not start, exit status 1.*no recorded answers"):
        await provider.start()
    assert children() == before


async def test_starting_twice_is_refused() -> None:
    provider = EmulatedProvider([spec("a")])
    await provider.start()
    try:
        with pytest.raises(ReplicaError, match="already running"):
            await provider.start()
    finally:
        await provider.stop()


async def test_a_cancelled_start_leaves_no_process() -> None:
    before = children()
    provider = EmulatedProvider([spec("a"), spec("b")])
    task = asyncio.create_task(provider.start())
    while children() == before:
        await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert children() == before


async def test_a_replica_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swarmx.providers.emulated.provider.STOP_PATIENCE_S", 0.2)
    before = children()
    provider = EmulatedProvider([spec("a")])
    await provider.start()
    (pid,) = children() - before
    os.kill(pid, signal.SIGSTOP)
    await provider.stop()
    assert children() == before


async def test_a_replica_that_is_gone_is_an_error_in_reports() -> None:
    before = children()
    provider = EmulatedProvider([spec("a")])
    await provider.start()
    try:
        (pid,) = children() - before
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ReplicaError, match="does not answer"):
            await provider.reports()
    finally:
        await provider.stop()


async def test_replicas_end_when_their_parent_is_killed() -> None:
    script = (
        "import asyncio, json, os\n"
        "from swarmx.core.engine import EngineProfile\n"
        "from swarmx.providers.emulated.provider import EmulatedProvider, EmulatedSpec\n"
        "profile = EngineProfile(model='m', device='d', step_base_s=1.0, max_batch=1)\n"
        "spec = EmulatedSpec(replica_id='a', model='m', kind='image', device='d', profile=profile)\n"
        "async def main():\n"
        "    await EmulatedProvider([spec]).start()\n"
        "    print(open(f'/proc/self/task/{os.getpid()}/children').read(), flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE)
    assert parent.stdout is not None
    (orphan,) = map(int, (await parent.stdout.readline()).split())
    assert alive(orphan)
    parent.kill()
    await parent.wait()
    while alive(orphan):
        await asyncio.sleep(0.01)


async def test_the_process_says_what_is_wrong_with_its_profile() -> None:
    options = ["--model", "m", "--device", "d", "--kind", "image", "--profile-json", json.dumps({"step_base_s": "x"})]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "swarmx.providers.emulated", *options, stderr=asyncio.subprocess.PIPE
    )
    _, stderr = await process.communicate()
    assert process.returncode == 1
    assert b"m on d: Expected `float`, got `str`" in stderr


async def test_reports_and_reset_cover_replicas_that_were_deployed_and_no_others() -> None:
    groups = {"images": EmulatedGroup(profile=PROFILE, start_s=0.0)}
    provider = EmulatedProvider([spec("a")], groups=groups, time_scale=4.0)
    try:
        await provider.start()
        await provider.deploy("b", GROUP)
        assert set(await provider.reports()) == {"a", "b"}
        await provider.reset()
        await provider.retire("a")
        assert set(await provider.reports()) == {"b"}
    finally:
        await provider.stop()


async def test_reports_do_not_wait_for_a_replica_that_still_loads() -> None:
    before = children()
    groups = {"images": EmulatedGroup(profile=PROFILE, fault="hang")}
    provider = EmulatedProvider([spec("a")], groups=groups, time_scale=4.0)
    try:
        await provider.start()
        task = asyncio.create_task(provider.deploy("b", GROUP))
        while len(children() - before) < 2:
            await asyncio.sleep(0.005)
        assert set(await provider.reports()) == {"a"}
        await provider.reset()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert len(children() - before) == 1
    finally:
        await provider.stop()


async def test_a_replica_loads_as_long_as_its_group_says_on_the_scaled_clock() -> None:
    loop = asyncio.get_running_loop()
    groups = {"images": EmulatedGroup(profile=PROFILE, start_s=6.0)}
    provider = EmulatedProvider([], groups=groups, time_scale=4.0)
    try:
        before_s = loop.time()
        replica = await provider.deploy("a", GROUP)
        assert loop.time() - before_s >= 1.5
        assert replica.profile.step_base_s == pytest.approx(0.05)
    finally:
        await provider.stop()


async def test_a_replica_that_loads_for_ever_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swarmx.providers.emulated.provider.START_DEADLINE_S", 0.5)
    before = children()
    provider = EmulatedProvider([], groups={"images": EmulatedGroup(profile=PROFILE, fault="hang", start_s=2.0)})
    with pytest.raises(ReplicaError, match=r"replica a was not up within 2 s"):
        await provider.deploy("a", GROUP)
    assert children() == before


async def test_a_replica_that_loads_ends_when_its_parent_is_killed() -> None:
    options = ["--model", "m", "--device", "d", "--kind", "image", "--profile-json", json.dumps({"step_base_s": 1.0})]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "swarmx.providers.emulated", *options, "--fault", "hang", "--exit-with-parent"),
        stdin=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    process.stdin.close()
    assert await process.wait() == 0
