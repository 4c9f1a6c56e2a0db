"""A fleet with its router and watch over one server on loopback that answers for all replicas."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from aiohttp import web

from swarmx.agents.router import RouterAgent
from swarmx.agents.router_settings import RouterSettings
from swarmx.core.actions import Action, Cancel, Cordon, Deploy, Dispatch, Drain, Refuse
from swarmx.core.control import Actor
from swarmx.core.messages import AlertRaised, Message, ReplicaChanged
from swarmx.core.nouns import Replica, ReplicaGroup
from swarmx.runtime.clock import WallClock
from swarmx.runtime.fleet import SCALER, Fleet
from swarmx.runtime.journal import MemoryJournal
from swarmx.runtime.live import LiveShell
from swarmx.runtime.switchboard import Switchboard
from swarmx.runtime.watch import Watch
from tests.agents.worlds import FAST, a_replica
from tests.e2e.fleet import DEADLINE_S
from tests.runtime.audits import MemoryAudit

ANN = Actor(type="key", name="ann", role="operator")
GROUP = ReplicaGroup(
    group_id="m-fast",
    model="m",
    kind="llm",
    device="fast",
    provider="here",
    profile=FAST,
    min_replicas=0,
    max_replicas=4,
    limit=4,
    start_s=1.0,
)


class Machine:
    """One server on loopback that answers for all replicas, but for those in `down`."""

    def __init__(self) -> None:
        self.down: set[str] = set()
        self.asked: Counter[str] = Counter()
        self.url = ""

    async def metrics(self, request: web.Request) -> web.Response:
        replica_id = request.match_info["id"]
        self.asked[replica_id] += 1
        return web.Response(status=500 if replica_id in self.down else 404)


class Provider:
    """An ElasticProvider on that machine. `gate` holds starts up, `error` lets them and ends fail."""

    def __init__(self, machine: Machine, said: list[str]) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.running: set[str] = set()
        self._machine = machine
        self._said = said

    async def start(self) -> Sequence[Replica]:
        return ()

    async def stop(self) -> None:
        self.running.clear()

    async def deploy(self, replica_id: str, group: ReplicaGroup) -> Replica:
        self._said.append(f"deploy {replica_id}")
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        self.running.add(replica_id)
        return a_replica(replica_id, url=f"{self._machine.url}/{replica_id}")

    async def retire(self, replica_id: str) -> None:
        self._said.append(f"retire {replica_id}")
        self.running.discard(replica_id)
        if self.error is not None:
            raise self.error


class Scene:
    """A router, its shell, a watch and a fleet; `said` is what happened, in order.

    `elsewhere` are calls that another router has on a replica.
    """

    def __init__(self, machine: Machine, **settings: Any) -> None:
        self.said: list[str] = []
        self.announced: list[Replica] = []
        self.elsewhere: dict[str, int] = {}
        self.states: dict[str, str] = {}
        self.actions: list[Action] = []
        self.started: list[tuple[str, float]] = []
        self.machine = machine
        self.provider = Provider(machine, self.said)
        self.audit = MemoryAudit()
        self.router = RouterAgent(RouterSettings(policy="least_outstanding", **settings))
        self.clock = WallClock()
        switchboard = Switchboard([self.router], epoch=1, journal=MemoryJournal(limit=0))
        perform = self.actions.append
        self.shell = LiveShell(switchboard, self.clock, {Dispatch: perform, Cancel: perform, Refuse: perform})
        self.watch = Watch(
            self.shell.post,
            self.clock,
            every_s=0.02,
            timeout_s=5.0,
            failures=2,
            state_when_up=lambda replica_id: self.fleet.state_when_up(replica_id),
        )
        self.fleet = Fleet(
            providers={"here": self.provider},
            groups=[GROUP],
            watch=self.watch,
            post=self.shell.post,
            clock=self.clock,
            audit=self.audit,
            in_flight=lambda replica_id: self.router.in_flight(replica_id) + self.elsewhere.get(replica_id, 0),
            on_started=lambda group_id, seconds: self.started.append((group_id, seconds)),
        )
        switchboard.observers += [self.fleet.observe, self.note]

    def note(self, message: Message, now_s: float) -> None:
        if isinstance(message, ReplicaChanged):
            self.states[message.replica.replica_id] = message.state
            self.announced.append(message.replica)
            self.said.append(f"{message.state} {message.replica.replica_id}")
        elif isinstance(message, AlertRaised):
            self.said.append(f"{message.kind} {message.subject}")

    def deploy(self, replica_id: str) -> None:
        self.fleet.perform_deploy(Deploy(replica_id=replica_id, group_id="m-fast"))

    def drain(self, replica_id: str, *, within_s: float = 60.0) -> None:
        self.fleet.perform_drain(Drain(replica_id=replica_id, deadline_at_s=self.clock.now_s() + within_s))

    def cordon(self, replica_id: str, cordoned: bool = True) -> None:
        self.fleet.begin(Cordon(replica_id=replica_id, cordoned=cordoned), actor=SCALER, via="agent")

    async def has_static(self, replica_id: str) -> None:
        """A replica that somebody else runs, ready."""
        self.watch.add(a_replica(replica_id, url=f"{self.machine.url}/{replica_id}"))
        await self.becomes(replica_id, "ready")

    async def has(self, *replica_ids: str) -> None:
        """Deployed replicas, ready."""
        for replica_id in replica_ids:
            self.deploy(replica_id)
            await self.becomes(replica_id, "ready")
        await self.closed(len(replica_ids))

    async def becomes(self, replica_id: str, state: str) -> None:
        await until(lambda: self.states.get(replica_id) == state, lambda: self.said)

    async def closed(self, count: int = 1) -> list[tuple[str, Any]]:
        """Wait for the outcomes; returns the last `count` of them."""
        await until(lambda: len(self.audit.outcomes()) >= count, lambda: self.audit.records)
        return self.audit.outcomes()[-count:]

    def dispatched(self) -> list[str]:
        return [action.replica_id for action in self.actions if isinstance(action, Dispatch)]


async def until(holds: Callable[[], bool], story: Callable[[], Any] = lambda: "") -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < end_s, f"not so after {DEADLINE_S} s: {story()}"
        await asyncio.sleep(0.005)
