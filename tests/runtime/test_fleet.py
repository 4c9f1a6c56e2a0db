"""The fleet: what is decided about replicas happens, in order, audited, and without losing a call."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
from aiohttp import web

from swarmx.agents.router import RouterAgent
from swarmx.agents.router_settings import RouterSettings
from swarmx.core.actions import Action, Cancel, Cordon, Deploy, Dispatch, Drain, Refuse
from swarmx.core.control import Actor
from swarmx.core.errors import ConfigError, ReplicaError
from swarmx.core.messages import AlertRaised, CallCancelled, Message, ReplicaChanged
from swarmx.core.nouns import Replica, ReplicaGroup
from swarmx.runtime.clock import WallClock
from swarmx.runtime.fleet import SCALER, Fleet
from swarmx.runtime.journal import MemoryJournal
from swarmx.runtime.live import LiveShell
from swarmx.runtime.switchboard import Switchboard
from swarmx.runtime.watch import Watch
from tests.agents.worlds import FAST, a_replica, failed, finished, ready
from tests.e2e.fleet import DEADLINE_S
from tests.runtime.audits import MemoryAudit

pytestmark = pytest.mark.process

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


@pytest.fixture
async def machine() -> AsyncIterator[Machine]:
    served = Machine()
    app = web.Application()
    app.router.add_get("/{id}/metrics", served.metrics)
    runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    served.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield served
    await runner.cleanup()


@pytest.fixture
async def scene(machine: Machine) -> AsyncIterator[Scene]:
    built = Scene(machine)
    yield built
    await built.fleet.close()
    await built.watch.close()
    built.shell.close()
    built.router.validate()
    built.audit.check()


async def test_a_deployed_replica_starts_after_its_intent_and_is_ready_when_it_answers(scene: Scene) -> None:
    scene.provider.gate.clear()
    scene.audit.open.clear()
    scene.deploy("a")
    await asyncio.sleep(0)
    assert scene.said == []
    scene.audit.open.set()
    await until(lambda: "deploy a" in scene.said)
    assert scene.said == ["starting a", "deploy a"]
    assert scene.audit.intents() == ["deploy"]
    assert scene.audit.outcomes() == []
    scene.provider.gate.set()
    await scene.becomes("a", "ready")
    assert await scene.closed() == [("deploy", "applied")]
    assert scene.audit.last().arguments == {"replica_id": "a", "group_id": "m-fast"}
    assert scene.audit.last().actor.name == "scaler"
    assert scene.fleet.is_elastic("a")


async def test_a_replica_that_starts_has_no_address_yet(scene: Scene) -> None:
    scene.provider.gate.clear()
    scene.deploy("a")
    await scene.becomes("a", "starting")
    (replica,) = scene.announced
    assert (replica.url, replica.model, replica.device, replica.profile) == ("", "m", "fast", FAST)


async def test_the_seconds_of_a_start_are_told_with_its_group(scene: Scene) -> None:
    scene.provider.gate.clear()
    scene.deploy("a")
    await until(lambda: "deploy a" in scene.said)
    before_s = scene.clock.now_s()
    await asyncio.sleep(0.05)
    least_s = scene.clock.now_s() - before_s
    scene.provider.gate.set()
    await scene.becomes("a", "ready")
    ((group_id, seconds),) = scene.started
    assert group_id == "m-fast"
    assert seconds >= least_s


@pytest.mark.parametrize("error", [ReplicaError("no memory"), RuntimeError("a bug")])
async def test_a_replica_that_does_not_start_is_gone_with_an_alert_and_its_name_is_free(
    scene: Scene, error: Exception
) -> None:
    scene.provider.error = error
    scene.deploy("a")
    assert await scene.closed() == [("deploy", "failed")]
    assert str(error) in scene.audit.last().detail
    await until(lambda: scene.said[-1] == "replica_failed a")
    assert scene.said == ["starting a", "deploy a", "gone a", "replica_failed a"]
    assert scene.started == []
    scene.provider.error = None
    await scene.has("a")


async def test_a_deploy_that_cannot_be_announced_does_not_happen(scene: Scene) -> None:
    scene.audit.broken = True
    scene.deploy("a")
    await until(lambda: scene.said == ["gone a", "replica_failed a"])
    assert not scene.fleet.is_elastic("a")
    scene.audit.broken = False
    await scene.has("a")


async def test_a_replica_that_an_earlier_life_deployed_is_taken_over_and_ended_like_our_own(scene: Scene) -> None:
    replica = a_replica("m-fast-7", url=f"{scene.machine.url}/m-fast-7")
    scene.provider.running.add("m-fast-7")
    scene.fleet.adopt(replica, GROUP)
    await scene.becomes("m-fast-7", "ready")
    assert scene.fleet.is_elastic("m-fast-7")
    scene.deploy("m-fast-7")
    assert await scene.closed() == [("deploy", "failed")]  # it is there already
    scene.drain("m-fast-7")
    await scene.becomes("m-fast-7", "gone")
    await until(lambda: not scene.provider.running, lambda: scene.said)
    assert scene.started == []


async def test_a_replica_of_which_somebody_knows_that_it_is_lost_is_gone_at_once_and_its_remains_are_ended(
    scene: Scene,
) -> None:
    await scene.has("a")
    scene.fleet.lost("a")
    assert scene.states["a"] == "gone"
    scene.fleet.lost("a")  # said twice, and of one that is not known
    scene.fleet.lost("unknown")
    await scene.closed(2)
    assert scene.said.count("gone a") == scene.said.count("retire a") == 1
    await scene.has_static("a")  # the name is free again


async def test_a_drain_that_cannot_be_announced_stays_undone(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    await scene.has("a")
    scene.audit.broken = True
    scene.drain("a")
    await until(lambda: "drain a is not done" in caplog.text)
    assert scene.states["a"] == "ready"
    assert scene.provider.running == {"a"}
    scene.audit.broken = False
    scene.drain("a")
    await scene.becomes("a", "gone")


@pytest.mark.parametrize(
    ("action", "problem"),
    [
        (Deploy(replica_id="a", group_id="m-fast"), "replica a is there already"),
        (Deploy(replica_id="fixed", group_id="m-fast"), "replica fixed is there already"),
        (Deploy(replica_id="b", group_id="other"), "there is no group 'other', only: m-fast"),
        (Drain(replica_id="b", deadline_at_s=0.0), "there is no replica 'b'"),
        (Cordon(replica_id="b", cordoned=True), "there is no replica 'b'"),
    ],
    ids=["taken", "taken by another's", "unknown group", "unknown to drain", "unknown to cordon"],
)
async def test_what_cannot_be_done_is_a_failed_outcome_and_changes_nothing(
    scene: Scene, action: Deploy | Drain | Cordon, problem: str
) -> None:
    await scene.has_static("fixed")
    await scene.has("a")
    before = list(scene.said)
    scene.fleet.begin(action, actor=ANN, via="cli")
    assert (await scene.closed(2))[-1] == (type(action).__name__.lower(), "failed")
    assert scene.audit.last().detail == problem
    assert scene.said == before


@pytest.mark.parametrize("again", [Drain(replica_id="a", deadline_at_s=0.0), Cordon(replica_id="a", cordoned=False)])
async def test_a_replica_that_is_being_drained_is_left_alone(scene: Scene, again: Drain | Cordon) -> None:
    await scene.has("a")
    scene.shell.post(ready("c"))
    scene.drain("a")
    await scene.becomes("a", "draining")
    scene.fleet.begin(again, actor=ANN, via="cli")
    await scene.closed(2)
    assert (scene.audit.last().outcome, scene.audit.last().detail) == ("failed", "replica a is being ended already")
    assert scene.states["a"] == "draining"
    assert scene.provider.running == {"a"}


@pytest.mark.parametrize(
    "end",
    [finished("c"), failed("c", retryable=False), CallCancelled(call_id="c")],
    ids=["done", "failed", "cancelled"],
)
async def test_a_drained_replica_gets_no_calls_and_ends_once_its_last_is_over(scene: Scene, end: Message) -> None:
    await scene.has("a")
    scene.shell.post(ready("c"))
    scene.drain("a")
    await scene.becomes("a", "draining")
    scene.shell.post(ready("late"))
    assert scene.dispatched() == ["a"]
    assert scene.provider.running == {"a"}
    scene.shell.post(end)
    await scene.closed(2)
    assert scene.said[-3:] == ["draining a", "gone a", "retire a"]
    assert (scene.audit.last().tool, scene.audit.last().outcome) == ("drain", "applied")
    assert scene.audit.last().detail == "no call was left"
    assert not scene.fleet.is_elastic("a")


async def test_a_replica_that_was_ended_is_not_asked_how_it_is(scene: Scene) -> None:
    await scene.has("a")
    await scene.has_static("b")
    scene.drain("a")
    await scene.closed(2)
    asked = scene.machine.asked
    first = asked["b"]
    await until(lambda: asked["b"] > first + 2)  # what was on its way has arrived
    seen = asked["a"]
    await until(lambda: asked["b"] > first + 12)
    assert asked["a"] == seen


async def test_a_call_that_the_router_gave_up_does_not_hold_a_drain_up(machine: Machine) -> None:
    scene = Scene(machine, call_timeout_s=0.2, max_attempts=1)
    await scene.has("a")
    scene.shell.post(ready("c"))
    scene.drain("a")
    await scene.closed(2)
    assert scene.audit.last().detail == "no call was left"
    assert any(isinstance(action, Refuse) for action in scene.actions)
    await scene.watch.close()


async def test_at_the_deadline_calls_move_elsewhere_before_the_replica_ends(scene: Scene) -> None:
    await scene.has("a")
    scene.shell.post(ready("c"))
    await scene.has("b")
    scene.drain("a", within_s=0.05)
    await scene.closed(3)
    assert scene.said[-3:] == ["draining a", "gone a", "retire a"]
    assert scene.dispatched() == ["a", "b"]
    assert scene.audit.last().detail == "1 calls were left at the deadline"
    assert scene.router.in_flight("b") == 1


async def test_to_drain_a_replica_that_starts_calls_its_start_off(scene: Scene) -> None:
    scene.provider.gate.clear()
    scene.deploy("a")
    await until(lambda: "deploy a" in scene.said)
    scene.drain("a")
    assert await scene.closed(2) == [("deploy", "interrupted"), ("drain", "applied")]
    assert scene.said == ["starting a", "deploy a", "draining a", "gone a"]  # and no alert: it did not fail
    assert scene.provider.running == set()
    scene.provider.gate.set()
    await scene.has("a")


async def test_a_start_that_is_called_off_before_it_began_never_begins(scene: Scene) -> None:
    scene.audit.open.clear()
    scene.deploy("a")
    await asyncio.sleep(0)
    scene.fleet.begin(Drain(replica_id="a", deadline_at_s=0.0), actor=ANN, via="cli", intent_seq=99)
    await asyncio.sleep(0)
    scene.audit.open.set()
    await scene.becomes("a", "gone")
    await scene.closed(2)
    assert scene.said == ["draining a", "gone a"]


async def test_a_replica_of_somebody_else_that_is_drained_stays_cordoned(scene: Scene) -> None:
    await scene.has_static("a")
    assert not scene.fleet.is_elastic("a")
    scene.drain("a")
    await scene.becomes("a", "cordoned")
    assert await scene.closed() == [("drain", "applied")]
    assert scene.said[-2:] == ["draining a", "cordoned a"]
    scene.cordon("a", False)
    await scene.becomes("a", "ready")


async def test_a_cordoned_replica_gets_no_calls_until_it_is_put_back(scene: Scene) -> None:
    await scene.has("a")
    scene.cordon("a")
    await scene.becomes("a", "cordoned")
    scene.shell.post(ready("c"))
    assert scene.dispatched() == []
    scene.cordon("a", False)
    await scene.becomes("a", "ready")
    assert scene.dispatched() == ["a"]
    assert (await scene.closed(3))[1:] == [("cordon", "applied")] * 2


async def test_a_drain_overtakes_a_cordon_that_has_not_begun(scene: Scene) -> None:
    await scene.has("a")
    scene.elsewhere["a"] = 1
    scene.audit.open.clear()
    scene.cordon("a", False)
    scene.drain("a")
    scene.audit.open.set()
    await scene.becomes("a", "draining")
    assert await scene.closed(2) == [("deploy", "applied"), ("cordon", "stale")]
    assert scene.states["a"] == "draining"
    scene.elsewhere.clear()
    scene.shell.post(CallCancelled(call_id="any"))
    await scene.closed(3)


async def test_to_put_back_what_is_in_rotation_says_nothing(scene: Scene) -> None:
    await scene.has_static("a")
    before = list(scene.said)
    scene.cordon("a", False)
    assert await scene.closed() == [("cordon", "applied")]
    assert scene.said == before


async def test_a_cordoned_replica_that_blips_comes_back_cordoned(scene: Scene) -> None:
    await scene.has_static("a")
    scene.cordon("a")
    await scene.becomes("a", "cordoned")
    scene.machine.down.add("a")
    await scene.becomes("a", "gone")
    scene.machine.down.clear()
    await scene.becomes("a", "cordoned")
    assert scene.said[-2:] == ["gone a", "cordoned a"]


async def test_what_is_cordoned_while_it_does_not_answer_stays_gone_and_comes_back_cordoned(scene: Scene) -> None:
    await scene.has_static("a")
    scene.machine.down.add("a")
    await scene.becomes("a", "gone")
    scene.cordon("a")
    assert await scene.closed() == [("cordon", "applied")]
    assert scene.states["a"] == "gone"
    scene.machine.down.clear()
    await scene.becomes("a", "cordoned")


async def test_a_replica_that_is_cordoned_while_it_starts_is_never_ready(scene: Scene) -> None:
    scene.provider.gate.clear()
    scene.deploy("a")
    await until(lambda: "deploy a" in scene.said)
    scene.cordon("a")
    assert await scene.closed() == [("cordon", "applied")]
    scene.provider.gate.set()
    await scene.becomes("a", "cordoned")
    assert "ready a" not in scene.said


async def test_a_draining_replica_that_blips_comes_back_draining(scene: Scene) -> None:
    await scene.has_static("a")
    scene.elsewhere["a"] = 1
    scene.drain("a")
    await scene.becomes("a", "draining")
    scene.machine.down.add("a")
    await scene.becomes("a", "gone")
    scene.machine.down.clear()
    await scene.becomes("a", "draining")
    scene.elsewhere.clear()
    scene.shell.post(CallCancelled(call_id="any"))  # whatever happens next makes the fleet look again
    await scene.becomes("a", "cordoned")


async def test_one_that_dies_while_it_is_drained_ends_once(scene: Scene) -> None:
    await scene.has("a")
    scene.shell.post(ready("c"))
    scene.drain("a")
    await scene.becomes("a", "draining")
    scene.machine.down.add("a")
    assert (await scene.closed(2))[-1] == ("drain", "applied")
    assert scene.said[-3:] == ["draining a", "gone a", "retire a"]
    assert scene.audit.intents() == ["deploy", "drain"]


async def test_a_deployed_replica_that_stops_answering_is_ended_and_forgotten(scene: Scene) -> None:
    await scene.has("a")
    scene.machine.down.add("a")
    assert (await scene.closed(2))[-1] == ("retire", "applied")
    assert scene.said[-2:] == ["gone a", "retire a"]
    assert (scene.audit.last().actor.type, scene.audit.last().actor.name) == ("system", "fleet")
    assert not scene.fleet.is_elastic("a")
    scene.machine.down.clear()
    scene.deploy("a")
    await scene.becomes("a", "ready")


async def test_a_replica_that_answers_again_before_its_end_was_announced_lives(scene: Scene) -> None:
    await scene.has("a")
    scene.audit.open.clear()
    scene.machine.down.add("a")
    await scene.becomes("a", "gone")
    scene.machine.down.clear()
    await scene.becomes("a", "ready")
    scene.audit.open.set()
    assert (await scene.closed(2))[-1] == ("retire", "stale")
    assert scene.provider.running == {"a"}
    scene.drain("a")
    await scene.becomes("a", "gone")


async def test_a_dead_replica_whose_end_cannot_be_announced_is_still_watched(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    await scene.has("a")
    scene.audit.broken = True
    scene.machine.down.add("a")
    await until(lambda: "retire a is not done" in caplog.text)
    assert scene.provider.running == {"a"}
    scene.machine.down.clear()
    await scene.becomes("a", "ready")


async def test_a_replica_of_somebody_else_that_stops_answering_is_only_gone(scene: Scene) -> None:
    await scene.has_static("a")
    scene.machine.down.add("a")
    await scene.becomes("a", "gone")
    scene.machine.down.clear()
    await scene.becomes("a", "ready")
    assert scene.audit.records == []


async def test_an_end_that_fails_is_told_and_the_replica_is_forgotten(scene: Scene) -> None:
    await scene.has("a")
    scene.provider.error = RuntimeError("a bug")
    scene.drain("a")
    assert (await scene.closed(2))[-1] == ("drain", "failed")
    assert scene.audit.last().detail == "RuntimeError: a bug"
    assert not scene.fleet.is_elastic("a")


async def test_an_order_whose_intent_is_written_gets_its_outcome_in_the_name_of_who_gave_it(scene: Scene) -> None:
    order = Deploy(replica_id="a", group_id="m-fast")
    scene.fleet.begin(order, actor=ANN, via="console", intent_seq=41)
    await scene.closed()
    assert scene.audit.intents() == []
    entry = scene.audit.last()
    assert (entry.intent_seq, entry.actor, entry.via, entry.outcome) == (41, ANN, "console", "applied")


async def test_an_intent_says_from_which_state_to_which(scene: Scene) -> None:
    await scene.has("a")
    await scene.has_static("b")
    scene.drain("a")
    scene.drain("b")
    await scene.closed(3)
    changes = [c for r in scene.audit.records for c in r.entry.changes]
    assert [(c.subject, c.before, c.after) for c in changes] == [
        ("a", None, "ready"),
        ("a", "ready", "gone"),
        ("b", "ready", "cordoned"),
    ]


async def test_a_closed_fleet_calls_off_what_is_going_on_and_begins_nothing(scene: Scene) -> None:
    await scene.has("up")
    scene.provider.gate.clear()
    scene.deploy("a")
    await until(lambda: "deploy a" in scene.said)
    await scene.fleet.close()
    assert scene.audit.outcomes() == [("deploy", "applied"), ("deploy", "interrupted")]
    scene.deploy("b")
    scene.drain("up")
    scene.machine.down.add("up")
    await scene.becomes("up", "gone")
    await asyncio.sleep(0)
    assert scene.audit.intents() == ["deploy", "deploy"]
    assert scene.provider.running == {"up"}


async def test_a_fleet_that_closes_while_an_outcome_is_written_leaves_the_replica_up(scene: Scene) -> None:
    scene.provider.gate.clear()
    scene.deploy("a")
    await until(lambda: "deploy a" in scene.said)
    scene.audit.open.clear()
    scene.provider.gate.set()
    await scene.becomes("a", "ready")
    await scene.fleet.close()
    assert scene.states["a"] == "ready"
    assert scene.fleet.is_elastic("a")
    scene.audit.records.clear()  # the outcome is for the next start to write


async def test_a_group_of_a_provider_that_is_not_there_is_refused(scene: Scene) -> None:
    with pytest.raises(ConfigError, match="group m-fast: provider 'here' is not there, only: there"):
        Fleet(
            providers={"there": scene.provider},
            groups=[GROUP],
            watch=scene.watch,
            post=scene.shell.post,
            clock=scene.clock,
            audit=scene.audit,
            in_flight=scene.router.in_flight,
        )
