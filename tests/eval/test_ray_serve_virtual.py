"""The workflows of the Ray Serve comparison in virtual time."""

import pytest

from eval.ray_serve_plan import OURS, claims_of, plan
from eval.ray_serve_virtual import measure

PLANNED = plan(12, 2.0, seed=3, prompts=None)


@pytest.mark.parametrize("router", ["power_of_two", "round_robin", "capacity_queue", OURS])
def test_every_workflow_ends_and_its_five_calls_are_served(router: str) -> None:
    row = measure(router, PLANNED, 3, 4.0, {})
    assert row["n"] == 12
    assert sum(int(row[f"calls_{device}"] or 0) for device in ("h100", "a100", "l40s", "b60")) == 60
    assert 0.0 < float(row["p50_s"] or 0.0) <= float(row["p99_s"] or 0.0) < 600.0


@pytest.mark.parametrize("router", ["capacity_queue", OURS])
def test_longer_ways_to_replicas_make_every_workflow_longer_by_its_own_ways_at_least(router: str) -> None:
    [one] = plan(1, 2.0, seed=3, prompts=None)  # alone, it never waits for room
    near, far = (measure(router, [one], 3, 4.0, {}, hop_s=hop_s) for hop_s in (0.0, 0.1))
    stages, ways = 3, 2
    assert float(far["p50_s"] or 0.0) >= float(near["p50_s"] or 0.0) + 4.0 * stages * ways * 0.1 * 0.9


def test_the_desk_is_driven_without_a_fault_and_its_claims_are_about_what_was_measured() -> None:
    ours, theirs = (measure(router, PLANNED, 3, 4.0, {}) for router in (OURS, "power_of_two"))
    assert ours["faults"] == 0
    found = {claim.name: claim.value for claim in claims_of([ours, theirs])}
    assert found["serve_p99_vs_best_router"] == pytest.approx(float(ours["p99_s"]) / float(theirs["p99_s"]))  # type: ignore[arg-type]
    assert "decision_p99_ms" not in found  # nothing was measured by the clock
