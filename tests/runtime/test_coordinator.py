"""The coordinator's loop at a real desk: every mode, every fault, its memory, its breaker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from swarmx.core.control import Actor, AlertSeen, Mode, Proposal, Reply
from swarmx.core.errors import StoreError
from swarmx.core.messages import AlertRaised
from swarmx.runtime.coordinator import COORDINATOR, ROLLBACKS, UNUSABLE, Turn
from swarmx.tools.guard import GuardSettings
from tests.llm_coordinator.scripted import FOREVER, ScriptedModel, says
from tests.runtime.desks import MemoryControl, Office, an_office
from tests.tools.worlds import OPERATOR

GROW = says("set_replica_bounds", model="m1", min_replicas=1, max_replicas=6, reason="m1 needs room.")
STICK = says("set_routing_policy", policy="sticky", reason="Prefixes repeat.")
MORE = says("scale_model", model="m1", replicas=3, reason="m1 is slow.")
NOTHING = says("no_op", reason="All is well.")
BAD = Reply(text="Let me think about that.")


# One turn


async def test_a_call_of_the_model_becomes_a_proposal_that_says_why() -> None:
    with ScriptedModel(GROW) as script:
        office = await an_office(script)
        turn = await office.coordinator.turn("timer")
    proposal = turn.proposal
    assert proposal is not None
    assert (turn.source, turn.fallback, turn.outcome, turn.replies) == ("model", "", "open", 1)
    assert (turn.prompt_tokens, turn.output_tokens, turn.model_s) == (900, 30, 0.1)
    assert (proposal.actor, proposal.via, proposal.state) == (COORDINATOR, "coordinator", "open")
    assert proposal.reason == "coder needs room."
    assert ("waiting", "coder", 0) in [(e.metric, e.subject, e.value) for e in proposal.evidence]
    assert office.world.bounds["coder"] == (1, 4)
    note = office.audit.last()
    assert note.model is not None
    assert note.model.name == "scripted"


async def test_a_turn_is_an_episode_that_follows_its_proposal() -> None:
    with ScriptedModel(GROW) as script:
        office = await an_office(script)
        turn = await office.coordinator.turn("at_max")
    episode = office.episode(turn)
    assert turn.proposal is not None
    assert (episode.trigger, episode.source, episode.outcome) == ("at_max", "model", "open")
    assert (episode.call, episode.proposal_id) == (turn.call, turn.proposal.proposal_id)
    await office.desk.approve(turn.proposal.proposal_id, actor=OPERATOR, via="cli")
    await office.coordinator.close()
    assert office.episode(turn).outcome == "applied"
    assert office.world.bounds["coder"] == (1, 6)
    await office.later(61.0)
    episode = office.episode(turn)
    assert (episode.outcome, episode.objective_before, episode.objective_after) == ("kept", 4.0, 4.0)


async def test_an_operator_who_is_quicker_than_the_turn_is_not_missed() -> None:
    def approves(proposal: Proposal) -> None:
        if proposal.state == "open":
            deciding.append(asyncio.ensure_future(office.desk.approve(proposal.proposal_id, actor=OPERATOR, via="cli")))

    deciding: list[asyncio.Future[Proposal]] = []
    with ScriptedModel(GROW) as script:
        office = await an_office(script)
        office.desk.on_change.append(approves)
        turn = await office.coordinator.turn("timer")
    await asyncio.gather(*deciding)
    await office.coordinator.close()
    assert office.episode(turn).outcome == "applied"


async def test_the_episode_is_kept_before_anything_is_proposed() -> None:
    class Witness(MemoryControl):
        async def save_proposal(self, proposal: Any) -> None:
            seen.append([episode.outcome for episode in self.turns.values()])
            await super().save_proposal(proposal)

    seen: list[list[str]] = []
    with ScriptedModel(GROW) as script:
        office = await an_office(script, store=Witness())
        await office.coordinator.turn("timer")
    assert seen == [["pending"]]


@pytest.mark.parametrize(
    ("mode", "outcome", "bounds"),
    [
        ("observe", "observed", (1, 4)),
        ("suggest", "suggested", (1, 4)),
        ("review", "open", (1, 4)),
        ("auto", "applied", (1, 6)),
    ],
)
async def test_a_mode_allows_so_much(mode: Mode, outcome: str, bounds: tuple[int, int]) -> None:
    with ScriptedModel(GROW) as script:
        office = await an_office(script, mode=mode)
        turn = await office.coordinator.turn("timer")
    assert (turn.outcome, office.episode(turn).outcome) == (outcome, outcome)
    assert (turn.proposal is None) is (mode == "observe")
    assert office.world.bounds["coder"] == bounds


async def test_a_tool_may_have_a_mode_of_its_own() -> None:
    with ScriptedModel(GROW, STICK) as script:
        office = await an_office(script, mode="auto", modes={"set_routing_policy": "review"})
        assert (await office.coordinator.turn("timer")).outcome == "applied"
        assert (await office.coordinator.turn("timer")).outcome == "open"
    assert office.world.routing.policy == "least_work"


async def test_doing_nothing_is_an_episode_without_a_proposal() -> None:
    with ScriptedModel(NOTHING) as script:
        office = await an_office(script)
        turn = await office.coordinator.turn("timer")
    assert (turn.outcome, turn.proposal, office.episode(turn).outcome) == ("no_op", None, "no_op")
    assert office.store.kept == {}
    assert office.audit.records == []


async def test_without_a_model_the_rules_propose() -> None:
    office = await an_office(None)
    office.world.bounds["coder"] = (1, 2)
    office.world.loads["coder"].waiting = 7
    turn = await office.coordinator.turn("timer")
    assert (turn.source, turn.fallback, turn.outcome) == ("rules", "there is no model", "open")
    assert turn.call.arguments == {"model": "coder", "min_replicas": 1, "max_replicas": 3}
    assert office.episode(turn).source == "rules"
    assert office.audit.last().model is None


@pytest.mark.parametrize(
    "steps",
    [
        (BAD, BAD),
        (FOREVER, FOREVER),
        (Reply(error="unreachable"),) * 2,
        (says("obey"),) * 2,
        (RuntimeError("bug"),) * 2,
    ],
    ids=["no JSON", "endless", "killed", "invented tool", "bug"],
)
async def test_a_model_that_fails_is_replaced_by_the_rules_and_the_turn_says_why(steps: Any) -> None:
    with ScriptedModel(*steps) as script:
        office = await an_office(script, deadline_s=0.3)
        office.alerts = tuple(
            AlertSeen(at_s=office.world.at_s, kind="breaker_opened", subject="coder-1", value=0.0) for _ in range(3)
        )
        turn = await office.coordinator.turn("breaker_opened")
    assert turn.source == "rules"
    assert turn.fallback
    assert (turn.call.tool, turn.outcome) == ("cordon_replica", "open")


async def test_what_the_guard_refuses_is_remembered_as_refused() -> None:
    far = says("set_replica_bounds", model="m1", min_replicas=0, max_replicas=0, reason="Save.")
    with ScriptedModel(far) as script:
        office = await an_office(script, mode="auto")
        turn = await office.coordinator.turn("timer")
    assert turn.proposal is None
    assert turn.outcome.startswith("refused:")
    assert office.episode(turn).outcome == turn.outcome
    assert office.world.bounds["coder"] == (1, 4)


async def test_an_actor_without_the_role_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "swarmx.runtime.coordinator.COORDINATOR", Actor(type="coordinator", name="coordinator", role="viewer")
    )
    with ScriptedModel(GROW) as script:
        office = await an_office(script, mode="auto")
        assert (await office.coordinator.turn("timer")).outcome == "refused:Forbidden"
    assert office.world.bounds["coder"] == (1, 4)


# Memory


async def test_like_situations_are_in_the_prompt_and_in_the_explanation() -> None:
    with ScriptedModel(STICK, NOTHING, GROW) as script:
        office = await an_office(script, mode="suggest")
        first = await office.coordinator.turn("timer")
        second = await office.coordinator.turn("timer")
        third = await office.coordinator.turn("timer")
    assert "Like this before:\nnone" in script.asked[0].user
    assert "set_routing_policy(policy=sticky): suggested" in script.asked[2].user
    assert third.proposal is not None
    assert set(third.episode_ids) == set(third.proposal.episode_ids) == {first.episode_id, second.episode_id}
    likeness = {e.subject: e for e in third.evidence if e.metric.startswith("like_before")}
    assert likeness[first.episode_id].metric == "like_before:set_routing_policy:suggested"
    assert float(likeness[first.episode_id].value or 0.0) > 0.9


async def test_at_most_three_episodes_are_told_and_no_two_that_say_the_same() -> None:
    with ScriptedModel(*[NOTHING] * 5, STICK, MORE, GROW, NOTHING) as script:
        office = await an_office(script, mode="observe")
        for _ in range(8):
            await office.coordinator.turn("timer")
        last = await office.coordinator.turn("timer")
    told = [(office.store.turns[e].call.tool, office.store.turns[e].outcome) for e in last.episode_ids]
    assert len(told) == len(set(told)) == 3


@pytest.mark.parametrize("broken", ["vectors", "store"])
async def test_without_its_memory_it_goes_on(broken: str) -> None:
    with ScriptedModel(NOTHING, NOTHING) as script:
        office = await an_office(script)
        await office.coordinator.turn("timer")
        if broken == "vectors":
            await office.vectors.close()
        office.store.broken = broken == "store"
        turn = await office.coordinator.turn("timer")
    assert (turn.source, turn.outcome, turn.episode_ids) == ("model", "no_op", ())


async def test_a_desk_that_cannot_write_changes_nothing() -> None:
    with ScriptedModel(GROW) as script:
        office = await an_office(script, mode="auto")
        office.audit.broken = True
        turn = await office.coordinator.turn("timer")
    assert turn.outcome == "refused:StoreError"
    assert office.world.bounds["coder"] == (1, 4)


async def test_proposals_of_an_earlier_life_are_followed() -> None:
    with ScriptedModel(GROW) as script:
        earlier = await an_office(script)
        turn = await earlier.coordinator.turn("timer")
    assert turn.proposal is not None
    office = await an_office(None, store=earlier.store)
    async with running(office):
        await office.told(1)
        await office.desk.deny(turn.proposal.proposal_id, actor=OPERATOR, via="cli")
        await office.coordinator.close()
    assert office.episode(turn).outcome == "denied"


async def test_what_ended_while_nobody_followed_it_is_caught_up_with() -> None:
    with ScriptedModel(GROW) as script:
        earlier = await an_office(script)
        turn = await earlier.coordinator.turn("timer")
    assert turn.proposal is not None
    earlier.desk.on_change.clear()
    await earlier.desk.deny(turn.proposal.proposal_id, actor=OPERATOR, via="cli")
    office = await an_office(None, store=earlier.store)
    async with running(office):
        await office.told(1)
        await office.coordinator.close()
    assert office.episode(turn).outcome == "denied"


async def test_the_log_tells_why_the_rules_stood_in(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), ScriptedModel(BAD, BAD) as script:
        office = await an_office(script)
        turn = await office.coordinator.turn("at_max")
    assert turn.fallback
    (line,) = [record.getMessage() for record in caplog.records if record.name == "swarmx.runtime.coordinator"]
    asked = f"2 replies, {turn.prompt_tokens} + {turn.output_tokens} tokens, 0 s"
    assert line == f"coordinator, woken by at_max: no_op by rules ({turn.fallback}) after {asked}: no_op"


# The breaker


async def worsened(office: Office) -> Turn:
    """A change of the routing policy after which half of all calls fail, so that it is rolled back."""
    turn = await office.coordinator.turn("timer")
    assert turn.outcome == "applied"
    for load in office.world.loads.values():
        load.failed = 60
    await office.later(61.0)
    for load in office.world.loads.values():
        load.failed = 0
    return turn


async def test_changes_that_are_rolled_back_in_a_row_end_in_observing() -> None:
    with ScriptedModel(*[STICK] * (ROLLBACKS + 2)) as script:
        office = await an_office(script, mode="auto")
        for _ in range(ROLLBACKS):
            turn = await worsened(office)
            assert office.episode(turn).outcome == "rolled_back"
        assert office.coordinator.mode_of("set_routing_policy") == "observe"
        assert (await office.coordinator.turn("timer")).outcome == "observed"
        (note,) = office.notes()
        assert (note.actor, note.effect) == (COORDINATOR, "read")
        assert "3 changes in a row were rolled back" in note.detail
        await office.later(901.0)
        assert office.coordinator.observes_until_s is None
        assert (await office.coordinator.turn("timer")).outcome == "applied"


async def test_a_change_that_is_kept_begins_the_count_anew() -> None:
    with ScriptedModel(STICK, STICK, GROW, STICK) as script:
        office = await an_office(script, mode="auto")
        await worsened(office)
        await worsened(office)
        kept = await office.coordinator.turn("timer")
        await office.later(61.0)
        assert office.episode(kept).outcome == "kept"
        await worsened(office)
    assert office.coordinator.mode_of("no_op") == "auto"


async def test_replies_that_cannot_be_used_in_a_row_end_in_observing() -> None:
    with ScriptedModel(*[BAD] * 6) as script:
        office = await an_office(script, mode="auto")
        for _ in range(2):
            await office.coordinator.turn("timer")
        assert office.coordinator.mode_of("no_op") == "auto"
        await office.coordinator.turn("timer")
    assert office.coordinator.mode_of("no_op") == "observe"
    assert office.coordinator.observes_until_s == office.world.at_s + 900.0
    await office.coordinator.close()
    (note,) = office.notes()
    assert f"{UNUSABLE + 1} replies in a row" in note.detail


async def test_a_good_reply_begins_the_count_anew_and_silence_does_not_count() -> None:
    gone = [Reply(error="unreachable")] * 2
    with ScriptedModel(BAD, BAD, BAD, NOTHING, BAD, BAD, *gone, *gone, BAD, BAD, NOTHING) as script:
        office = await an_office(script)
        for _ in range(7):
            await office.coordinator.turn("timer")
    assert office.coordinator.mode_of("no_op") == "review"


async def test_a_note_that_cannot_be_written_stops_nothing() -> None:
    with ScriptedModel(*[BAD] * 6) as script:
        office = await an_office(script)
        office.audit.broken = True
        for _ in range(3):
            await office.coordinator.turn("timer")
        await office.coordinator.close()
    assert office.coordinator.mode_of("no_op") == "observe"


# The loop


@asynccontextmanager
async def running(office: Office) -> AsyncIterator[None]:
    office.coordinator.observe(AlertRaised(kind="at_max", subject="coder", value=5.0), office.world.at_s)
    task = asyncio.create_task(office.coordinator.run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await office.coordinator.close()


async def test_an_alert_wakes_it() -> None:
    with ScriptedModel(NOTHING) as script:
        office = await an_office(script)
        async with running(office):
            await office.told(1)
    assert office.turns[0].trigger == "at_max"


async def test_it_looks_by_itself_from_time_to_time() -> None:
    office = await an_office(None, every_s=0.01)
    async with running(office):
        await office.told(3)
    assert [turn.trigger for turn in office.turns[:3]] == ["at_max", "timer", "timer"]


async def test_alerts_during_a_turn_are_taken_together_the_most_urgent_first() -> None:
    class Alarmed(ScriptedModel):
        async def reply(self, prompt: Any, *, deadline_s: float) -> Reply:
            if len(self.asked) == 0:
                for kind in ("at_max", "policy_failed", "breaker_opened", "at_max", "breaker_closed"):
                    office.coordinator.observe(AlertRaised(kind=kind, subject="x"), 0.0)  # type: ignore[arg-type]
            return await super().reply(prompt, deadline_s=deadline_s)

    with Alarmed(NOTHING, NOTHING) as script:
        office = await an_office(script)
        async with running(office):
            await office.told(2)
    assert [turn.trigger for turn in office.turns] == ["at_max", "breaker_opened"]


async def test_a_breaker_that_closed_wakes_nobody() -> None:
    office = await an_office(None)
    async with running(office):
        await office.told(1)
        office.coordinator.observe(AlertRaised(kind="breaker_closed", subject="x"), 0.0)
        office.coordinator.observe(AlertRaised(kind="replica_failed", subject="x"), 0.0)
        await office.told(2)
    assert [turn.trigger for turn in office.turns] == ["at_max", "replica_failed"]


async def test_a_turn_that_fails_does_not_end_the_loop() -> None:
    office = await an_office(None, every_s=0.01)
    office.blind = True
    with pytest.raises(StoreError):
        await office.coordinator.turn("timer")
    async with running(office):
        async with asyncio.timeout(30.0):
            while office.stumbled < 4:
                await asyncio.sleep(0.005)
        assert office.turns == []
        office.blind = False
        await office.told(2)


async def test_turns_come_one_at_a_time() -> None:
    class Slow(ScriptedModel):
        inside = 0

        async def reply(self, prompt: Any, *, deadline_s: float) -> Reply:
            self.inside += 1
            assert self.inside == 1
            await asyncio.sleep(0.01)
            self.inside -= 1
            return await super().reply(prompt, deadline_s=deadline_s)

    with Slow(*[NOTHING] * 4) as script:
        office = await an_office(script)
        await asyncio.gather(*(office.coordinator.turn("timer") for _ in range(4)))
    assert [turn.source for turn in office.turns] == ["model"] * 4


async def test_a_guard_that_rests_makes_the_second_change_wait() -> None:
    with ScriptedModel(GROW, says("set_replica_bounds", model="m1", min_replicas=1, max_replicas=5)) as script:
        office = await an_office(script, mode="auto", guard=GuardSettings())
        assert (await office.coordinator.turn("timer")).outcome == "applied"
        assert (await office.coordinator.turn("timer")).outcome == "refused:cooldown"
