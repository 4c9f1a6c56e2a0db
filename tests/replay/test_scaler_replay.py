"""Router and scaler in one world of replicas that start late, or never: their journal reproduces every step."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from swarmx.agents.router import RouterAgent
from swarmx.agents.router_settings import RouterSettings
from swarmx.agents.scaler import ScalerAgent, ScalerSettings
from swarmx.core.actions import Deploy, Drain
from swarmx.core.messages import (
    AlertRaised,
    BoundsChanged,
    CallReady,
    DemandReported,
    ScalePlanned,
    ScaleRequested,
    ScalingPolicyChanged,
    WorkflowEnded,
    WorkflowSubmitted,
)
from swarmx.runtime.journal import FileJournal, read, replay
from swarmx.runtime.switchboard import Switchboard
from swarmx.runtime.virtual import VirtualShell
from tests.agents.scaling_worlds import PLAN, SLOW, SlowStarts, a_group, of_group
from tests.agents.worlds import FORECAST, a_call

GROUPS = (a_group("g", min_replicas=1, limit=3, max_replicas=5), a_group("slow", profile=SLOW, max_replicas=0))
SCALER = ScalerSettings(
    groups=GROUPS,
    parameters={"target_in_flight": 2.0},
    down_cooldown_s=20.0,
    drain_s=5.0,
    start_floor_s=15.0,
    start_patience=1.5,
)
ROUTER = RouterSettings(models=["m"])


def a_journal(folder: Path, seed: int) -> Path:
    """A hundred and twenty workflows in waves; every fourth start hangs; operators interfere; a replica dies."""
    rng = np.random.default_rng(seed)
    agents = [RouterAgent(ROUTER), ScalerAgent(SCALER)]
    journal = FileJournal(
        folder / "a.jsonl", {"router": msgspec.to_builtins(ROUTER), "scaler": msgspec.to_builtins(SCALER)}
    )
    switchboard = Switchboard(agents, epoch=1, journal=journal)
    shell = VirtualShell(switchboard, SlowStarts(GROUPS, [4.0, 9.0, None, 6.0]))
    shell.post(PLAN)
    for number in range(120):
        at_s = 100.0 * (number % 3) + float(rng.random()) * 20.0
        workflow_id = f"w{number}"
        shell.post(WorkflowSubmitted(workflow_id=workflow_id, kind=f"kind{number % 2}"), at_s=at_s)
        for step in range(int(rng.integers(1, 6))):
            at_s += float(rng.random()) * 5.0
            call = msgspec.structs.replace(a_call(f"c{number}-{step}"), workflow_id=workflow_id)
            shell.post(CallReady(call=call, forecast=FORECAST), at_s=at_s)
        shell.post(WorkflowEnded(workflow_id=workflow_id, state="finished"), at_s=at_s + 5.0)
    shell.post(of_group("g-0", "gone", GROUPS[0]), at_s=50.0)
    shell.post(BoundsChanged(model="m", min_replicas=0, max_replicas=4), at_s=90.0)
    shell.post(ScaleRequested(model="m", replicas=3, hold_s=15.0), at_s=130.0)
    shell.post(ScalingPolicyChanged(policy="target_tracking", parameters={"target_in_flight": 3.0}), at_s=210.0)
    shell.run(until_s=400.0)
    journal.close()
    assert switchboard.faults == 0
    return journal.path


@pytest.mark.parametrize("seed", range(3))
def test_a_journal_reproduces_what_the_scaler_did(seed: int, tmp_path: Path) -> None:
    path = a_journal(tmp_path, seed)
    found = replay(path)
    assert found.divergence is None
    assert found.decisions > 100
    _, entries = read(path)
    said = {(entry.agent, type(output)) for entry in entries for output in entry.answered}
    assert {("scaler", kind) for kind in (Deploy, Drain, ScalePlanned, AlertRaised)} < said
    assert ("router", DemandReported) in said


def test_a_report_of_demand_that_was_tampered_with_is_found_out(tmp_path: Path) -> None:
    path = a_journal(tmp_path, 0)
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines):
        if b'"agent":"scaler"' in line and b'"type":"DemandReported"' in line:
            entry = msgspec.json.decode(line)
            entry["heard"]["message"]["in_flight"] = 1000
            lines[number] = msgspec.json.encode(entry) + b"\n"
            break
    path.write_bytes(b"".join(lines))
    assert replay(path).divergence is not None
