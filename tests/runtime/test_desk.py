"""The desk: one path for every change, whoever asks; nothing leaves its bounds, everything leaves a trace."""

from __future__ import annotations

import asyncio

import pytest

from swarmx.core.actions import Drain
from swarmx.core.audit import AuditEntry, ModelUse
from swarmx.core.control import Evidence, Proposal
from swarmx.core.errors import ConfigError, Forbidden, NotFound, Refused
from swarmx.core.messages import ScaleRequested
from swarmx.memory.sqlite import SqliteStore
from swarmx.tools.guard import GuardSettings
from tests.runtime.offices import DRAIN, ROUTE, SCALE, SHRINK, Office, refused
from tests.tools.worlds import (
    ADMIN,
    CLIENT,
    COORDINATOR,
    OPERATOR,
    VIEWER,
    Load,
    call,
)

# Proposing and deciding


async def test_a_proposal_changes_nothing_until_it_is_approved(office: Office) -> None:
    proposal = await office.propose(SCALE, reason="a crowd", episode_ids=("ep-1",))
    assert (proposal.state, proposal.reason, proposal.episode_ids) == ("open", "a crowd", ("ep-1",))
    assert [(c.subject, c.what, c.before, c.after) for c in proposal.diff.changes] == [("coder", "replicas", 2, 3)]
    assert office.done == []
    applied = await office.approve(proposal)
    assert office.done == [ScaleRequested(model="coder", replicas=3, hold_s=300.0)]
    assert (applied.state, applied.decided_by, applied.applied_at_s) == ("applied", OPERATOR, 1000.0)
    assert await office.desk.proposal(proposal.proposal_id) == applied
    assert [state for _, state in office.heard] == ["open", "applied"]
    assert office.trail() == [("note", None), ("intent", None), ("outcome", "applied")]
    assert [record.entry.actor for record in office.audit.records] == [COORDINATOR, OPERATOR, OPERATOR]
    office.audit.check()


async def test_an_order_is_applied_at_once(office: Office) -> None:
    applied = await office.order(SCALE)
    assert (applied.state, applied.actor, applied.decided_by, applied.reason) == (
        "applied",
        OPERATOR,
        OPERATOR,
        "because",
    )
    assert office.trail() == [("intent", None), ("outcome", "applied")]
    intent = office.audit.records[0].entry
    assert (intent.tool, intent.arguments["replicas"], intent.changes) == ("scale_model", 3, applied.diff.changes)
    assert (intent.via, intent.detail, intent.verdict is not None and intent.verdict.allowed) == (
        "cli",
        "because",
        True,
    )


async def test_the_modes_go_from_nothing_to_everything(office: Office) -> None:
    assert await refused(office.propose(SCALE, mode="observe")) == "mode"
    assert (await office.propose(SCALE, mode="suggest")).state == "suggested"
    assert (await office.propose(SHRINK, mode="review")).state == "open"
    assert office.done == []
    applied = await office.propose(call("scale_model", model="writer", replicas=3), mode="auto")
    assert (applied.state, applied.decided_by) == ("applied", None)
    assert len(office.done) == 1


async def test_suggestions_do_not_pile_up_and_expire(office: Office) -> None:
    suggestion = await office.propose(SCALE, mode="suggest")
    assert await refused(office.propose(SCALE, mode="suggest")) == "duplicate"
    again = Office(store=office.store, world=office.world)
    await again.desk.open()
    await again.pass_time(899.0)
    assert await again.state(suggestion) == "suggested"
    await again.pass_time(1.0)
    assert await again.state(suggestion) == "expired"
    assert (await again.propose(SCALE, mode="suggest")).state == "suggested"


async def test_a_suggestion_cannot_be_decided(office: Office) -> None:
    suggestion = await office.propose(SCALE, mode="suggest")
    assert await refused(office.approve(suggestion)) == "decided"
    assert office.done == []


async def test_nothing_irreversible_happens_unasked(office: Office) -> None:
    proposal = await office.propose(DRAIN, mode="auto")
    assert proposal.state == "open"
    assert office.done == []
    await office.approve(proposal)
    assert office.done == [Drain(replica_id="coder-1", deadline_at_s=1060.0)]


async def test_what_may_be_automatic_by_name_is(store: SqliteStore) -> None:
    office = Office(store=store, guard=GuardSettings(auto_irreversible=("drain_replica",)))
    assert (await office.propose(DRAIN, mode="auto")).state == "applied"


