"""`python -m eval scale` from end to end, and its claims from rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("polars")

from eval import scale
from eval.result import Row


def test_a_small_run_leaves_all_three_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = scale.Effort(
        sizes=(10,),
        calls=200,
        calls_each=1,
        decisions=20,
        decision_sizes=(10,),
        seeds=1,
        count=30,
        unloaded_count=30,
    )
    monkeypatch.setattr(scale, "_QUICK", tiny)
    monkeypatch.setattr(scale, "ROUTERS", 3)
    assert scale.main(["--quick", "--workers", "1", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "result.json").read_bytes())
    parts = {row["experiment"] for row in result["rows"]}
    assert parts == {"scale_speed", "scale_decision", "scale_stale"}
    assert all(row["warmup_s"] > 0.0 for row in result["rows"] if row["experiment"] == "scale_stale")
    names = {claim["name"] for claim in result["claims"]}
    assert {"p99_at_stale_1s", "p99_at_stale_5s_vs_least_outstanding", "jain_index@owned,1s"} <= names


def test_one_part_alone_is_a_dozen_simulations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "_QUICK", scale.Effort(seeds=1, count=20, unloaded_count=20))
    monkeypatch.setattr(scale, "ROUTERS", 2)
    assert scale.main(["--quick", "--part", "stale", "--workers", "1", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "result.json").read_bytes())
    assert {row["experiment"] for row in result["rows"]} == {"scale_stale"}
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 12


def stale(policy: str, p99_s: float, *, routers: int = 16, ownership: str = "owned", age_s: float = 5.0) -> Row:
    return {
        "experiment": "scale_stale", "kind": "all", "policy": policy, "routers": routers, "ownership": ownership,
        "signal_age_s": age_s, "seed": 0, "p99_s": p99_s, "jain_slowdown": 0.8,
    }  # fmt: skip


def test_ours_with_stale_signals_is_held_against_one_fresh_router_and_the_best_way_of_least_outstanding() -> None:
    rows = [
        stale("marginal", 10.0, routers=1, ownership="shared", age_s=0.0),
        stale("marginal", 10.4, age_s=1.0),
        stale("marginal", 12.0),
        stale("least_outstanding", 20.0),
        stale("least_outstanding", 11.0, ownership="shared"),
        stale("least_outstanding", 30.0, ownership="shared"),
    ]
    found = {each.name: each for each in scale.claims_of(rows)}
    assert found["p99_at_stale_1s"].value == pytest.approx(1.04)
    assert found["p99_at_stale_1s"].met
    assert found["p99_at_stale_5s_vs_least_outstanding"].value == pytest.approx(12.0 / 11.0)
    assert not found["p99_at_stale_5s_vs_least_outstanding"].met


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--seeds", "0"], "--seeds is 0, expected at least 1"),
        (["--count", "19"], "--count is 19, expected at least 20"),
        (["--workers", "0"], "--workers is 0"),
        (["--sizes", "0"], "at least 1"),
        (["--prompts", "/nowhere"], "nothing at"),
    ],
)
def test_bad_options_are_one_line(
    tmp_path: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scale.main(["--quick", *options, "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
