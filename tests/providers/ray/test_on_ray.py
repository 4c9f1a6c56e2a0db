"""Replicas on three nodes of a real Ray: what every provider must do, and what only this one does."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from swarmx.core.engine import EngineProfile
from swarmx.core.errors import ReplicaError
from swarmx.core.messages import DrainNoticed, Message, SignalReported
from swarmx.providers.emulated.provider import EmulatedGroup, EmulatedSpec, arguments, loading
from swarmx.providers.ray.provider import RayGroup, RayProvider
from swarmx.providers.ray.wire import Engine, Place
from swarmx.runtime.clock import WallClock
from tests.contract import test_providers as contract
from tests.contract.test_providers import Subject, a_group, healthy
from tests.e2e.fleet import Http, Server, launch
from tests.providers.ray.conftest import HAS_RAY, NO_RAY, Nodes

pytestmark = [
    pytest.mark.skipif(not HAS_RAY, reason=NO_RAY),
    pytest.mark.process,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),
]

PATIENCE_S = 240.0  # an actor takes seconds to start, and many where the machine is busy
MARK = os.getpid()  # the seed of all engines of this run tells them from those of others
PROFILE = EngineProfile(model="m", device="l40s", step_base_s=0.2, max_batch=1)


def engine(**about: Any) -> Engine:
    spec = EmulatedSpec(replica_id="", model="m", kind="image", device="l40s", profile=PROFILE)
    group = EmulatedGroup(profile=PROFILE, start_s=1.0, **about)
    argv = (
        "{python}",
        "-m",
        "swarmx.providers.emulated",
        *arguments(spec, time_scale=10.0, seed=MARK),
        *loading(group),
    )
    return Engine(argv=argv, start_s=PATIENCE_S)


test_it_answers_until_it_is_retired = (
    contract.test_a_deployed_replica_is_what_its_group_says_and_answers_until_it_is_retired
)
test_the_name_of_one_that_was_killed_is_free = contract.test_one_that_was_killed_can_be_retired_and_its_name_used_again
test_a_deploy_that_is_cancelled = contract.test_a_deploy_that_is_cancelled_leaves_nothing_running
test_one_that_dies_at_its_start = (
    contract.test_one_that_dies_at_its_start_is_an_error_with_its_last_words_and_leaves_nothing
)
test_an_unknown_group = contract.test_a_group_that_it_does_not_know_is_refused_with_those_it_knows

SOUND = a_group("sound", "emulated", PROFILE.scaled(10.0), kind="image")


@dataclass(slots=True)
class Heard:
    """A provider in a namespace, and all that it says."""

    provider: RayProvider
    messages: list[Message] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def of(self, kind: type) -> list[Any]:
        return [message for message in self.messages if isinstance(message, kind)]


def heard(nodes: Nodes, namespace: str, *, place: Place | None = None, **about: Any) -> Heard:
    messages: list[Message] = []
    lost: list[str] = []
    place = place or Place(resources={"CPU": 0.5})
    provider = RayProvider(
        address=nodes.address,
        namespace=namespace,
        groups={
            "sound": RayGroup(engine=about.pop("engine", engine()), place=place),
            "broken": RayGroup(engine=engine(fault="exit"), place=place),
        },
        clock=WallClock(),
        post=messages.append,
        on_lost=lost.append,
        **about,
    )
    return Heard(provider=provider, messages=messages, lost=lost)


def engines() -> set[int]:
    """The processes that are replicas of this run, whoever started them."""
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                line = (folder / "cmdline").read_bytes().split(b"\0")
                state = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0]
            except OSError:
                continue
            if b"swarmx.providers.emulated" in line and str(MARK).encode() in line and state != "Z":
                found.add(int(folder.name))
    return found


async def until(holds: Callable[[], Any], *, within_s: float = PATIENCE_S) -> Any:
    ends_s = time.monotonic() + within_s
    while not (found := holds()):
        assert time.monotonic() < ends_s, f"not so after {within_s} s"
        await asyncio.sleep(0.1)
    return found


@pytest.fixture
async def subject(nodes: Nodes) -> AsyncIterator[Subject]:
    made = heard(nodes, "contract")
    broken = msgspec.structs.replace(SOUND, group_id="broken")
    yield Subject(provider=made.provider, sound=SOUND, broken=broken, running=engines)
    await made.provider.stop()
    assert engines() == set()


async def test_it_goes_where_its_labels_say_and_is_watched_from_beside(nodes: Nodes) -> None:
    import ray

    one = heard(nodes, "labels", place=Place(resources={"slots": 1.0}, labels={"place": "b"}))
    try:
        await one.provider.start()
        await one.provider.deploy("a", SOUND)
        assert one.provider._standing["a"].node_id == nodes.workers["b"].node_id
        await until(lambda: one.of(SignalReported))
        assert one.of(SignalReported)[-1].running == 0
    finally:
        await one.provider.stop()
    nowhere = heard(nodes, "labels", place=Place(labels={"place": "moon"}))
    try:
        with pytest.raises(ReplicaError, match="none of the 3 nodes has the labels"):
            await nowhere.provider.deploy("a", SOUND)
    finally:
        await nowhere.provider.stop()
    assert not ray.is_initialized()  # this process was never connected


async def test_the_next_life_takes_over_what_stands_and_ends_what_other_settings_started(nodes: Nodes) -> None:
    first = heard(nodes, "lives", kept=True)
    before = engines()
    replica = await first.provider.deploy("a", SOUND)
    token = first.provider.token_of("a")
    await first.provider.stop()
    second = heard(nodes, "lives", kept=True)
    assert [found.url for found in await second.provider.start()] == [replica.url]
    assert (second.provider.token_of("a"), second.provider.group_of("a")) == (token, "sound")
    with pytest.raises(ReplicaError, match="running already"):
        await second.provider.deploy("a", SOUND)
    assert len(engines() - before) == 1
    third = heard(nodes, "lives")  # a second gateway that does not look, in the same namespace
    with pytest.raises(ReplicaError, match="running already"):
        await third.provider.deploy("a", SOUND)
    assert await healthy(replica.url)
    await third.provider.stop()
    await second.provider.stop()
    other = msgspec.structs.replace(engine(), start_s=PATIENCE_S + 1.0)
    fourth = heard(nodes, "lives", engine=other)
    assert await fourth.provider.start() == []
    assert engines() == before
    await fourth.provider.stop()


async def test_a_link_that_is_killed_is_made_anew_and_replicas_do_not_notice(nodes: Nodes) -> None:
    one = heard(nodes, "links")
    try:
        replica = await one.provider.deploy("a", SOUND)
        process = one.provider._line._process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        await until(lambda: not one.provider._line.is_open)
        assert await healthy(replica.url)
        await until(lambda: one.provider._line.is_open)
        assert one.lost == []
        for pid in engines():
            os.kill(pid, signal.SIGKILL)
        assert await until(lambda: one.lost) == ["a"]
    finally:
        await one.provider.stop()


async def test_a_replica_that_nobody_asks_ends_by_itself(nodes: Nodes) -> None:
    one = heard(nodes, "orphans", orphan_s=1.0)
    try:
        await one.provider.deploy("a", SOUND)
        assert await until(lambda: one.lost) == ["a"]
        await until(lambda: engines() == set())
    finally:
        await one.provider.stop()


async def test_a_cluster_that_is_not_there_is_an_error_with_its_address() -> None:
    one = heard(Nodes(cluster=None, address="127.0.0.1:1", workers={}), "none")
    with pytest.raises(ReplicaError, match=r"there is no link to Ray: .*127\.0\.0\.1:1"):
        await one.provider.start()
    await one.provider.stop()


GATEWAY = {
    "emulation": {"time_scale": 20.0, "seed": MARK},
    "watch": {"every_s": 0.5, "timeout_s": 20.0, "failures": 20},
    "scaler": {"every_s": 0.5, "start_floor_s": 200.0},
    "router": {"queue_timeout_s": 240.0, "max_attempts": 6},
    "elastic": [
        {"model": "qwen3-8b", "device": "l40s", "size_class": "8b", "start_s": 20.0, "min": 2, "max": 2, "limit": 3}
    ],
}
BODY = {"model": "qwen3-8b", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 16}


def up(nodes: Nodes, folder: Path) -> Server:
    ray = {"address": nodes.address, "namespace": "gateway"}
    server = launch({**GATEWAY, "ray": ray}, folder)
    assert server.process.stdout is not None
    line = server.process.stdout.readline()
    assert line, server.log
    server.url = msgspec.json.decode(line)["url"]
    return server


async def ready(client: Http) -> dict[str, str]:
    rows = await client.replicas()
    return {name: row["url"] for name, row in rows.items() if row["state"] == "ready"}


async def have(client: Http, holds: Callable[[dict[str, str]], bool]) -> dict[str, str]:
    ends_s = time.monotonic() + PATIENCE_S
    while not holds(found := await ready(client)):
        assert time.monotonic() < ends_s, (found, await client.replicas())
        await asyncio.sleep(0.2)
    return found


class Calls:
    """A call every 0.2 s, until it is ended."""

    def __init__(self, client: Http) -> None:
        self.statuses: list[int] = []
        self._client = client
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            try:
                while True:
                    group.create_task(self._one())
                    await asyncio.sleep(0.2)
            except asyncio.CancelledError:
                pass

    async def _one(self) -> None:
        self.statuses.append((await self._client.post("/v1/chat/completions", json=BODY)).status)

    async def end(self) -> list[int]:
        self._task.cancel()
        await asyncio.wait((self._task,))
        return self.statuses


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for pid in engines():
        os.kill(pid, signal.SIGKILL)


def where(nodes: Nodes, replica_ids: Iterable[str]) -> dict[str, str]:
    """The nodes of a gateway's replicas, asked of their actors by name as anybody can."""
    program = (
        "import json, ray, sys; ray.init(address=sys.argv[1], namespace='gateway', log_to_driver=False);"
        "found = {n: ray.get_actor('replica:' + n).standing.remote() for n in sys.argv[2:]};"
        "print(json.dumps({n: json.loads(ray.get(s))['node_id'] for n, s in found.items()}))"
    )
    command = [sys.executable, "-c", program, nodes.address, *replica_ids]
    found = subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE_S)
    placed: dict[str, str] = msgspec.json.decode(found.stdout.splitlines()[-1])
    return placed