async def test_the_fleet_writes_the_outcome_of_actions(office: Office) -> None:
    await office.order(DRAIN)
    assert office.acted == [(OPERATOR, "cli", 1)]
    assert office.trail() == [("intent", None), ("outcome", "applied")]
    office.audit.check()


async def test_a_proposal_is_decided_once(office: Office) -> None:
    proposal = await office.propose(SCALE)
    denied = await office.desk.deny(proposal.proposal_id, actor=ADMIN, via="web", reason="too dear")
    assert (denied.state, denied.decided_by, denied.detail) == ("denied", ADMIN, "too dear")
    assert office.audit.last().outcome == "denied"
    assert await refused(office.approve(proposal)) == "decided"
    assert await refused(office.desk.deny(proposal.proposal_id, actor=ADMIN, via="web")) == "decided"
    assert office.done == []
    late = [(note.actor, note.verdict.rule) for note in notes(office) if note.outcome == "refused" and note.verdict]
    assert late == [(OPERATOR, "decided"), (ADMIN, "decided")]


async def test_of_many_approvals_at_once_exactly_one_applies(office: Office) -> None:
    proposal = await office.propose(SCALE)
    results = await asyncio.gather(*(office.approve(proposal) for _ in range(8)), return_exceptions=True)
    assert sum(isinstance(result, Proposal) for result in results) == 1
    assert {error.rule for error in results if isinstance(error, Refused)} == {"decided"}
    assert len(office.done) == 1


async def test_nobody_decides_without_the_role(office: Office) -> None:
    proposal = await office.propose(SCALE)
    for actor in (VIEWER, CLIENT, COORDINATOR):
        with pytest.raises(Forbidden):
            await office.approve(proposal, actor)
        with pytest.raises(Forbidden):
            await office.desk.deny(proposal.proposal_id, actor=actor, via="rest")
    assert await office.state(proposal) == "open"
    assert [entry.outcome for entry in notes(office)[1:]] == ["refused"] * 6


async def test_nobody_orders_without_the_role(office: Office) -> None:
    for actor in (VIEWER, CLIENT, COORDINATOR):
        with pytest.raises(Forbidden):
            await office.order(SCALE, actor)
    assert office.done == []
    assert [entry.verdict.rule for entry in notes(office) if entry.verdict is not None] == ["role", "role"]


def notes(office: Office) -> list[AuditEntry]:
    return [record.entry for record in office.audit.records if record.entry.kind == "note"]


async def test_a_refusal_leaves_a_note_and_no_proposal(office: Office) -> None:
    assert await refused(office.propose(call("scale_model", model="coda", replicas=3))) == "unknown_target"
    (note,) = notes(office)
    assert (note.outcome, note.arguments["model"]) == ("refused", "coda")
    assert note.verdict is not None
    assert note.verdict.rule == "unknown_target"
    assert await office.desk.proposals() == []


async def test_what_is_not_understood_is_an_error(office: Office) -> None:
    with pytest.raises(ConfigError, match="no tool"):
        await office.propose(call("format_disk"))
    with pytest.raises(ConfigError, match="replicas"):
        await office.order(call("scale_model", model="coder", replicas="all"))
    with pytest.raises(NotFound):
        await office.desk.approve("pr-none", actor=OPERATOR, via="web")
    assert await refused(office.propose(call("no_op"))) == "no_effect"


async def test_texts_and_lists_are_cut(office: Office) -> None:
    line = Evidence(metric="p95_s", subject="coder", value=1.0)
    proposal = await office.propose(
        SCALE, reason="x" * 5000, evidence=(line,) * 100, episode_ids=tuple(map(str, range(100)))
    )
    assert (len(proposal.reason), len(proposal.evidence), len(proposal.episode_ids)) == (400, 16, 8)


async def test_the_reason_in_the_arguments_is_used(office: Office) -> None:
    proposal = await office.propose(call("scale_model", model="coder", replicas=3, reason="calls wait"))
    assert proposal.reason == "calls wait"
    assert "reason" not in proposal.call.arguments


async def test_the_model_behind_a_proposal_is_on_record(office: Office) -> None:
    use = ModelUse(name="qwen", prompt_sha256="a" * 64, reply_sha256="b" * 64)
    await office.propose(SCALE, model=use)
    assert office.audit.last().model == use
    await office.propose(call("scale_model", model="writer", replicas=3), mode="auto", model=use)
    assert office.audit.records[1].entry.model == use


