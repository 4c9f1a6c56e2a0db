"""The demo as its user runs it, small."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from swarmx.demo.corpus import KINDS, flow, openers
from swarmx.demo.fleet import MODELS
from swarmx.demo.run import arrivals
from swarmx.workflows.spec import parse_workflow


@pytest.mark.parametrize("kind", KINDS)
def test_every_task_makes_a_workflow_that_is_accepted(kind: str) -> None:
    for task in openers(kind):
        spec = parse_workflow(flow(kind, task, MODELS))
        assert spec.kind == kind


def test_the_same_seed_gives_the_same_arrivals() -> None:
    assert arrivals(30, seed=3, per_s=2.0, models=MODELS) == arrivals(30, seed=3, per_s=2.0, models=MODELS)
    assert arrivals(30, seed=3, per_s=2.0, models=MODELS) != arrivals(30, seed=4, per_s=2.0, models=MODELS)


def test_arrivals_mix_the_kinds_and_repeat_no_task_before_all_were_used() -> None:
    rows = arrivals(60, seed=0, per_s=1.0, models=MODELS)
    for kind in KINDS:
        texts = [row.spec["inputs"]["task"] for row in rows if row.kind == kind]
        assert len(texts) == 20
        assert len(set(texts)) == 20


@pytest.mark.process
@pytest.mark.timeout(600)
def test_a_small_demo_finishes_every_workflow_under_both_policies_and_leaves_nothing_running(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "swarmx", "--json", "demo", "--part", "routing", "--workflows", "6"),
            *("--time-scale", "20", "--keep", str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    everything = {row["policy"]: row for row in result["rows"] if row["kind"] == "all"}
    assert everything.keys() == {"round_robin", "marginal"}
    for row in everything.values():
        assert row["n"] == row["finished"] == 6
        assert 0 < row["p50_s"] <= row["p95_s"] <= row["max_s"]
    assert json.loads((tmp_path / "result.json").read_text())["rows"] == result["rows"]
    assert not [pid for pid in _pids() if str(tmp_path) in _command(pid)]


@pytest.mark.process
@pytest.mark.timeout(400)
def test_a_demo_that_is_stopped_in_the_middle_leaves_nothing_running(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "swarmx", "demo", "--workflows", "30", "--keep", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as demo:
        deadline_s = time.monotonic() + 180.0
        while not list(tmp_path.glob("*/state/swarmx.db")):
            assert time.monotonic() < deadline_s, "the fleet did not start"
            time.sleep(0.1)
        demo.terminate()
        output, _ = demo.communicate(timeout=180.0)
    assert demo.returncode == 1
    assert b"stopped by a signal" in output
    assert not [pid for pid in _pids() if str(tmp_path) in _command(pid)]


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
