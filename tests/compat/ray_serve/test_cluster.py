"""Three nodes under load, on a real Ray: a drain with notice, a loss without, and not one failed call."""

import json
import subprocess
import sys

import pytest

from tests.compat.ray_serve.conftest import HAS_RAY, NO_RAY, ROOT

pytestmark = [pytest.mark.skipif(not HAS_RAY, reason=NO_RAY), pytest.mark.timeout(420), pytest.mark.process]


def test_no_call_is_lost_when_a_node_is_drained_and_another_dies() -> None:
    command = [sys.executable, "-m", "tests.compat.ray_serve.cluster_drill"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["errors"] == []
    assert found["answered"] > found["answered_before_loss"] > 0
    assert found["router"]["in_charge"] == "swarmx"
    assert found["router"]["faults"] == 0