async def test_the_coordinator_does_not_repeat_itself(office: Office) -> None:
    await office.propose(SCALE)
    assert await refused(office.propose(SCALE)) == "duplicate"


# Looking


async def test_reading_needs_a_viewer_and_writes_nothing(office: Office) -> None:
    found = await office.desk.read(call("inspect_model", model="coder"), VIEWER)
    assert found["model"]["ready"] == 2
    with pytest.raises(Forbidden):
        await office.desk.read(call("inspect_cluster"), CLIENT)
    with pytest.raises(ConfigError, match="changes something"):
        await office.desk.read(SCALE, OPERATOR)
    assert office.audit.records == []


async def test_why_asks_for_the_decisions_of_its_call(office: Office) -> None:
    found = await office.desk.read(call("why_decision", call_id="call-7"), VIEWER)
    assert found["decisions"][0]["why"] == ["call-7 went to coder-1"]
    assert office.asked_for == [("call-7",)]


async def test_a_dry_run_tells_the_verdict_and_the_diff_and_writes_nothing(office: Office) -> None:
    verdict, diff = await office.desk.dry_run(SCALE, actor=OPERATOR)
    assert verdict.allowed
    assert [(change.before, change.after) for change in diff.changes] == [(2, 3)]
    verdict, diff = await office.desk.dry_run(SCALE, actor=VIEWER)
    assert (verdict.rule, len(diff.changes)) == ("role", 1)
    verdict, diff = await office.desk.dry_run(call("scale_model", model="coda", replicas=3), actor=OPERATOR)
    assert (verdict.rule, diff.changes) == ("unknown_target", ())
    assert office.audit.records == []
    assert office.done == []


# When the world went on


async def test_an_approval_of_what_no_longer_applies_is_stale(office: Office) -> None:
    proposal = await office.propose(SCALE)
    office.world.put("coder-2", "gone")
    assert await refused(office.approve(proposal)) == "stale"
    assert await office.state(proposal) == "stale"
    assert office.done == []
    assert office.audit.last().outcome == "stale"
    assert await refused(office.approve(proposal)) == "decided"


async def test_an_approval_of_what_has_lost_its_target_is_stale(office: Office) -> None:
    proposal = await office.propose(DRAIN)
    office.world.put("coder-1", "gone")
    assert await refused(office.approve(proposal)) == "stale"
    assert await office.state(proposal) == "stale"


async def test_a_refusal_that_time_can_lift_leaves_the_proposal_open(office: Office) -> None:
    proposal = await office.propose(call("set_replica_bounds", model="coder", min_replicas=2, max_replicas=4))
    other = call("set_replica_bounds", model="coder", min_replicas=1, max_replicas=5)
    back = call("set_replica_bounds", model="coder", min_replicas=1, max_replicas=4)
    await office.order(other)
    await office.order(back)
    assert await refused(office.approve(proposal)) == "cooldown"
    assert await office.state(proposal) == "open"
    await office.pass_time(301.0)
    assert (await office.approve(proposal)).state == "applied"


async def test_an_approval_lends_the_coordinator_no_power(office: Office) -> None:
    proposal = await office.propose(call("cordon_replica", replica_id="coder-1", cordoned=True, force=True))
    office.world.put("coder-2", "draining")
    assert await refused(office.approve(proposal, ADMIN)) == "last_replica"
    assert office.done == []


async def test_a_proposal_expires(office: Office) -> None:
    proposal = await office.propose(SCALE)
    await office.pass_time(899.0)
    assert await office.state(proposal) == "open"
    await office.pass_time(1.0)
    assert await office.state(proposal) == "expired"
    assert office.audit.last().outcome == "expired"
    assert office.heard[-1] == (proposal.proposal_id, "expired")
    assert await refused(office.approve(proposal)) == "decided"


async def test_an_approval_after_its_time_comes_too_late(office: Office) -> None:
    proposal = await office.propose(SCALE)
    office.world.at_s += 900.0
    assert await refused(office.approve(proposal)) == "decided"
    assert await office.state(proposal) == "expired"
    assert office.done == []


# Verification


async def test_a_change_that_made_nothing_worse_is_kept(office: Office) -> None:
    applied = await office.propose(SHRINK, mode="auto")
    await office.pass_time(59.0)
    assert await office.state(applied) == "applied"
    await office.pass_time(1.0)
    kept = await office.desk.proposal(applied.proposal_id)
    assert (kept.state, kept.verified_at_s, kept.objective_before, kept.objective_after) == ("kept", 1060.0, 4.0, 4.0)
    assert office.audit.last().outcome == "kept"
    assert len(office.done) == 1


