"""The real comparisons in one: how their rows become claims, and what becomes of a part that cannot run."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from eval.compat import comfy_claims, main, run, serve_part
from eval.result import Row

_CHILD = """
import json, sys
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True)
(out / "result.json").write_text(json.dumps({"meta": {}, "rows": [{"policy": "ours", "p99_s": 2.5}], "claims": []}))
raise SystemExit(1)
"""


def jobs(way: str, p95_s: float) -> Row:
    return {"part": "comfy", "way": way, "jobs": 40, "p95_s": p95_s}


def test_comfy_is_judged_by_medians_over_seeds_against_the_rule_that_did_best() -> None:
    rows = [
        {"way": "calibration: one", "mean_s": 1.0},
        *(jobs("round robin", p95_s) for p95_s in (30.0, 40.0, 50.0)),
        *(jobs("least queue", p95_s) for p95_s in (10.0, 20.0, 90.0)),
        *(jobs("ours", p95_s) for p95_s in (1.0, 17.0, 18.0)),
    ]
    [found] = comfy_claims(rows)
    assert (found.name, found.value, found.op, found.aim) == ("comfy_p95_vs_best", 17.0 / 20.0, "<=", 0.85)
    assert found.met
    [worse] = comfy_claims([*rows, jobs("ours", 17.2), jobs("ours", 17.3)])
    assert worse.value == pytest.approx(17.2 / 20.0)
    assert not worse.met


@pytest.mark.parametrize("rows", [[], [jobs("ours", 1.0)], [jobs("round robin", 1.0)]], ids=len)
def test_nothing_is_claimed_without_both_sides(rows: list[Row]) -> None:
    assert comfy_claims(rows) == []


def test_serve_is_judged_by_p99_over_the_best_router() -> None:
    def row(policy: str, p99_s: float) -> Row:
        return {"policy": policy, "failed": 0, "p50_s": 10.0, "p99_s": p99_s, "decision_p99_ms": 0.5}

    part = serve_part(Namespace(ray_python=Path(sys.executable), seeds=1, prompts=None, quick=False))
    rows = [row("swarmx", 30.0), row("round_robin", 60.0), row("power_of_two", 50.0)]
    found = {claim.name: claim for claim in part.claims(rows)}["serve_p99_vs_best_router"]
    assert (found.value, found.op, found.aim, found.met) == (0.6, "<=", 0.6, True)


def test_rows_are_read_whatever_the_verdict_of_the_run_was(tmp_path: Path) -> None:
    assert run([sys.executable, "-c", _CHILD], tmp_path / "out") == [{"policy": "ours", "p99_s": 2.5}]


def test_a_run_that_leaves_nothing_is_an_error_even_where_an_older_result_lies(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps({"rows": [{"policy": "old"}]}))
    with pytest.raises(RuntimeError, match="status 3 and left no"):
        run([sys.executable, "-c", "raise SystemExit(3)"], tmp_path)


def test_a_part_without_its_interpreter_is_said_to_be_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "no-python"
    assert main(["--out", str(tmp_path / "out"), "--ray-python", str(missing)]) == 2
    said = capsys.readouterr().out
    assert f"serve is LEFT OUT: there is no {missing}" in said
    assert "comfy is LEFT OUT: it needs --comfyui-dir and --comfyui-python" in said
    assert not (tmp_path / "out").exists()


def test_both_parts_are_run_and_their_rows_say_of_which_they_are(tmp_path: Path) -> None:
    """An interpreter that answers for Ray's: a script in the place of Python."""
    python = tmp_path / "python"
    script = f"#!{sys.executable}\n{_CHILD.replace('ours', 'swarmx')}"
    python.write_text(script)
    python.chmod(0o700)
    out = tmp_path / "out"
    assert main(["--out", str(out), "--part", "serve", "--ray-python", str(python), "--seeds", "2"]) == 0
    left = json.loads((out / "result.json").read_text())
    assert left["rows"] == [{"part": "serve", "run": "serve", "policy": "swarmx", "p99_s": 2.5}]
    assert left["meta"]["seeds"] == [0, 1]
