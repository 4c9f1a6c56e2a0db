"""The fleet over real replica processes under load: they come, go and die, and no call is lost."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec
import pytest

from swarmx.agents.router import RouterAgent
from swarmx.agents.router_settings import RouterSettings
from swarmx.core.actions import Cancel, Deploy, Dispatch, Drain, Refuse
from swarmx.core.engine import profiles
from swarmx.core.nouns import ReplicaGroup
from swarmx.core.records import CallRecord
from swarmx.neural.empirical import EmpiricalForecaster
from swarmx.providers.emulated.provider import EmulatedGroup, EmulatedProvider
from swarmx.runtime.calls import CallService
from swarmx.runtime.clock import WallClock
from swarmx.runtime.fleet import Fleet
from swarmx.runtime.fleet_book import FleetBook
from swarmx.runtime.journal import MemoryJournal
from swarmx.runtime.live import LiveShell
from swarmx.runtime.switchboard import Switchboard
from swarmx.runtime.upstream import Upstream
from swarmx.runtime.watch import Watch
from tests.agents.worlds import PROMPT, a_call
from tests.e2e.fleet import children, until
from tests.runtime.audits import MemoryAudit

pytestmark = pytest.mark.process

TIME_SCALE = 20.0
PROFILE = profiles()["qwen3-8b", "l40s"]
BODY = msgspec.json.encode({"model": "m", "max_tokens": 400, "messages": [{"role": "user", "content": "Say much."}]})
STREAMED = BODY.replace(b"{", b'{"stream":true,', 1)


def group(group_id: str) -> ReplicaGroup:
    return ReplicaGroup(
        group_id=group_id,
        model="m",
        kind="llm",
        device="l40s",
        provider="emulated",
        profile=PROFILE.scaled(TIME_SCALE),
        min_replicas=0,
        max_replicas=4,
        limit=4,
        start_s=1.0,
    )


class Scene:
    """Router, call service, watch and fleet as they run in a server, over emulated replicas."""

    def __init__(self) -> None:
        self.records: list[CallRecord] = []
        self.audit = MemoryAudit()
        self.router = RouterAgent(RouterSettings(policy="round_robin"))
        self.provider = EmulatedProvider(
            [],
            groups={
                "m": EmulatedGroup(profile=PROFILE, size_class="8b", start_s=2.0),
                "hangs": EmulatedGroup(profile=PROFILE, fault="hang"),
                "dies": EmulatedGroup(profile=PROFILE, fault="exit"),
            },
            time_scale=TIME_SCALE,
        )
        self.clock = WallClock()
        self.book = FleetBook(self.clock, elastic=lambda replica_id: self.fleet.is_elastic(replica_id))
        self.upstream = Upstream()
        switchboard = Switchboard([self.router], epoch=1, journal=MemoryJournal(limit=0))
        self.calls = CallService(
            post=lambda message: self.shell.post(message),
            clock=self.clock,
            forecaster=EmpiricalForecaster(),
            upstream=self.upstream,
            book=self.book,
            on_record=self.records.append,
        )
        self.shell = LiveShell(
            switchboard,
            self.clock,
            {
                Dispatch: self.calls.perform_dispatch,
                Cancel: self.calls.perform_cancel,
                Refuse: self.calls.perform_refuse,
            },
        )
        self.watch = Watch(
            self.shell.post,
            self.clock,
            every_s=0.1,
            timeout_s=20.0,
            failures=2,
            state_when_up=lambda replica_id: self.fleet.state_when_up(replica_id),
        )
        self.fleet = Fleet(
            providers={"emulated": self.provider},
            groups=[group("m"), group("hangs"), group("dies")],
            watch=self.watch,
            post=self.shell.post,
            clock=self.clock,
            audit=self.audit,
            in_flight=self.router.in_flight,
        )
        switchboard.observers += [self.book.observe, self.calls.observe, self.fleet.observe]
        self._asked: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        await self.fleet.close()
        await self.watch.close()
        await self.provider.stop()
        await self.upstream.close()
        self.shell.close()

    def deploy(self, replica_id: str, group_id: str = "m") -> None:
        self.fleet.perform_deploy(Deploy(replica_id=replica_id, group_id=group_id))

    def drain(self, replica_id: str, *, within_s: float) -> None:
        self.fleet.perform_drain(Drain(replica_id=replica_id, deadline_at_s=self.clock.now_s() + within_s))

    async def states(self) -> dict[str, str]:
        return {row.replica_id: row.state for row in self.book.statuses()}

    async def become(self, **states: str) -> None:
        await until(self.states, lambda found: states.items() <= found.items())

    def ask(self, call_id: str, *, stream: bool) -> None:
        """Have a call answered in the background; its record tells how it went."""

        async def whole() -> None:
            await self.calls.answer(a_call(call_id), PROMPT, BODY)

        async def streamed() -> None:
            async for _ in self.calls.stream(a_call(call_id, stream=True), PROMPT, STREAMED):
                pass

        work: Callable[[], Awaitable[None]] = streamed if stream else whole
        task = asyncio.ensure_future(work())
        self._asked.add(task)

    async def answered(self) -> list[CallRecord]:
        """The records of everything that was asked, once all of it is over."""
        await asyncio.gather(*self._asked)
        return self.records

    def busy(self, replica_id: str) -> Callable[[], Awaitable[bool]]:
        async def has_calls() -> bool:
            return self.router.in_flight(replica_id) > 0

        return has_calls

    async def outcomes(self) -> list[tuple[str, str | None]]:
        return list(self.audit.outcomes())


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    before = set(children(os.getpid()))
    built = Scene()
    yield built
    await built.close()
    built.router.validate()
    built.audit.check()
    assert set(children(os.getpid())) == before


async def load(scene: Scene, stop: asyncio.Event) -> None:
    """Two calls every few milliseconds, one of them streamed, as long as not too many wait: the machine may be slow."""
    number = 0
    while not stop.is_set():
        if number < len(scene.records) // 2 + 32:
            scene.ask(f"{number}-whole", stream=False)
            scene.ask(f"{number}-stream", stream=True)
            number += 1
        await asyncio.sleep(0.03)


async def test_replicas_that_come_and_go_under_load_lose_no_call(scene: Scene) -> None:
    scene.deploy("a")
    await scene.become(a="ready")
    stop = asyncio.Event()
    loading = asyncio.create_task(load(scene, stop))
    scene.deploy("b")
    await scene.become(b="ready")
    await until(scene.busy("b"), bool)
    await until(scene.busy("a"), bool)
    scene.drain("a", within_s=60.0)
    await scene.become(a="gone")
    await until(scene.outcomes, lambda found: ("drain", "applied") in found)
    stop.set()
    await loading
    records = await scene.answered()
    assert {record.state for record in records} == {"finished"}
    assert {record.attempts for record in records} == {1}
    assert set(Counter(record.replica_id for record in records)) == {"a", "b"}


async def test_a_deadline_moves_the_calls_that_can_move(scene: Scene) -> None:
    scene.deploy("a")
    scene.deploy("b")
    await scene.become(a="ready", b="ready")
    for number in range(8):
        scene.ask(str(number), stream=False)
    await until(scene.busy("a"), bool)
    scene.drain("a", within_s=0.0)
    records = await scene.answered()
    assert {record.state for record in records} == {"finished"}
    assert {record.replica_id for record in records} == {"b"}
    assert {record.attempts for record in records} == {1, 2}


async def test_a_replica_that_is_killed_is_replaced_without_losing_a_call(scene: Scene) -> None:
    before = set(children(os.getpid()))
    scene.deploy("a")
    await scene.become(a="ready")
    (pid,) = set(children(os.getpid())) - before
    scene.deploy("b")
    await scene.become(b="ready")
    for number in range(8):
        scene.ask(str(number), stream=False)
    await until(scene.busy("a"), bool)
    os.kill(pid, signal.SIGKILL)
    await until(scene.outcomes, lambda found: ("retire", "applied") in found)
    assert (await scene.states())["a"] == "gone"
    assert not scene.fleet.is_elastic("a")
    records = await scene.answered()
    assert {record.state for record in records} == {"finished"}
    assert max(record.attempts for record in records) == 2
    scene.deploy("a")
    await scene.become(a="ready")


async def test_a_replica_that_never_becomes_ready_is_called_off_and_leaves_no_process(scene: Scene) -> None:
    before = set(children(os.getpid()))
    scene.deploy("a", "hangs")

    async def processes() -> set[int]:
        return set(children(os.getpid())) - before

    await until(processes, bool)
    assert (await scene.states())["a"] == "starting"
    scene.drain("a", within_s=60.0)
    await until(scene.outcomes, lambda found: len(found) == 2)
    assert await scene.outcomes() == [("deploy", "interrupted"), ("drain", "applied")]
    assert (await scene.states())["a"] == "gone"
    assert await processes() == set()


async def test_a_replica_that_dies_at_its_start_is_gone_and_says_why(scene: Scene) -> None:
    scene.deploy("a", "dies")
    await until(scene.outcomes, lambda found: found == [("deploy", "failed")])
    assert "replica a did not start, exit status 1" in scene.audit.last().detail
    assert "told to fail at its start" in scene.audit.last().detail
    await scene.become(a="gone")


async def test_the_list_of_replicas_tells_which_are_elastic_and_has_no_address_before_there_is_one(
    scene: Scene,
) -> None:
    scene.deploy("a")
    await scene.become(a="starting")
    assert scene.book.statuses()[0].url == ""
    await scene.become(a="ready")
    (row,) = scene.book.statuses()
    assert (row.elastic, row.provider, row.emulated) == (True, "emulated", True)
    assert row.url.startswith("http://127.0.0.1:")