@pytest.mark.parametrize("approved", [False, True])
async def test_a_change_of_the_coordinator_that_made_things_worse_is_rolled_back(
    office: Office, approved: bool
) -> None:
    applied = await office.propose(SHRINK, mode="review" if approved else "auto")
    if approved:
        await office.approve(applied)
    office.world.loads["coder"] = Load(p95_s=9.0)
    await office.pass_time(60.0)
    undone = await office.desk.proposal(applied.proposal_id)
    assert (undone.state, undone.objective_before, undone.objective_after) == ("rolled_back", 4.0, 9.0)
    assert undone.detail == "P95 went from 4 to 9 s"
    assert office.done[-1] == ScaleRequested(model="coder", replicas=2, hold_s=300.0)
    newest = (await office.desk.proposals(limit=1))[0]
    assert (newest.rollback_of, newest.actor.type, newest.state) == (applied.proposal_id, "system", "applied")
    assert office.trail()[-3:] == [("intent", None), ("outcome", "applied"), ("note", "rolled_back")]
    office.audit.check()
    await office.pass_time(60.0)
    assert await office.state(newest) == "kept"
    assert len(office.done) == 2


async def test_a_worse_change_of_a_person_is_noted_and_left(office: Office) -> None:
    applied = await office.order(SHRINK)
    office.world.loads["coder"] = Load(p95_s=9.0)
    await office.pass_time(60.0)
    kept = await office.desk.proposal(applied.proposal_id)
    assert (kept.state, kept.objective_after) == ("kept", 9.0)
    assert kept.detail == "worse, left as it is: P95 went from 4 to 9 s"
    assert len(office.done) == 1


async def test_what_cannot_be_undone_is_noted_and_left(office: Office) -> None:
    await office.approve(proposal := await office.propose(DRAIN))
    office.world.put("coder-1", "gone")
    office.world.loads["coder"] = Load(waiting=4)
    await office.pass_time(60.0)
    kept = await office.desk.proposal(proposal.proposal_id)
    assert (kept.state, kept.detail) == ("kept", "worse, left as it is: 4 calls wait")


async def test_growth_in_a_growing_crowd_is_kept(office: Office) -> None:
    applied = await office.propose(SCALE, mode="auto")
    office.become_ready()
    office.world.loads["coder"] = Load(p95_s=40.0, waiting=30, arrivals_per_s=10.0)
    await office.pass_time(60.0)
    assert await office.state(applied) == "kept"


async def test_what_was_changed_again_is_not_judged_and_not_rolled_back(office: Office) -> None:
    applied = await office.propose(ROUTE, mode="auto")
    await office.order(call("set_routing_policy", policy="least_work"))
    office.world.loads["coder"] = Load(p95_s=50.0)
    await office.pass_time(60.0)
    assert await office.state(applied) == "stale"
    assert len(office.done) == 2


async def test_a_person_rolls_back(office: Office) -> None:
    applied = await office.order(ROUTE)
    undo = await office.order(call("rollback", proposal_id=applied.proposal_id))
    assert undo.rollback_of == applied.proposal_id
    assert await office.state(applied) == "rolled_back"
    assert office.world.routing.policy == "least_work"
    assert await refused(office.order(call("rollback", proposal_id=applied.proposal_id))) == "state"
    await office.pass_time(60.0)
    assert await office.state(applied) == "rolled_back"


async def test_a_roll_back_by_itself_that_fails_is_said_and_not_tried_for_ever(office: Office) -> None:
    applied = await office.propose(SHRINK, mode="auto")
    office.world.loads["coder"] = Load(p95_s=9.0)
    office.jammed = True
    await office.pass_time(60.0)
    kept = await office.desk.proposal(applied.proposal_id)
    assert kept.state == "kept"
    assert kept.detail.startswith("worse, and not rolled back: P95 went from 4 to 9 s; ValueError: the policy broke")
    await office.pass_time(600.0)
    assert len(office.done) == 1
    office.audit.check()


async def test_a_roll_back_by_itself_obeys_the_bounds(office: Office) -> None:
    applied = await office.propose(SHRINK, mode="auto")
    office.world.bounds["coder"] = (1, 1)
    office.world.loads["coder"] = Load(p95_s=9.0)
    await office.pass_time(60.0)
    kept = await office.desk.proposal(applied.proposal_id)
    assert kept.state == "kept"
    assert "not rolled back" in kept.detail
    assert len(office.done) == 1
