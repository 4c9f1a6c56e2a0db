"""What was accepted ends exactly once, whatever moment the process is killed in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from eval.doomed import check_lives


@pytest.mark.process
@pytest.mark.timeout(300)
async def test_sixty_killed_lives_lose_nothing_and_end_everything_once(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "eval.doomed", str(tmp_path), "60", "7"], check=True)
    tally = await check_lives(tmp_path)
    assert tally.broken == []
    assert tally.killed >= 30
    assert tally.workflows >= 20
    assert tally.states["finished"] >= tally.workflows // 2
    assert len(tally.points) >= 5, "they died between many different steps"
