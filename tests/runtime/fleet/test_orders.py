"""Orders to the fleet: what cannot be done changes nothing, and what is done is audited from intent to outcome."""

from __future__ import annotations

import asyncio

import pytest

from swarmx.core.actions import Cordon, Deploy, Drain
from swarmx.core.errors import ConfigError
from swarmx.runtime.fleet import Fleet
from tests.runtime.fleet.scenes import ANN, GROUP, Scene, until

pytestmark = pytest.mark.process


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
