"""The measurement of durable steps measures what it says."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from eval.durable import main, measure
from swarmx.state_config import StateSection


async def test_every_answer_is_a_step(tmp_path: Path) -> None:
    row = await measure(StateSection(dir=tmp_path), "sqlite", concurrent=4, workflows=10, nodes=3)
    assert (row["where"], row["steps"]) == ("sqlite", 30)
    assert all(value > 0.0 for value in row.values() if isinstance(value, float))


async def test_figures_are_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["steps", "--workflows", "5", "--concurrent", "2", "64", "--normal", "--out", str(tmp_path)]
    assert await main(given) == 0
    result = msgspec.json.decode((tmp_path / "result.json").read_bytes())
    places = ("sqlite", "sqlite, synchronous=NORMAL")
    assert [(row["where"], row["concurrent"]) for row in result["rows"]] == [(w, n) for w in places for n in (2, 64)]
    assert [claim["name"] for claim in result["claims"]] == ["durable_steps_a_second@64"]
    assert "steps_a_second" in capsys.readouterr().out
