"""Replicas that are drained or cordoned get no new calls, keep those that they have, and come back as they were."""

from __future__ import annotations

import pytest

from swarmx.core.actions import Cordon, Drain, Refuse
from swarmx.core.messages import CallCancelled, Message
from tests.agents.worlds import failed, finished, ready
from tests.runtime.fleet.scenes import ANN, Machine, Scene, until

pytestmark = pytest.mark.process


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
