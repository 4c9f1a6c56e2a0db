"""The flash crowd, small: everybody at work over real processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarmx.demo import crowd
from swarmx.demo.crowd_report import summarise_crowd

SMALL = crowd.Crowd(base_per_s=0.1, peak_per_s=3.0, begins_s=20.0, ends_s=80.0, over_s=90.0)


def test_the_same_seed_gives_the_same_crowd_and_most_of_it_comes_in_the_crowd() -> None:
    rows = crowd.arrivals(SMALL, seed=1, time_scale=10.0)
    assert rows == crowd.arrivals(SMALL, seed=1, time_scale=10.0)
    assert rows != crowd.arrivals(SMALL, seed=2, time_scale=10.0)
    in_crowd = [row for row in rows if SMALL.begins_s <= row.at_s * 10.0 < SMALL.ends_s]
    assert len(in_crowd) > 0.9 * len(rows)
    assert all(0.0 <= row.at_s * 10.0 < SMALL.over_s for row in rows)


@pytest.mark.process
@pytest.mark.timeout(600)
async def test_in_a_crowd_the_scaler_starts_replicas_the_coordinator_proposes_and_the_audit_verifies(
    tmp_path: Path,
) -> None:
    wanted = crowd.settings(
        time_scale=10.0,
        seed=1,
        scaler={},
        bounds=(1, 2, 4),
        coordinator={"engine": "rules"},
        start_s=10.0,
    )
    todo = crowd.arrivals(SMALL, seed=1, time_scale=10.0)
    run = await crowd.run_crowd(wanted, todo, tmp_path, operator=True)

    rows = {row["part"]: row for row in summarise_crowd(run, SMALL, scale=10.0, seed=1, coordinator="rules")}
    assert rows["all"]["n"] == rows["all"]["finished"] == len(todo)
    assert rows["all"]["cost"] > 0.0
    assert "at_max" in {alert["kind"] for alert in run.alerts}
    raised = [p for p in run.proposals if p["call"]["tool"] == "set_replica_bounds" and p["applied_at_s"] is not None]
    assert raised, run.proposals
    assert raised[-1]["actor"]["type"] == "coordinator"
    assert raised[-1]["decided_by"]["type"] == "key"
    assert max(held for _, held, _ in run.samples) > 2
    assert run.sound
    intents = {record["seq"] for record in run.records if record["entry"]["kind"] == "intent"}
    closed = {record["entry"]["intent_seq"] for record in run.records if record["entry"]["kind"] == "outcome"}
    assert closed <= intents
    assert any("set_replica_bounds" in line for line in run.answer)
