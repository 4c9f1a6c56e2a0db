"""Replicas that stop answering, or whose end fails: what was ours is ended and forgotten, once."""

from __future__ import annotations

import pytest

from tests.agents.worlds import ready
from tests.runtime.fleet.scenes import Scene, until

pytestmark = pytest.mark.process


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
