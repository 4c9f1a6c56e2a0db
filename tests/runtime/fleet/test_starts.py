"""Replicas start: intent first, ready once they answer, gone with an alert if they do not come."""

from __future__ import annotations

import asyncio

import pytest

from swarmx.core.actions import Drain
from swarmx.core.errors import ReplicaError
from tests.agents.worlds import FAST, a_replica
from tests.runtime.fleet.scenes import ANN, GROUP, Scene, until

pytestmark = pytest.mark.process


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