def notify(nodes: Nodes, node_id: str, seconds: float) -> None:
    """What a cloud's spot notice becomes: `ray drain-node`, with a deadline."""
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", nodes.address),
        *("--node-id", node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"),
        *("--deadline-remaining-seconds", str(int(seconds))),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE_S)


async def test_a_notice_comes_with_its_deadline_and_a_node_that_is_gone_is_a_loss(nodes: Nodes) -> None:
    node = nodes.add("noticed")
    one = heard(nodes, "notices", place=Place(resources={"CPU": 0.5}, labels={"place": "noticed"}))
    try:
        await one.provider.deploy("a", SOUND)
        sent_s = WallClock().now_s()
        await asyncio.to_thread(notify, nodes, node.node_id, 100.0)
        told = await until(lambda: one.of(DrainNoticed))
        assert told[0].replica_id == "a"
        assert sent_s + 99.0 < told[0].deadline_at_s < WallClock().now_s() + 101.0
        with pytest.raises(ReplicaError, match="none of the 3 nodes has the labels"):
            await one.provider.deploy("b", SOUND)
        await asyncio.to_thread(nodes.remove, "noticed")
        assert await until(lambda: one.lost) == ["a"]
    finally:
        await one.provider.stop()


async def test_a_gateway_survives_its_own_death_a_notice_and_the_loss_of_a_node(nodes: Nodes, folder: Path) -> None:
    server = await asyncio.to_thread(up, nodes, folder)
    async with server.http() as client:
        first = await have(client, lambda found: len(found) == 2)
        assert (await client.post("/v1/chat/completions", json=BODY)).status == 200
    server.kill()
    assert len(engines()) == 2
    server = await asyncio.to_thread(up, nodes, folder)
    try:
        async with server.http() as client:
            assert await have(client, lambda found: len(found) == 2) == first
            assert len(engines()) == 2
            calls = Calls(client)
            leaving = (await asyncio.to_thread(where, nodes, first)).popitem()[1]
            nodes.add("spare")
            await asyncio.to_thread(notify, nodes, leaving, 600.0)
            second = await have(client, lambda found: len(found) == 2 and found.keys() != first.keys())
            await have(client, lambda found: len(found) == 2 and leaving not in where(nodes, found).values())
            second = await ready(client)
            dying = (await asyncio.to_thread(where, nodes, second)).popitem()[1]
            await asyncio.to_thread(nodes.remove_id, dying)
            await have(client, lambda found: len(found) == 2 and found.keys() != second.keys())
            statuses = await calls.end()
            assert set(statuses) == {200}, statuses
    finally:
        assert await asyncio.to_thread(server.stop) == 0
    assert engines() == set()
