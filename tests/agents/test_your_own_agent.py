"""The page on writing an agent: its code runs, its guard acts, and its journal replays."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from swarmx.core.messages import PolicyChanged
from swarmx.runtime.journal import read

PAGE = Path(__file__).parents[2] / "docs" / "your_own_agent.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the page's code leaves behind, run from its first block to its last."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "your_own_agent"}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"{PAGE.name}, block {number}", "exec"), names)  # noqa: S102  # the page is ours
    return names


def test_the_page_has_an_agent_a_run_and_a_replay() -> None:
    assert len(BLOCKS) == 3


def test_the_agent_runs_beside_the_router_and_its_journal_replays(ran: dict[str, Any]) -> None:
    assert ran["found"].divergence is None
    assert ran["found"].decisions == 60


def test_the_router_heard_the_agent(ran: dict[str, Any], tmp_path: Path) -> None:
    _, entries = read(tmp_path / "guard.jsonl")
    heard = [e.heard.message.policy for e in entries if isinstance(e.heard.message, PolicyChanged)]
    assert heard == ["least_outstanding", "least_work"]


def test_the_agent_stays_within_its_action_set(ran: dict[str, Any]) -> None:
    assert ran["shell"]._switchboard.faults == 0
