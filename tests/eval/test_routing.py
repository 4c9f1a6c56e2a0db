"""`python -m eval routing` from end to end on toy workloads, and what it says to bad options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("polars")
pytest.importorskip("matplotlib")

from eval.routing import main

SMALL = (
    "--quick", "--fleets", "one_model", "--capacity", "one_model=60", "--policies", "round_robin", "least_work", "ours",
    "lower_bound", "--count", "40", "--seeds", "2", "--workers", "1",
)  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run."""
    folder: Path = tmp_path_factory.mktemp("routing")
    assert main([*SMALL, "--out", str(folder)]) == 0
    return folder


def test_a_run_leaves_rows_claims_a_page_and_plots(out: Path) -> None:
    result = json.loads((out / "result.json").read_bytes())
    rows = [row for row in result["rows"] if row["experiment"] == "routing"]
    contestants = {"round_robin", "least_work", "marginal", "marginal/role_means", "lower_bound"}
    assert {row["policy"] for row in rows} == contestants
    assert {row["kind"] for row in rows} == {"chat", "sessions", "all"}
    assert {row["seed"] for row in rows} == {0, 1}
    assert all(row["workload"] == "toy" and row["n"] > 0 for row in rows)
    assert all(row["warmup_s"] == pytest.approx(0.1 * 40 / (0.85 * 60)) for row in rows)
    (best,) = (r["policy"] for r in result["rows"] if r["experiment"] == "routing_summary" and r["best_baseline"])
    assert best in {"round_robin", "least_work"}
    names = {claim["name"] for claim in result["claims"]}
    assert {"p99_vs_best_baseline@one_model,0.85,poisson", "p99_worst_kind@one_model,0.85,poisson"} <= names
    page = (out / "result.md").read_text()
    assert "Note: toy workloads" in page
    assert "Note: quick" in page
    assert list(out.glob("latency-*.png"))


def test_a_second_start_simulates_nothing_and_gives_the_same_rows(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [(out / name).read_bytes() for name in ("rows.jsonl", "result.json", "tuned.json")]
    assert main([*SMALL, "--out", str(out)]) == 0
    assert [(out / name).read_bytes() for name in ("rows.jsonl", "result.json", "tuned.json")] == before
    assert "comparison" not in capsys.readouterr().err


def test_what_was_lost_is_simulated_again_with_the_same_outcome(out: Path, tmp_path: Path) -> None:
    whole = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "runs.jsonl").write_bytes((out / "state" / "runs.jsonl").read_bytes())
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in whole[::2]))
    assert main([*SMALL, "--out", str(tmp_path)]) == 0
    again = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    for runs in (whole, again):
        runs.sort(key=lambda run: run["key"])
        for run in runs:
            run.pop("cpu_s")
    assert again == whole


def test_the_best_baseline_and_all_settings_come_from_the_tuning_split_alone(out: Path) -> None:
    tuning = [json.loads(line)["job"] for line in (out / "state" / "runs.jsonl").read_text().splitlines()]
    reported = [json.loads(line)["job"] for line in (out / "rows.jsonl").read_text().splitlines()]
    measured = [job for job in tuning if (job["policy"], job["forecast"]) == ("least_work", "oracle")]
    tried = [job for job in tuning if job not in measured]
    assert measured  # for capacity and targets, by which nothing is chosen
    assert not any(job["workload"]["content"]["tuning"] for job in measured)
    assert all(job["workload"]["content"]["tuning"] for job in tried)
    assert {job["policy"] for job in tried} == {job["policy"] for job in reported} - {"lower_bound"}
    assert not any(job["workload"]["content"]["tuning"] for job in reported)
    tuned = {each["contestant"]: each for each in json.loads((out / "tuned.json").read_bytes())["tuned"]}
    for job in reported:
        if job["policy"] in tuned and job["forecast"] != "oracle":
            settings = tuned[
                job["policy"] if job["forecast"] == "neural" or job["policy"] != "marginal" else "marginal/role_means"
            ]
            assert job["parameters"] == settings["settings"]["parameters"]


def test_tuned_settings_that_are_given_back_are_used(out: Path, tmp_path: Path) -> None:
    tuned = json.loads((out / "tuned.json").read_bytes())
    for each in tuned["tuned"]:
        each["settings"]["late_binding"] = False
    (tmp_path / "mine.json").write_text(json.dumps(tuned))
    folder = tmp_path / "out"
    assert main([*SMALL, "--out", str(folder), "--tuned", str(tmp_path / "mine.json")]) == 0
    jobs = [json.loads(line)["job"] for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert not any(job["late_binding"] for job in jobs if job["policy"] != "lower_bound")


def test_throughput_is_searched_for_the_few_that_matter(out: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "runs.jsonl").write_bytes((out / "state" / "runs.jsonl").read_bytes())
    small = [*SMALL[:5], "--policies", "round_robin", "marginal", *SMALL[10:]]
    assert main([*small, "--out", str(folder), "--throughput", "--tuned", str(out / "tuned.json")]) == 0
    result = json.loads((folder / "result.json").read_bytes())
    rows = [row for row in result["rows"] if row["experiment"] == "routing_throughput"]
    assert [(row["policy"], row["misses"]) for row in rows] == [
        ("marginal", 0.01),
        ("round_robin", 0.01),
        ("round_robin", 0.1),
    ]
    names = {claim["name"] for claim in result["claims"]}
    assert "throughput_at_slo_vs_best_baseline@one_model,poisson" in names
    assert (folder / "throughput.png").exists()
    failing = rows[-1]
    assert f"p99_vs_round_robin@one_model,{failing['load']:g},poisson" in names
    pair = [row for row in result["rows"] if row["experiment"] == "routing_round_robin" and row["kind"] == "all"]
    assert {(row["policy"], row["seed"]) for row in pair} == {
        (p, s) for p in ("round_robin", "marginal") for s in (0, 1)
    }
    assert {row["load"] for row in pair} == {failing["load"]}
    ratios = [
        next(row["p99_s"] for row in pair if (row["policy"], row["seed"]) == ("marginal", seed))
        / next(row["p99_s"] for row in pair if (row["policy"], row["seed"]) == ("round_robin", seed))
        for seed in (0, 1)
    ]
    assert failing["p99_vs_round_robin"] == pytest.approx(sum(ratios) / 2)
    done = (folder / "rows.jsonl").read_bytes()
    assert main([*small, "--out", str(folder), "--throughput", "--tuned", str(out / "tuned.json")]) == 0
    assert (folder / "rows.jsonl").read_bytes() == done, "a search that was done is not simulated again"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--fleets", "nowhere"], "no fleet 'nowhere'"),
        (["--policies", "least_wrok"], "no contestant 'least_wrok'"),
        (["--loads", "-1"], "--loads has -1"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--workers", "0"], "--workers is 0"),
        (["--kinds", "chats"], "no workflow kind 'chats'"),
        (["--arrival-kinds", "monthly"], "arrivals are 'monthly'"),
        (["--arrival-kinds", "mooncake"], "pass --arrivals PATH"),
        (["--prompts", "/nowhere"], "nothing at /nowhere"),
        (["--capacity", "one_model"], "FLEET=WORKFLOWS_PER_SECOND"),
        (["--capacity", "mars=3"], "one of heterogeneous"),
        (["--tuned", "/nowhere.json"], "cannot read /nowhere.json"),
        (["--vary", "9"], "vary is 9"),
        (["--slo-factor", "0"], "above zero"),
    ],
)
def test_bad_options_are_one_line(
    tmp_path: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--quick", "--workers", "1", *options, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error
