"""What routers add to Ray Serve's own path, as far as it needs no Ray."""

from pathlib import Path

import pytest

from eval.ray_serve_overhead import THEIRS, applications, calls_of, claims_of, count_of, rows_of
from eval.ray_serve_plan import OURS

ADDED = f"{OURS} - {THEIRS}"


def test_only_the_router_differs_between_the_applications() -> None:
    theirs, ours = applications([THEIRS, OURS], Path("log"))
    models = [dict(app["deployments"][0]) for app in (theirs, ours)]
    assert models[1].pop("request_router_config")["request_router_kwargs"]["log_dir"] == "log"
    assert models[0] == models[1]
    assert theirs["import_path"] == ours["import_path"] == "eval.ray_serve_overhead:build"


def test_every_block_has_new_calls_whose_sessions_have_five() -> None:
    calls = calls_of(count_of(10) + count_of(50), None)
    assert len(calls) == 80 + 150
    assert [session for session, _ in calls[:6]] == ["workflow-0"] * 5 + ["workflow-1"]
    texts = [asked.messages[-1]["content"] for _, asked in calls]
    assert len(set(texts)) == len(texts)


def test_what_is_added_is_the_difference_of_percentiles_and_lies_in_its_interval() -> None:
    ours = {"choose": [2.0 + 0.01 * i for i in range(101)], "thread": [5.0, 7.0], "decision": [1.0]}
    theirs = {"choose": [0.5 + 0.01 * i for i in range(101)], "thread": [2.0]}
    choose, thread = rows_of(ADDED, 10, ours, theirs)
    assert [choose["p50_ms"], choose["p99_ms"]] == pytest.approx([1.5, 1.5])
    assert 1.0 < float(choose["p50_low_ms"] or 0.0) < 1.5 < float(choose["p50_high_ms"] or 0.0) < 2.0
    assert thread["mean_ms"] == pytest.approx(4.0)


def test_without_anything_to_compare_with_rows_have_the_percentiles_alone() -> None:
    [row] = rows_of(THEIRS, 10, {"choose": [1.0, 2.0, 3.0]})
    assert (row["n"], row["p50_ms"]) == (3, 2.0)
    assert "p50_low_ms" not in row


def test_a_claim_is_met_when_less_than_a_millisecond_is_added_at_the_99th_percentile() -> None:
    rows = [
        {"policy": ADDED, "rate": 10, "measured": "choose", "p99_ms": 0.9},
        {"policy": ADDED, "rate": 10, "measured": "accepted", "p99_ms": 1.1},
        {"policy": ADDED, "rate": 10, "measured": "choose_cpu", "p99_ms": 5.0},
        {"policy": OURS, "rate": 10, "measured": "choose", "p99_ms": 5.0},
    ]
    found = {claim.name: claim.met for claim in claims_of(rows)}
    assert found == {"choose_added_p99_ms@10": True, "accepted_added_p99_ms@10": False}
